"""Which files a source consists of: paths, folders, globs, packages, stores, saved data sets."""

import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from curate.config import nearest
from curate.data.example import Source
from curate.data.files import read_json
from curate.data.storage import (
    COMPRESSIONS,
    is_local,
    local_stamp,
    locate,
    remote_stamp,
    store_errors,
)
from curate.errors import ConfigError, InputError

log = logging.getLogger(__name__)

SUFFIXES = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".py": "text",
}
"""Suffix -> format. `.gz`, `.zst` and `.bz2` may follow where the format is made of lines."""

FORMATS = ("parquet", "jsonl", "csv", "arrow", "text", "datasets")

_LINE_FORMATS = ("jsonl", "csv", "text")


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """One file of a source, as it was found."""

    source: str
    file: str
    """Path relative to the source; part of the key of its examples."""
    address: str
    """Absolute path, or the address in a store."""
    size_bytes: int
    stamp: str
    """Changes with the content: size and time, or the store's own tag."""
    format: str


@dataclass(frozen=True, slots=True)
class _Found:
    """A file before its format is settled."""

    key: str
    address: str
    size_bytes: int
    stamp: str
    format: str | None = None


def find_files(name: str, source: Source) -> list[InputFile]:
    """All files of a source, sorted by their key.

    The key is the path relative to the folder, to the fixed part of the glob, or the file's name.

    Args:
        name: of the source.
        source: its settings.

    Raises:
        InputError: nothing is there, a format is unknown or mixed, two files share a key.
        MissingDependencyError: the driver of a store is not installed.
        ConfigError: a setting does not fit.
    """
    if source.format is not None and source.format not in FORMATS:
        raise ConfigError(
            f"sources.{name}.format is {source.format!r}",
            fix=nearest(source.format, FORMATS) or f"use one of {', '.join(FORMATS)}",
        )
    paths = [source.path] if isinstance(source.path, str) else list(source.path)
    if not paths:
        raise ConfigError(f"sources.{name}.path is empty", fix="name at least one file")
    found = [file for path in paths for file in _find(name, path, source)]
    _check_keys(name, found)
    files = [
        InputFile(
            source=name,
            file=file.key,
            address=file.address,
            size_bytes=file.size_bytes,
            stamp=file.stamp,
            format=file.format or source.format or _format_of(name, file),
        )
        for file in sorted(found, key=lambda file: file.key)
    ]
    _check_formats(name, files)
    return files


def _find(name: str, path: str, source: Source) -> list[_Found]:
    """Files under one entry of `path`."""
    where = f"sources.{name}.path {path}"
    if path.startswith("pkg://"):
        path = str(_inside_package(path))
    if source.format == "datasets" and is_local(path) and not _expand(path).exists():
        from curate.data.formats.hub import find_hub

        return [_Found(*entry, format="hub") for entry in find_hub(path, source)]
    if is_local(path) or path.startswith("file://"):
        local = _expand(path.removeprefix("file://"))
        if (local / "state.json").exists() or (local / "dataset_dict.json").exists():
            return _saved_dataset(local, source, where)
        found = _find_local(local, source, where)
    else:
        found = _find_remote(_with_revision(path, source), source, where)
    if path.startswith("hf://") and source.split:
        found = _of_split(found, source.split, where)
    elif source.split:
        raise ConfigError(
            f"sources.{name}.split has no meaning for {path}",
            fix="remove it, or choose the files with a glob or sources.*.include",
        )
    if not found:
        raise InputError(f"{where}: no file matches", fix="check the path and `include`")
    return found


def _expand(path: str) -> Path:
    return Path(path).expanduser().absolute()


# -- local files -----------------------------------------------------------------------------


def _find_local(path: Path, source: Source, where: str) -> list[_Found]:
    if path.is_file():
        return [_local(path, path.name)]
    if path.is_dir():
        return [_local(path / key, key) for key in _wanted(_walk(path), source)]
    if not _is_glob(str(path)):
        raise InputError(
            f"{where}: there is no {path}", fix=_suggest(path) or "check the path in the settings"
        )
    prefix, pattern = _split_glob(path.as_posix())
    root = Path(prefix or "/")
    matches = glob_pattern(pattern)
    keys = list(_walk(root, deep="**" in pattern, depth=pattern.count("/")))
    return [
        _local(root / key, key) for key in keys if matches.fullmatch(key) and _is_open(key, pattern)
    ]


def _local(path: Path, key: str) -> _Found:
    with store_errors(str(path)):
        return _Found(key, str(path), path.stat().st_size, local_stamp(path))


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


def _inside_package(address: str) -> Path:
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


# -- stores ----------------------------------------------------------------------------------


def _find_remote(address: str, source: Source, where: str) -> list[_Found]:
    system, path = locate(address)
    infos: Any
    protocol = address.partition("://")[0]
    with store_errors(address):
        system.invalidate_cache()  # the listing may be from an earlier call
        if _is_glob(path) and not protocol.startswith("http"):
            prefix, pattern = _split_glob(path)
            infos = system.glob(path, detail=True)
            return [
                _remote(system, info, entry, prefix)
                for entry, info in infos.items()
                if info["type"] == "file" and _is_open(_relative(entry, prefix), pattern)
            ]
        info = system.info(path)
        if info["type"] == "file":
            return [_remote(system, info, path, path.rpartition("/")[0])]
        infos = system.find(path, detail=True)
        keys = {_relative(entry, path): entry for entry in infos}
        return [_remote(system, infos[keys[k]], keys[k], path) for k in _wanted(keys, source)]


def _remote(system: Any, info: Any, entry: str, root: str) -> _Found:
    stamp = remote_stamp(info)
    size = int(info.get("size") or 0)
    if stamp == str(info.get("size")):
        log.warning("%s: the store gives no tag or time; changes show by size only", entry)
    return _Found(_relative(entry, root), system.unstrip_protocol(entry), size, stamp)


def _relative(entry: str, root: str) -> str:
    root = root.rstrip("/")
    return entry[len(root) + 1 :] if root and entry.startswith(f"{root}/") else entry.lstrip("/")


def _with_revision(address: str, source: Source) -> str:
    """`hf://datasets/owner/name@revision/...` where the settings name a revision."""
    if not address.startswith("hf://datasets/") or source.revision is None or "@" in address:
        return address
    parts = address.removeprefix("hf://datasets/").split("/")
    return "/".join(["hf://datasets", parts[0], f"{parts[1]}@{source.revision}", *parts[2:]])


def _of_split(found: list[_Found], split: str, where: str) -> list[_Found]:
    """Files whose path has the split as a word, as hubs name them: `data/train-00000.parquet`."""
    word = re.compile(rf"(^|[/._-]){re.escape(split)}([/._-]|$)")
    kept = [file for file in found if word.search(file.key)]
    if not kept:
        names = ", ".join(file.key for file in found[:5])
        raise InputError(f"{where}: no file is of split {split!r}; there are {names}",
                         fix="correct sources.*.split, or choose files with a glob")  # fmt: skip
    return kept


# -- data sets saved by `datasets` ---------------------------------------------------------------


def _saved_dataset(folder: Path, source: Source, where: str) -> list[_Found]:
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
    return [_Found(f.key, f.address, f.size_bytes, f.stamp, "arrow") for f in found]


# -- names and formats ---------------------------------------------------------------------------


def glob_pattern(pattern: str) -> re.Pattern[str]:
    """The regular expression of a glob over relative paths.

    `*` and `?` stay inside one folder, `**/` is any number of folders, none included.
    """
    out = ""
    for part in re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]/]+\]|.", pattern, re.DOTALL):
        if part == "**/":
            out += "(?:.*/)?"
        elif part == "**":
            out += ".*"
        elif part == "*":
            out += "[^/]*"
        elif part == "?":
            out += "[^/]"
        elif part.startswith("[") and len(part) > 1:
            out += f"[^{part[2:]}" if part[1] in "!^" else part
        else:
            out += re.escape(part)
    return re.compile(out)


def _wanted(keys: Iterable[str], source: Source) -> list[str]:
    """Files of a folder that belong to the source.

    `include` decides where it is set; otherwise names with a leading `_` are left out, and where
    the format is set, files of other formats.
    """
    keys = [key for key in keys if not _is_hidden(key) and "__pycache__" not in key.split("/")]
    if source.include is not None:
        matches = glob_pattern(source.include)
        return [key for key in keys if matches.fullmatch(key)]
    keys = [key for key in keys if not _is_private(key)]
    if source.format in (None, "datasets"):
        return keys
    kept = [key for key in keys if _known_format(key) == source.format]
    if len(kept) < len(keys):
        log.info("%d files of other formats than %s are left out", len(keys) - len(kept),
                 source.format)  # fmt: skip
    return kept


def _is_open(key: str, pattern: str) -> bool:
    """Whether a glob may take a file: hidden and private ones only where it names them so."""
    return (not _is_hidden(key) or _is_hidden(pattern)) and (
        not _is_private(key) or _is_private(pattern)
    )


def _is_hidden(key: str) -> bool:
    return any(part.startswith(".") for part in key.split("/"))


def _is_private(key: str) -> bool:
    return any(part.startswith("_") for part in key.split("/"))


def _is_glob(path: str) -> bool:
    return any(sign in path for sign in "*?[")


def _split_glob(path: str) -> tuple[str, str]:
    """A glob's fixed folder, and the pattern below it."""
    parts = path.split("/")
    fixed = next(i for i, part in enumerate(parts) if _is_glob(part))
    return "/".join(parts[:fixed]), "/".join(parts[fixed:])


def _known_format(key: str) -> str | None:
    path = PurePosixPath(key.lower())
    if path.suffix in COMPRESSIONS:
        found = SUFFIXES.get(path.with_suffix("").suffix)
        return found if found in _LINE_FORMATS else None
    return SUFFIXES.get(path.suffix)


def _format_of(name: str, file: _Found) -> str:
    found = _known_format(file.key)
    if found is None:
        raise InputError(
            f"sources.{name}: the format of {file.address} is not known from its name",
            fix=f"set sources.{name}.format to one of {', '.join(FORMATS)},"
            f" or choose files with sources.{name}.include",
        )
    return found


def _check_formats(name: str, files: list[InputFile]) -> None:
    first = files[0]
    other = next((file for file in files if file.format != first.format), None)
    if other is not None:
        raise InputError(
            f"sources.{name} mixes formats: {first.file} is {first.format}, {other.file} is"
            f" {other.format}",
            fix=f"set sources.{name}.include or format, or make two sources",
        )


def _check_keys(name: str, found: list[_Found]) -> None:
    seen: dict[str, str] = {}
    for file in found:
        if not file.key.isprintable() or _has_surrogates(file.key):
            raise InputError(
                f"sources.{name}: the file name {file.key!r} is not plain text", fix="rename it"
            )
        if file.key in seen:
            raise InputError(
                f"sources.{name}: {seen[file.key]} and {file.address} would both be {file.key!r}",
                fix="make separate sources of them",
            )
        seen[file.key] = file.address


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= sign <= "\udfff" for sign in text)
