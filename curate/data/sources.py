"""Which files a source consists of, under which keys, in which format."""

import re
from dataclasses import dataclass

from curate.config import nearest
from curate.data.example import Source
from curate.data.file_names import FORMATS, is_glob, known_format
from curate.data.places import (
    Found,
    expanded,
    find_local,
    find_remote,
    inside_package,
    saved_dataset,
)
from curate.data.storage import is_local
from curate.errors import ConfigError, InputError


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
    classes: tuple[str, ...] = ()
    """Of images in folders: their names, in the order of the labels."""


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
            classes=file.classes,
        )
        for file in sorted(found, key=lambda file: file.key)
    ]
    _check_formats(name, files)
    return files


def _find(name: str, path: str, source: Source) -> list[Found]:
    """Files under one entry of `path`."""
    where = f"sources.{name}.path {path}"
    if path.startswith("pkg://"):
        path = str(inside_package(path))
    if source.format == "datasets" and is_local(path) and not expanded(path).exists():
        from curate.data.formats.hub import find_hub

        return [Found(*entry, format="hub") for entry in find_hub(path, source)]
    if is_local(path) or path.startswith("file://"):
        local = expanded(path.removeprefix("file://"))
        if (local / "state.json").exists() or (local / "dataset_dict.json").exists():
            return saved_dataset(local, source, where)
        found = find_local(local, source, where)
    else:
        found = find_remote(_with_revision(path, source), source, where)
    if path.startswith("hf://") and source.split:
        found = _of_split(found, source.split, where)
    elif source.split:
        raise ConfigError(
            f"sources.{name}.split has no meaning for {path}",
            fix="remove it, or choose the files with a glob or sources.*.include",
        )
    if not found:
        raise InputError(f"{where}: no file matches", fix="check the path and `include`")
    if source.format in (None, "images") and all(known_format(f.key) == "images" for f in found):
        return _image_folders(found, path, source, where)
    return found


def _image_folders(found: list[Found], path: str, source: Source, where: str) -> list[Found]:
    """Images are read by the folder, which has to be what the source names."""
    from curate.data.formats.images import gathered

    if is_glob(path) or known_format(path) == "images":
        raise InputError(
            f"{where}: images are read by the folder",
            fix="name their folder, and choose among them with sources.*.include",
        )
    root = path.removeprefix("file://")
    return gathered(found, str(expanded(root)) if is_local(root) else root, source, where)


def _with_revision(address: str, source: Source) -> str:
    """`hf://datasets/owner/name@revision/...` where the settings name a revision."""
    if not address.startswith("hf://datasets/") or source.revision is None or "@" in address:
        return address
    parts = address.removeprefix("hf://datasets/").split("/")
    return "/".join(["hf://datasets", parts[0], f"{parts[1]}@{source.revision}", *parts[2:]])


def _of_split(found: list[Found], split: str, where: str) -> list[Found]:
    """Files whose path has the split as a word, as hubs name them: `data/train-00000.parquet`."""
    word = re.compile(rf"(^|[/._-]){re.escape(split)}([/._-]|$)")
    kept = [file for file in found if word.search(file.key)]
    if not kept:
        names = ", ".join(file.key for file in found[:5])
        raise InputError(f"{where}: no file is of split {split!r}; there are {names}",
                         fix="correct sources.*.split, or choose files with a glob")  # fmt: skip
    return kept


def _format_of(name: str, file: Found) -> str:
    found = known_format(file.key)
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


def _check_keys(name: str, found: list[Found]) -> None:
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
