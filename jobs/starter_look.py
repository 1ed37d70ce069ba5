"""A look at the first rows of some data: columns, their roles, and the task that suits them."""

import tempfile
from collections.abc import Collection, Mapping
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
from curate.data.formats.csv import default_separator, other_separator
from curate.data.images import UnusableImageError, is_grey_file, size_of
from curate.data.reading import field_frame
from curate.data.sources import InputFile, find_files
from curate.data.storage import locate, open_stream, store_errors
from curate.errors import CurateError, InputError
from jobs.starter_labels import label_rows
from jobs.starter_roles import (
    DOMAIN_NAMES,
    LABEL_NAMES,
    num_classes,
    refused_labels,
    roles_of,
    row_numbers,
)

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
    labels: pa.Table
    """The columns that may be the label, over as many rows as were looked at."""
    has_all_labels: bool
    """Whether these are all rows there are."""


def look_at(data: str, name: str, *, label: str | None = None) -> Look:
    """Find the files of `data` and read the first rows.

    Args:
        data: file, folder, glob or address.
        name: of the source.
        label: the label column, where the user names it.

    Raises:
        InputError: nothing is there, or it cannot be read.
    """
    source = Source(path=data)
    found = find_files(name, source)
    rows, has_all = first_rows(found[0], source)
    if found[0].format == "csv":
        source, rows, has_all = _separated(found[0], source, rows, has_all)
    if not rows.num_columns:
        raise InputError(f"{found[0].file} holds no rows", fix="choose other data")
    names = LABEL_NAMES if label is None else (label,)
    labels = label_rows(found, source, rows, names, has_all=has_all)
    schema = pa.schema([field for field in rows.schema if field.name != PROBLEM])
    try:
        resolved = resolve_columns(source, schema, where=found[0].file)
        return Look(found, rows, resolved, "", *labels)
    except CurateError as error:
        roles = roles_of(rows, labels[0], names)
        others = {*_flat(roles), *DOMAIN_NAMES, *row_numbers(rows)}
        if "label" not in roles:  # what is meant as one is no feature
            others |= refused_labels(rows, labels[0], ()).keys()
        only = _only_candidate(source, schema, others)
        return Look(found, rows, only or source, "" if only else error.what, *labels)


def with_roles(look: Look) -> Look:
    """The look with label, classes, id and domain, as far as the rows show them."""
    names = look.labels.column_names
    if not is_classifiable(look.source):
        names = [name for name in names if name not in DOMAIN_NAMES]
    roles = roles_of(look.rows, look.labels, names)
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


def is_classifiable(source: Source) -> bool:
    """Whether its content is of a kind that there is a classification of."""
    return not {"text", "features", "image"}.isdisjoint(source.content_columns)


def seen_classes(look: Look) -> int | None:
    """Number of classes that the label column seems to have, or None."""
    label = look.source.label
    if label is None:
        return None
    rows = look.labels if label in look.labels.column_names else look.rows
    return len(look.source.classes) or num_classes(rows.column(label))


def suitable_task(look: Look, classes: int | None) -> dict[str, Any]:
    """Settings of the task that the columns suit."""
    content = look.source.content_columns
    if "features" in content:
        return {"kind": "tabular-classification", "num_classes": classes or 2}
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


def _separated(
    file: InputFile, source: Source, rows: pa.Table, has_all: bool
) -> tuple[Source, pa.Table, bool]:
    """The separator of a CSV file whose columns seem to be one, if most rows bear it out."""
    sign = other_separator([name for name in rows.column_names if name != PROBLEM])
    if sign is not None:
        other = replace(source, separator=sign)
        parted, has_all_parted = first_rows(file, other)
        if parted.column(PROBLEM).null_count > parted.num_rows // 2:
            return other, parted, has_all_parted
        source = replace(source, separator=default_separator(file.address))
    return source, rows, has_all


def first_rows(file: InputFile, source: Source) -> tuple[pa.Table, bool]:
    """Some rows from the start of a file, whatever its size, and whether these are all.

    A CSV file is not refused for its separator.
    """
    if file.format == "parquet":
        system, path = locate(file.address)
        with store_errors(file.address), system.open(path, "rb") as raw:
            stored = pq.ParquetFile(raw)
            batch = next(stored.iter_batches(batch_size=_SAMPLE_ROWS), None)
            table = stored.schema_arrow.empty_table() if batch is None else pa.table(batch)
            return table, table.num_rows == stored.metadata.num_rows
    if file.format == "csv" and source.separator is None:
        source = replace(source, separator=default_separator(file.address))
    has_all = True
    with ExitStack() as stack:
        if file.format in ("jsonl", "csv", "text"):
            # These readers go through a file more than once; the first mebibyte is enough.
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            address, has_all = _head(file, folder)
            file = replace(file, address=str(address))
        reader = resolve(READERS, file.format, what="format")
        batches: list[pa.RecordBatch] = []
        stream = iter(reader(file, source))
        for batch in stream:
            batches.append(batch)
            rows, size = sum(b.num_rows for b in batches), sum(b.nbytes for b in batches)
            if rows >= _SAMPLE_ROWS or size >= _ENOUGH_BYTES:
                has_all = has_all and next(stream, None) is None
                break
    return (pa.Table.from_batches(batches) if batches else pa.table({})), has_all


def _head(file: InputFile, folder: Path) -> tuple[Path, bool]:
    """The first lines of a text file, uncompressed, and whether these are all."""
    with open_stream(file.address) as stream:
        start = stream.read(_SAMPLE_BYTES)
        has_all = len(start) < _SAMPLE_BYTES
    if not has_all:
        start = start[: start.rfind(b"\n") + 1] or start
    path = folder / "head"
    path.write_bytes(start)
    return path, has_all


def _flat(roles: Mapping[str, Any]) -> list[str]:
    """The columns among the roles."""
    return [name for role, name in roles.items() if role != "classes"]


def _only_candidate(source: Source, schema: pa.Schema, others: Collection[str]) -> Source | None:
    """The source with its one text column, or where there is none, with its number columns.

    Args:
        source: its settings.
        schema: of the columns.
        others: names of columns that are something else.
    """
    is_text = (pa.types.is_string, pa.types.is_large_string)
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
