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
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import xxhash

from curate.data.mirror_copy import THREADS, Mirror
from curate.data.storage import local_stamp
from curate.errors import OutputError

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.+)")
_SUFFIX, _RUN, _FACTS = ".copy", "run", "store.json"

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
    with ThreadPoolExecutor(THREADS) as threads:
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


def _files_below(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
