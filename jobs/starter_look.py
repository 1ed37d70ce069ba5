"""A look at the first rows of some data: columns, their roles, and the task that suits them."""

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from curate.config import resolve
from curate.data.columns import PROBLEM, resolve_columns
from curate.data.example import Source
from curate.data.formats import READERS
from curate.data.images import UnusableImageError, is_grey_file, size_of
from curate.data.reading import field_frame
from curate.data.sources import InputFile, find_files
from curate.data.storage import locate, open_stream, store_errors
from curate.errors import CurateError, InputError
from jobs.starter_roles import num_classes, roles_of

_SAMPLE_ROWS = 2000
_SAMPLE_BYTES = 1 << 20
_ENOUGH_BYTES = 32 << 20
_LARGE_EDGE = 64


@dataclass(frozen=True, slots=True)
class Look:
    """What a look at the first rows of some data shows."""

    files: list[InputFile]
    rows: pa.Table
    """Of the first file."""
    source: Source
    """With the content and label columns that were recognised, if any."""
    trouble: str
    """Why the content column is not clear, or "" where it is."""


def look_at(data: str, name: str) -> Look:
    """Find the files of `data` and read the first rows.

    Raises:
        InputError: nothing is there, or it cannot be read.
    """
    source = Source(path=data)
    found = find_files(name, source)
    rows = _first_rows(found[0], source)
    schema = pa.schema([field for field in rows.schema if field.name != PROBLEM])
    try:
        return Look(found, rows, resolve_columns(source, schema, where=found[0].file), "")
    except CurateError as error:
        only = _only_candidate(source, schema, roles_of(rows))
        return Look(found, rows, only or source, "" if only else error.what)


def with_roles(look: Look) -> Look:
    """The look with label, classes, id and domain, as far as the rows show them."""
    roles = roles_of(look.rows)
    used = {column for group in look.source.content_columns.values() for column in group}
    mine = {role: name for role, name in roles.items() if role == "classes" or name not in used}
    has_label = "label" in mine
    source = replace(
        look.source,
        label=mine["label"] if has_label else None,
        classes=tuple(mine.get("classes", ())) if has_label else (),
        domain=mine.get("domain"),
        id=mine.get("id"),
    )
    return replace(look, source=source)


def seen_classes(look: Look) -> int | None:
    """Number of classes that the label column seems to have, or None."""
    label = look.source.label
    if label is None:
        return None
    return len(look.source.classes) or num_classes(look.rows.column(label))


def suitable_task(look: Look, classes: int | None) -> dict[str, Any]:
    """Settings of the task that the columns suit."""
    content = look.source.content_columns
    if classes is not None and "features" in content:
        return {"kind": "tabular-classification", "num_classes": classes}
    if classes is not None and "text" in content:
        return {"kind": "text-classification", "num_classes": classes, "max_tokens": 128}
    if "image" in content:
        return {"kind": "image-classification", "num_classes": classes or 2, **_image_task(look)}
    if "chosen" in content:
        return {"kind": "preference", "max_tokens": 1024}
    return {"kind": "causal-lm", "max_tokens": 512}


def _image_task(look: Look) -> dict[str, Any]:
    """Size and channels that suit the images of the first rows."""
    images = field_frame(look.rows.slice(0, 64), look.source)["image"].drop_nulls()
    if images.dtype != pl.Binary:
        height, width, channels = images.dtype.shape  # pyright: ignore[reportAttributeAccessIssue]
        return {"channels": channels, **({} if height == width else {"size": height})}
    sizes: set[tuple[int, int]] = set()
    is_grey = True
    for content in images:
        with suppress(UnusableImageError):
            sizes.add(size_of(content))
            is_grey = is_grey and is_grey_file(content)
    edge = min((min(size) for size in sizes), default=_LARGE_EDGE)
    same = len(sizes) == 1 and edge <= _LARGE_EDGE
    size = {} if same else {"size": min(edge, _LARGE_EDGE)}
    return {"channels": 1 if is_grey and sizes else 3, **size}


def _first_rows(file: InputFile, source: Source) -> pa.Table:
    """Some rows from the start of a file, whatever its size."""
    if file.format == "parquet":
        system, path = locate(file.address)
        with store_errors(file.address), system.open(path, "rb") as raw:
            stored = pq.ParquetFile(raw)
            batch = next(stored.iter_batches(batch_size=_SAMPLE_ROWS), None)
            return stored.schema_arrow.empty_table() if batch is None else pa.table(batch)
    with ExitStack() as stack:
        if file.format in ("jsonl", "csv", "text"):
            # These readers go through a file more than once; the first mebibyte is enough.
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            file = replace(file, address=str(_head(file, folder)))
        reader = resolve(READERS, file.format, what="format")
        batches: list[pa.RecordBatch] = []
        for batch in reader(file, source):
            batches.append(batch)
            rows, size = sum(b.num_rows for b in batches), sum(b.nbytes for b in batches)
            if rows >= _SAMPLE_ROWS or size >= _ENOUGH_BYTES:
                break
    if not batches:
        raise InputError(f"{file.file} holds no rows", fix="choose other data")
    return pa.Table.from_batches(batches)


def _head(file: InputFile, folder: Path) -> Path:
    """The first lines of a text file, uncompressed."""
    with open_stream(file.address) as stream:
        start = stream.read(_SAMPLE_BYTES)
    if len(start) == _SAMPLE_BYTES:
        start = start[: start.rfind(b"\n") + 1] or start
    path = folder / "head"
    path.write_bytes(start)
    return path


def _flat(roles: Mapping[str, Any]) -> list[str]:
    """The columns among the roles."""
    return [name for role, name in roles.items() if role != "classes"]


def _only_candidate(source: Source, schema: pa.Schema, roles: Mapping[str, Any]) -> Source | None:
    """The source with its one text column, or where there is none, with its number columns."""
    is_text = (pa.types.is_string, pa.types.is_large_string)
    others = set(_flat(roles))
    texts = [
        field.name
        for field in schema
        if field.name not in others and any(test(field.type) for test in is_text)
    ]
    if len(texts) == 1:
        return replace(source, text=texts[0])
    kinds = {field.name: field.type for field in schema}
    has_label = "label" in kinds and pa.types.is_integer(kinds["label"])
    numbers = [
        name
        for name, kind in kinds.items()
        if (pa.types.is_integer(kind) or pa.types.is_floating(kind))
        and name != "label"
        and name not in others
    ]
    if texts or not numbers:
        return None
    # Names such as pixel_0, pixel_1 ... are shorter as a glob.
    stems = {name.rstrip("0123456789") for name in numbers}
    stem = stems.pop()
    names = (f"{stem}*",) if stem and not stems and len(numbers) > 4 else tuple(numbers)
    return replace(source, features=names, label="label" if has_label else None)
