"""The places that inputs come from: folders, globs, packages, stores, saved data sets."""

import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from curate.config import nearest
from curate.data.example import Source
from curate.data.file_names import glob_pattern, is_glob, is_open, split_glob, wanted
from curate.data.files import read_json
from curate.data.storage import local_stamp, locate, remote_stamp, store_errors
from curate.errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """A file before its format is settled."""

    key: str
    address: str
    size_bytes: int
    stamp: str
    format: str | None = None
    classes: tuple[str, ...] = ()
    """Of images in folders: their names, in the order of the labels."""


def expanded(path: str) -> Path:
    return Path(path).expanduser().absolute()


def find_local(path: Path, source: Source, where: str) -> list[Found]:
    if path.is_file():
        return [_local(path, path.name)]
    if path.is_dir():
        return [_local(path / key, key) for key in wanted(_walk(path), source)]
    if not is_glob(str(path)):
        raise InputError(
            f"{where}: there is no {path}", fix=_suggest(path) or "check the path in the settings"
        )
    prefix, pattern = split_glob(path.as_posix())
    root = Path(prefix or "/")
    matches = glob_pattern(pattern)
    keys = list(_walk(root, deep="**" in pattern, depth=pattern.count("/")))
    return [
        _local(root / key, key) for key in keys if matches.fullmatch(key) and is_open(key, pattern)
    ]


def _local(path: Path, key: str) -> Found:
    with store_errors(str(path)):
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):  # reading a pipe would wait for ever
            raise InputError(
                f"{path} is no file, but a pipe, a socket or a device",
                fix="take it out of the folder, or choose files with sources.*.include",
            )
        return Found(key, str(path), facts.st_size, local_stamp(path))


def _walk(root: Path, *, deep: bool = True, depth: int = 0) -> Iterator[str]:
    """Relative paths of the files below `root`; a folder that links to its own parent is entered
    once."""
    seen = set[str]()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        relative = Path(folder).relative_to(root)
        level = len(relative.parts)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
        if real in seen or (not deep and level >= depth):
            folders.clear()
        if real in seen:
            continue
        seen.add(real)
        for file in names:
            yield (relative / file).as_posix()


def _suggest(path: Path) -> str | None:
    """`did you mean` for a misspelt name in a folder that exists."""
    if not path.parent.is_dir():
        return None
    return nearest(path.name, [entry.name for entry in path.parent.iterdir()])


def inside_package(address: str) -> Path:
    """The place on disk of `pkg://package/rest`; the package is found, not imported."""
    package, _, rest = address.removeprefix("pkg://").partition("/")
    try:
        spec = find_spec(package) if package and "." not in package else None
    except ValueError:  # a module that is running has no spec, such as __main__
        spec = None
    if spec is None:
        raise InputError(
            f"{address}: there is no package {package!r}",
            fix=f"install it, or check the spelling; pkg:// takes a top-level package: {package}",
        )
    folders = list(spec.submodule_search_locations or ())
    if not folders and not rest and spec.has_location and spec.origin:
        return Path(spec.origin)
    for folder in folders:
        if Path(folder).is_dir():
            return Path(folder, rest) if rest else Path(folder)
    raise InputError(
        f"{address}: the package {package!r} has no folder on disk", fix="use another package"
    )


def find_remote(address: str, source: Source, where: str) -> list[Found]:
    system, path = locate(address)
    infos: Any
    protocol = address.partition("://")[0]
    with store_errors(address):
        system.invalidate_cache()  # the listing may be from an earlier call
        if is_glob(path) and not protocol.startswith("http"):
            prefix, pattern = split_glob(path)
            infos = system.glob(path, detail=True)
            return [
                _remote(system, info, entry, prefix)
                for entry, info in infos.items()
                if info["type"] == "file" and is_open(_relative(entry, prefix), pattern)
            ]
        info = system.info(path)
        if info["type"] == "file":
            return [_remote(system, info, path, path.rpartition("/")[0])]
        infos = system.find(path, detail=True)
        keys = {_relative(entry, path): entry for entry in infos}
        return [_remote(system, infos[keys[k]], keys[k], path) for k in wanted(keys, source)]


def _remote(system: Any, info: Any, entry: str, root: str) -> Found:
    stamp = remote_stamp(info)
    size = int(info.get("size") or 0)
    if stamp == str(info.get("size")):
        log.warning("%s: the store gives no tag or time; changes show by size only", entry)
    return Found(_relative(entry, root), system.unstrip_protocol(entry), size, stamp)


def _relative(entry: str, root: str) -> str:
    root = root.rstrip("/")
    return entry[len(root) + 1 :] if root and entry.startswith(f"{root}/") else entry.lstrip("/")


def saved_dataset(folder: Path, source: Source, where: str) -> list[Found]:
    """Arrow files of a folder written by `save_to_disk`, in the order it names them."""
    splits = read_json(folder / "dataset_dict.json")
    if splits is not None:
        names: list[str] = splits["splits"]
        chosen = source.split or (names[0] if len(names) == 1 else None)
        if chosen not in names:
            raise InputError(
                f"{where}: split {source.split!r} is none of {', '.join(names)}",
                fix=f"set sources.*.split to {names[0]}",
            )
        prefix = f"{chosen}/"
    else:
        prefix = ""
    state = read_json(folder / prefix / "state.json")
    if state is None:
        raise InputError(f"{where}: {folder / prefix / 'state.json'} is missing",
                         fix="save the data set again with save_to_disk")  # fmt: skip
    keys = [prefix + str(entry["filename"]) for entry in state["_data_files"]]
    found = [_local(folder / key, key) for key in keys]
    return [Found(f.key, f.address, f.size_bytes, f.stamp, "arrow") for f in found]
