"""Folders of image files, whose class is the name of the sub-folder they lie in.

All images of a source become one table, or several where there are many, in the order of a hash of
their paths, so that classes are mixed wherever some rows are read together. Columns: `image` (a
struct of `bytes` and `path`, as `datasets` has it), `label` where there are sub-folders, and
`file_name`, the path below the source. The bytes are those of the files.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import xxhash

from curate.data.columns import PROBLEM
from curate.data.example import Source
from curate.data.file_names import known_format
from curate.data.files import fingerprint
from curate.data.places import Found, find_local, find_remote
from curate.data.sources import InputFile
from curate.data.storage import is_local, locate, store_errors
from curate.errors import InputError

NAME = "images"

_TABLE_IMAGES = 50_000
"""Images of one table, at most; their number is a power of two, so that it seldom changes."""
_BATCH_BYTES = 16 << 20
_BATCH_ROWS = 1000
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def gathered(images: Sequence[Found], root: str, source: Source, where: str) -> list[Found]:
    """One entry for each table, in place of one for each image.

    Args:
        images: all below `root`.
        root: the folder that the source names, in full.
        source: its `classes`, where set, are the classes; else the names of the folders are.
        where: the source and its path, for messages.

    Raises:
        InputError: a folder is none of the classes that the source lists.
    """
    names = sorted({name for image in images if (name := _class_name(image.key)) is not None})
    for name in names:
        if source.classes and name not in source.classes:
            raise InputError(
                f"{where}: the folder {name} is none of the classes {', '.join(source.classes)}",
                fix="correct classes in the source, or leave the folder out with include",
            )
    classes = (source.classes or tuple(names)) if names else ()
    count = 1
    while len(images) > count * _TABLE_IMAGES:
        count *= 2
    tables: list[list[Found]] = [[] for _ in range(count)]
    for image in images:
        tables[_hash(image.key) % count].append(image)
    return [
        Found(
            key=NAME if count == 1 else f"{NAME}-{number:05d}-of-{count:05d}",
            address=root,
            size_bytes=sum(image.size_bytes for image in members),
            stamp=fingerprint(
                files=sorted((image.key, image.size_bytes, image.stamp) for image in members),
                classes=classes,
            ),
            format=NAME,
            classes=classes,
        )
        for number, members in enumerate(tables)
        if members
    ]


def read(file: InputFile, source: Source) -> Iterator[pa.RecordBatch]:
    """The images of one table; one that cannot be read is a problem."""
    schema = _schema(file.classes)
    rows: list[dict[str, Any]] = []
    size = 0
    yield _batch(rows, schema)
    for image in _members(file, source):
        name = _class_name(image.key)
        row: dict[str, Any] = {"file_name": image.key}
        if name in file.classes:
            row["label"] = file.classes.index(name)
        try:
            content = _content(image.address)
        except InputError as error:
            row[PROBLEM] = f"unreadable_image: {error.what}"
        else:
            row["image"] = {"bytes": content, "path": PurePosixPath(image.key).name}
            size += len(content)
        rows.append(row)
        if size >= _BATCH_BYTES or len(rows) >= _BATCH_ROWS:
            yield _batch(rows, schema)
            rows, size = [], 0
    yield _batch(rows, schema)


def _members(file: InputFile, source: Source) -> list[Found]:
    """The images of one table, in the order of their hashes."""
    if is_local(file.address):
        found = find_local(Path(file.address), source, file.address)
    else:
        found = find_remote(file.address, source, file.address)
    place = re.fullmatch(rf"{NAME}-(\d+)-of-(\d+)", file.file)
    number, count = (int(place[1]), int(place[2])) if place else (0, 1)
    mine = [f for f in found if known_format(f.key) == NAME and _hash(f.key) % count == number]
    return sorted(mine, key=lambda image: (_hash(image.key), image.key))


def _hash(key: str) -> int:
    return xxhash.xxh3_64_intdigest(key.encode())


def _class_name(key: str) -> str | None:
    """The folder that an image lies in; None for one beside the folders."""
    return PurePosixPath(key).parent.name or None


def _content(address: str) -> bytes:
    with store_errors(address):
        if is_local(address):
            return Path(address).read_bytes()
        system, inside = locate(address)
        content: Any = system.cat_file(inside)
        return bytes(content)


def _schema(classes: tuple[str, ...]) -> pa.Schema:
    """With the features that `datasets` reads from the metadata: images, class names."""
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    fields = [pa.field("image", _IMAGE)]
    if classes:
        features["label"] = {"names": list(classes), "_type": "ClassLabel"}
        fields.append(pa.field("label", pa.int64()))
    features["file_name"] = {"dtype": "string", "_type": "Value"}
    fields += [pa.field("file_name", pa.string()), pa.field(PROBLEM, pa.string())]
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def _batch(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(rows, schema=schema)
