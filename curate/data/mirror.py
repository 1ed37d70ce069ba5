"""A run in an object store: the store holds it, a folder of this machine is its working copy.

Every file comes to be in one of a few functions (`curate.data.files`), and each of them asks here
whether the file belongs to a working copy. Where it does, the bytes go to the store first and get
their local name after: a store takes an object whole or not at all, so its state is that of a run
folder at every moment, marks last. Nothing but the store counts. The copy may be deleted between
two commands, and what a killed process has left in it goes when the run is opened the next time.

A working copy is a folder `run` in a folder `<name>-<digest>.copy`, beside `store.json` with the
address; so any process that is given a path below it knows where the file belongs.
"""

import json
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from curate.data.mirror_journal import Entry, Journal
from curate.data.storage import local_stamp, locate, remote_stamp, run_errors
from curate.errors import OutputError, RunFolderError, StoreLostError

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.+)")
_SUFFIX, _RUN, _FACTS = ".copy", "run", "store.json"
_PENDING = ".pending"
_OWN = (".lock", ".lock.json", ".live", _PENDING)
"""At the top of a run: of this machine, or of the store, alone."""
_THREADS = 16
_BATCH = 256

DOCUMENTS = (".json", ".yaml", ".yml", ".md", ".txt", ".py")
"""Suffixes of what every command reads: settings, marks, manifests, summaries."""


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
            system.put_file(str(source), key)
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
        with ThreadPoolExecutor(_THREADS) as threads:
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
                    system.get_file(f"{base}/{name}", str(temporary))
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


# -- which copy a path belongs to -----------------------------------------------------------------

_known: dict[str, Mirror] = {}


def address_in(text: str | Path) -> str | None:
    """The address of a run in a store, or None for a local path.

    A `Path` of an address has lost one of its slashes; it is put back.
    """
    found = _ADDRESS.fullmatch(str(text))
    if found is None or found[1] == "file":
        return None
    return f"{found[1]}://{found[2].rstrip('/')}"


def scratch() -> Path:
    """Where working copies lie on this machine: CURATE_SCRATCH, else below the user's cache."""
    given = os.environ.get("CURATE_SCRATCH")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(given).expanduser().absolute() if given else cache / "curate" / "runs"


def copy_for(address: str) -> Mirror:
    """The working copy of a run at an address; its folder is made where it is missing.

    Raises:
        OutputError: it cannot be made.
    """
    digest = xxhash.xxh3_64_hexdigest(address.encode())
    readable = re.sub(r"[^A-Za-z0-9]+", "-", address.partition("://")[2])[-60:].strip("-")
    place = scratch() / f"{readable}-{digest}{_SUFFIX}"
    return attach(place / _RUN, address)


def attach(root: Path, address: str) -> Mirror:
    """The working copy at `root`, made where there is none yet."""
    facts = root.parent / _FACTS
    try:
        if not facts.exists():
            root.parent.mkdir(parents=True, exist_ok=True)
            temporary = facts.with_name(f".{_FACTS}.{os.getpid()}.tmp")
            temporary.write_text(json.dumps({"address": address, "id": os.urandom(8).hex()}))
            temporary.replace(facts)
        root.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the working copy {root} of {address} cannot be made: {error.strerror or error}",
            fix="set CURATE_SCRATCH to a folder that every machine of the run can write",
        ) from error
    found = copy_of(root)
    assert found is not None
    return found


def copy_of(path: Path) -> Mirror | None:
    """The working copy that a path lies in, or None for an ordinary local file."""
    if _SUFFIX not in str(path):  # as a rule: this is asked for every file that is written
        return None
    for folder in (path, *path.parents):
        if folder.name == _RUN and folder.parent.suffix == _SUFFIX:
            return _at(folder)
    return None


def shown_place(root: Path | str) -> str:
    """The address of the run whose working copy this is, else the path itself."""
    mirror = copy_of(Path(root))
    if mirror is None:
        return str(root)
    inside = os.path.relpath(root, mirror.root)
    return mirror.address if inside == "." else f"{mirror.address}/{inside}"


def with_addresses(text: str) -> str:
    """A message in which the working copies of this process have their addresses."""
    for root, mirror in _known.items():
        text = text.replace(root, mirror.address)
    return text


def _at(root: Path) -> Mirror | None:
    facts = root.parent / _FACTS
    known = _known.get(str(root))
    if known is not None and facts.exists():
        return known
    try:
        values = json.loads(facts.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    _known[str(root)] = Mirror(root.resolve(), values["address"], values["id"])
    return _known[str(root)]


# -- for curate.data.files ------------------------------------------------------------------------


@contextmanager
def sending(temporary: Path, target: Path) -> Generator[None]:
    """Inside, a finished file gets its name; the store has it before."""
    mirror = copy_of(target)
    name = mirror and mirror.name(target)
    if mirror is None or name is None:
        yield
        return
    entry = mirror.put(temporary, name)
    with mirror.journal.locked():
        yield
        mirror.journal.append([(name, entry._replace(local=local_stamp(target)))])


@contextmanager
def sending_folder(temporary: Path, target: Path) -> Generator[None]:
    """Inside, a finished folder gets its name; the store has all its files before.

    A store has no folders that come whole. A note in it says that this one is not whole yet; where
    a kill leaves the note, the folder is removed when the run is opened the next time.
    """
    mirror = copy_of(target)
    folder = mirror and mirror.name(target)
    if mirror is None or folder is None:
        yield
        return
    files = {path.relative_to(temporary).as_posix(): path for path in _files_below(temporary)}
    names = {f"{folder}/{file}": path for file, path in files.items()}
    old = [name for name in mirror.journal.entries() if name.startswith(f"{folder}/")]
    note = mirror.pending(folder)
    mirror.pipe(note, json.dumps({"folder": folder}).encode())
    with ThreadPoolExecutor(_THREADS) as threads:
        entries = list(threads.map(mirror.put, names.values(), names))
    surplus = [name for name in old if name not in names]
    for name in surplus:
        mirror.delete(name)
    with mirror.journal.locked():
        yield
        stamped = [
            (name, entry._replace(local=local_stamp(target / file)))
            for name, entry, file in zip(names, entries, files, strict=True)
        ]
        mirror.journal.append([*stamped, *((name, None) for name in surplus)])
    mirror.delete(note)


def ensure(*paths: Path) -> None:
    """Fetch files of one run that the store has and this machine has not."""
    mirror = copy_of(paths[0]) if paths else None
    if mirror is None:
        return
    names = {mirror.name(path) for path in paths if not path.exists()}
    if names:
        mirror.bring(names.__contains__)


def forget(path: Path) -> None:
    """Remove a file from the store, before it is removed here."""
    mirror = copy_of(path)
    name = mirror and mirror.name(path)
    if mirror is not None and name is not None and mirror.journal.get(name) is not None:
        mirror.delete(name)
        mirror.journal.append([(name, None)])


def forget_folder(folder: Path) -> None:
    """Remove all files of a folder from the store, marks first; never those of a whole run."""
    mirror = copy_of(folder)
    if mirror is None or mirror.name(folder) is None:
        return
    names = list(held_below(folder))
    for path in sorted(names, key=lambda path: (path.parent.name != ".done", path)):
        forget(path)


def held(path: Path) -> int | None:
    """Size of a file that the store has and this machine has not; None where there is none."""
    mirror = copy_of(path)
    name = mirror and mirror.name(path)
    entry = mirror.journal.get(name) if mirror is not None and name is not None else None
    return None if entry is None else entry.size


def held_below(folder: Path) -> Iterator[Path]:
    """Files below a folder that the store has, whether this machine has them or not."""
    mirror = copy_of(folder)
    if mirror is None:
        return
    name = mirror.name(folder)
    if name is None and Path(os.path.realpath(folder)) != mirror.root:
        return
    start = "" if name is None else f"{name}/"
    for each in mirror.journal.entries():
        if each.startswith(start):
            yield folder / each.removeprefix(start)


def is_document(name: str) -> bool:
    """Whether a file is one of those that every command reads."""
    return PurePosixPath(name).suffix in DOCUMENTS


def _is_private(name: str) -> bool:
    parts = PurePosixPath(name).parts
    last = parts[-1]
    is_hidden = any(part.startswith(".") and part.endswith((".tmp", ".meeting")) for part in parts)
    is_progress = last == "progress.json" and "proxies" in parts
    return is_hidden or is_progress or parts[0] in _OWN


def _files_below(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _remove_empty(root: Path) -> None:
    """Folders that hold nothing any more, as some of them would be taken for finished ones."""
    for folder, _, files in os.walk(root, topdown=False):
        if not files and Path(folder) != root:
            with suppress(OSError):  # there are others in it
                Path(folder).rmdir()
