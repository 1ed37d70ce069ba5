"""One working copy of a run in a store: sent, fetched, compared; see `curate.data.mirror`."""

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from curate.data.mirror_journal import Entry, Journal
from curate.data.pulse import beat
from curate.data.storage import local_stamp, locate, remote_stamp, run_errors
from curate.errors import OutputError, RunFolderError, StoreLostError

_PENDING = ".pending"
_OWN = (".lock", ".lock.json", ".live", _PENDING)
"""At the top of a run: of this machine, or of the store, alone."""
_BATCH = 256

THREADS = 16
"""That send or fetch files at the same time."""
DOCUMENTS = (".json", ".yaml", ".yml", ".md", ".txt", ".py")
"""Suffixes of what every command reads: settings, marks, manifests, summaries."""


@cache
def _moving() -> Any:
    """A callback for fsspec: long ways of large files are no hang."""
    from fsspec.callbacks import Callback  # a tenth of the start of every command

    class Moving(Callback):
        def relative_update(self, inc: int = 1) -> None:
            beat()
            super().relative_update(inc)

    return Moving()


class Mirror:
    """A working copy and the store it belongs to.

    Args:
        root: the local run folder.
        address: of the run in the store.
        identity: of this copy, so that a process can tell whether another one shares it.
    """

    def __init__(self, root: Path, address: str, identity: str) -> None:
        self.root, self.address, self.identity = root, address, identity
        self.journal = Journal(root.parent)
        self.lost: str | None = None
        """Why nothing may be written any more; None while all is well."""
        self._system: tuple[int, Any, str] | None = None

    # -- single files -----------------------------------------------------------------------------

    def name(self, path: Path) -> str | None:
        """The name of a file in the store, or None for what belongs to this machine alone."""
        # Folders of a comparison hold links to those of the run.
        full = Path(os.path.realpath(path.parent)) / path.name
        if not full.is_relative_to(self.root):
            return None
        name = full.relative_to(self.root).as_posix()
        return None if name == "." or _is_private(name) else name

    def put(self, source: Path, name: str) -> Entry:
        """Send the bytes of `source`; the store has them whole when this returns."""
        if self.lost is not None:
            raise RunFolderError(self.lost, fix="wait until the other client has finished")
        system, base = self.system()
        key = f"{base}/{name}"
        with run_errors(f"{self.address}/{name}"):
            system.put_file(str(source), key, callback=_moving())
            facts = system.info(key)
        size = source.stat().st_size
        if facts["size"] != size:
            raise StoreLostError(
                f"{self.address}/{name} has {facts['size']:,} bytes in the store, not {size:,}",
                fix="run the same command again",
            )
        return Entry(size, remote_stamp(facts), None)

    def delete(self, name: str) -> None:
        """Remove an object, where there is one."""
        system, base = self.system()
        with run_errors(f"{self.address}/{name}"), suppress(FileNotFoundError):
            system.rm_file(f"{base}/{name}")

    def read(self, name: str) -> bytes | None:
        """The content of a small object, or None where there is none."""
        system, base = self.system()
        with run_errors(f"{self.address}/{name}"):
            try:
                return system.cat_file(f"{base}/{name}")
            except FileNotFoundError:
                return None

    def system(self) -> tuple[Any, str]:
        """The file system of the store and the run's path in it; one for each process."""
        if self._system is None or self._system[0] != os.getpid():
            # Others write too, so nothing may be remembered of what is there.
            system, base = locate(self.address, use_listings_cache=False, skip_instance_cache=True)
            self._system = os.getpid(), system, base.rstrip("/")
        return self._system[1:]

    # -- the whole --------------------------------------------------------------------------------

    def refresh(self, *, owner: bool = False) -> bool:
        """Compare the copy with the store; what is not as there goes.

        Args:
            owner: for who holds the run's lock: what was left half done is undone, and local
                files that the store does not know are removed.

        Returns:
            Whether there is anything in the store.
        """
        with self.journal.locked():
            listed, pending = self._listed()
            if owner:
                for note, folder in pending.items():
                    for name in [name for name in listed if name.startswith(f"{folder}/")]:
                        self.delete(name)
                    self.delete(note)
            half = tuple(f"{folder}/" for folder in pending.values())
            known = self.journal.entries()
            now: dict[str, Entry] = {}
            for name, entry in listed.items():
                if half and name.startswith(half):
                    continue
                before = known.get(name)
                same = before is not None and before[:2] == entry[:2]
                stamp = before.local if before is not None and same else None
                now[name] = entry._replace(local=stamp if stamp == self._stamp(name) else None)
            for name in self._local_files() if owner else list(known):
                if name in now and now[name].local is not None:
                    continue
                # Without the lock, what another process has just written is left alone.
                if owner or known[name].local == (self._stamp(name) or ""):
                    (self.root / name).unlink(missing_ok=True)
            self.journal.rewrite(now)
        if owner:
            _remove_empty(self.root)
        return bool(now)

    def bring(self, wanted: Callable[[str], bool]) -> None:
        """Fetch what the copy does not have, of the names that are wanted."""
        names = sorted(name for name in self.journal.missing() if wanted(name))
        entries = self.journal.entries() if names else {}
        with ThreadPoolExecutor(THREADS) as threads:
            for first in range(0, len(names), _BATCH):
                batch = [(name, entries[name]) for name in names[first : first + _BATCH]]
                for _ in threads.map(self._fetch, *zip(*batch, strict=True)):
                    pass

    def sweep(self) -> None:
        """Send what was written, and delete what was removed, behind the back of this module."""
        known = self.journal.entries()
        changed = [
            name
            for name in self._local_files()
            if name not in known or known[name].local != self._stamp(name)
        ]
        for name in sorted(changed, key=lambda name: ("/.done/" in f"/{name}", name)):
            with suppress(FileNotFoundError):  # removed in the meantime
                entry = self.put(self.root / name, name)
                stamp = local_stamp(self.root / name)
                self.journal.append([(name, entry._replace(local=stamp))])
        gone = [n for n, entry in known.items() if entry.local is not None and not self._stamp(n)]
        for name in sorted(gone, key=lambda name: ("/.done/" not in f"/{name}", name)):
            with self.journal.locked():
                entry = self.journal.get(name)
                if entry is not None and entry.local is not None and not self._stamp(name):
                    self.delete(name)
                    self.journal.append([(name, None)])

    def pending(self, folder: str) -> str:
        """Name of the note that says that a folder is not whole yet."""
        return f"{_PENDING}/{xxhash.xxh3_64_hexdigest(folder.encode())}.json"

    def pipe(self, name: str, content: bytes) -> None:
        """Make a small object that the copy does not have."""
        system, base = self.system()
        with run_errors(f"{self.address}/{name}"):
            system.pipe_file(f"{base}/{name}", content)

    def _listed(self) -> tuple[dict[str, Entry], dict[str, str]]:
        """What the store has, and note -> folder of those that are not whole."""
        system, base = self.system()
        with run_errors(self.address):
            try:
                found = system.find(base, detail=True)
            except FileNotFoundError:
                found = {}
        listed: dict[str, Entry] = {}
        pending: dict[str, str] = {}
        for path, facts in found.items():
            name = str(path).lstrip("/").removeprefix(base.lstrip("/")).lstrip("/")
            if name.startswith(f"{_PENDING}/"):
                pending[name] = json.loads(self.read(name) or b'{"folder": ""}')["folder"]
            elif name and not name.endswith("/") and not _is_private(name):
                listed[name] = Entry(int(facts["size"]), remote_stamp(facts), None)
        return listed, {note: folder for note, folder in pending.items() if folder}

    def _fetch(self, name: str, entry: Entry) -> None:
        """One file, under a temporary name until it is whole."""
        system, base = self.system()
        target = self.root / name
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with run_errors(f"{self.address}/{name}"):
                try:
                    system.get_file(f"{base}/{name}", str(temporary), callback=_moving())
                except FileNotFoundError:  # removed since it was listed
                    self.journal.append([(name, None)])
                    return
            if temporary.stat().st_size != entry.size:
                raise StoreLostError(
                    f"{self.address}/{name} changes while it is read",
                    fix="run the same command again when nobody writes there",
                )
            with self.journal.locked():
                if self.journal.get(name) != entry:  # written by another process meanwhile
                    return
                temporary.replace(target)
                self.journal.append([(name, entry._replace(local=local_stamp(target)))])
        except OSError as error:
            raise OutputError(
                f"the working copy {self.root} cannot be written: {error.strerror or error}",
                fix="free some space, or set CURATE_SCRATCH to a folder with more",
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _stamp(self, name: str) -> str | None:
        try:
            return local_stamp(self.root / name)
        except OSError:
            return None

    def _local_files(self) -> list[str]:
        """Names of the files of the copy; those of a writer at work are left out."""
        found: list[str] = []
        for folder, _, files in os.walk(self.root):
            inside = Path(folder).relative_to(self.root)
            names = ((inside / file).as_posix() for file in files)
            found += [n for n in names if not _is_private(n) and not (self.root / n).is_symlink()]
        return found


def is_document(name: str) -> bool:
    """Whether a file is one of those that every command reads."""
    return PurePosixPath(name).suffix in DOCUMENTS


def _is_private(name: str) -> bool:
    parts = PurePosixPath(name).parts
    last = parts[-1]
    is_hidden = any(part.startswith(".") and part.endswith((".tmp", ".meeting")) for part in parts)
    is_progress = last == "progress.json" and "proxies" in parts
    return is_hidden or is_progress or parts[0] in _OWN


def _remove_empty(root: Path) -> None:
    """Folders that hold nothing any more, as some of them would be taken for finished ones."""
    for folder, _, files in os.walk(root, topdown=False):
        if not files and Path(folder) != root:
            with suppress(OSError):  # there are others in it
                Path(folder).rmdir()
