"""Reading inputs again: the rows of a partition as they are stored, or as fields of examples."""

from collections import OrderedDict
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager

import numpy as np
import polars as pl
import pyarrow as pa

from curate.config import nearest
from curate.data.columns import PROBLEM, resolve_columns
from curate.data.example import Source
from curate.data.file_names import is_glob, split_glob
from curate.data.image_values import anchored
from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.data.places import expanded
from curate.data.storage import is_local, store_errors
from curate.data.stored import (
    StoredFile,
    is_stale,
    open_stored,
    readable,
    resolve_address,
    take_rows,
)
from curate.data.tables import read_examples
from curate.data.unions import union_schema
from curate.data.values import Turns, field_values
from curate.errors import InputError

_OPEN_FILES = 4
_BUFFER_BYTES = 1 << 20


def stored_schema(run: RunFolder, part: Partition) -> pa.Schema:
    """Columns of the file that a partition is part of."""
    with _cached(run, part) as file:
        return file.schema


def read_rows(
    run: RunFolder,
    part: Partition,
    columns: Sequence[str] | None,
    rows: np.ndarray | None = None,
) -> pa.Table:
    """Rows of a partition as they are stored: all types and the schema's metadata as in the input.

    Only the row groups that hold wanted rows are read.

    Args:
        run: the run folder.
        part: the partition.
        columns: input columns, in this order; None takes all.
        rows: (n,) row numbers in the file, as in `examples.row`, in any order, repeated or not;
            None takes every row of the partition, those that were set aside included.

    Returns:
        (n,) rows in the order asked for.

    Raises:
        InputError: the file is missing, has changed, is damaged, or lacks a column.
    """
    with _cached(run, part) as file:
        names = file.schema.names if columns is None else list(columns)
        for name in names:
            if name not in file.schema.names:
                raise InputError(
                    f"{part.source}/{part.file} has no column {name!r}",
                    fix=nearest(name, file.schema.names) or "correct the column's name",
                )
        with readable(file.address):
            return take_rows(file, part, names, rows)


def read_portable(run: RunFolder, part: Partition, source: Source, rows: np.ndarray) -> pa.Table:
    """Rows with all their columns, such that they can be written to another place: `read_rows`
    with relative paths of images made absolute."""
    table = read_rows(run, part, None, rows)
    resolved = resolve_columns(source, table.schema, where=f"{part.source}/{part.file}")
    return anchored(table, resolved, _folders(run, part, resolved))


def read_used(run: RunFolder, part: Partition, source: Source) -> tuple[pa.Table, Source]:
    """Every row of a partition, in the columns that the index needs, and the resolved source.

    Raises:
        InputError: as `read_rows`, and what `resolve_columns` says of the columns.
        pa.ArrowException, OSError: the file is damaged.
    """
    with _cached(run, part) as file:
        resolved = resolve_columns(source, file.schema, where=f"{part.source}/{part.file}")
        names = list(resolved.columns)
        if PROBLEM in file.parquet.schema_arrow.names:
            names.append(PROBLEM)
        with store_errors(file.address):
            table = take_rows(file, part, names, None)
    return anchored(table, resolved, _folders(run, part, resolved)), resolved


def read_fields(
    run: RunFolder, part: Partition, source: Source, places: Sequence[int] | None = None
) -> pl.DataFrame:
    """The content of a partition's examples, one column a field, in the order of `examples/`.

    Args:
        run: the run folder.
        part: the partition.
        source: as in the settings.
        places: only of the examples at these places of the partition's tables, in this order.

    Returns:
        `text`; or `prompt` and `response`; or `messages`, a list of {role, content}; or `chosen`
        and `rejected`, with or without `prompt`, texts or messages; or `features`, an array of
        float32; or `image`, the bytes of image files, or arrays (H, W, C) of uint8 or float32; and
        `label`, int64 or null.
    """
    examples = read_examples(run, part, ["row", "label"])
    examples = examples if places is None else examples[list(places)]
    schema = stored_schema(run, part)
    resolved = resolve_columns(source, schema, where=f"{part.source}/{part.file}")
    names = [c for group in resolved.content_columns.values() for c in group]
    table = read_rows(run, part, list(dict.fromkeys(names)), examples["row"].to_numpy())
    table = anchored(table, resolved, _folders(run, part, resolved))
    return field_frame(table, resolved).hstack([examples["label"]])


def field_frame(table: pa.Table, source: Source) -> pl.DataFrame:
    """The content of rows that are at hand, one column a field; see `read_fields`.

    Args:
        table: rows without problems.
        source: resolved by `curate.data.columns.resolve_columns`.
    """
    columns: list[pl.Series] = []
    for field, values in field_values(table, source, {}).items():
        if isinstance(values, np.ndarray):
            inner = pl.UInt8 if values.dtype == np.uint8 else pl.Float32
            columns.append(pl.Series(field, values, dtype=pl.Array(inner, values.shape[1:])))
        elif isinstance(values, Turns):
            turns = pa.StructArray.from_arrays(
                [values.roles, values.contents], names=["role", "content"]
            )
            lists = pa.LargeListArray.from_arrays(pa.array(values.starts), turns)
            columns.append(pl.Series(field, lists))
        else:
            columns.append(pl.Series(field, values))
    return pl.DataFrame(columns)


def _folders(run: RunFolder, part: Partition, source: Source) -> list[str]:
    """Where a relative path in a file may start: at the file, or at the place its source names."""
    own = resolve_address(run, part.address)
    if source.image is None:
        return []
    if own == part.address:
        return [own.rpartition("/")[0]]
    # A converted input: its copy lies in the run folder.
    paths = [source.path] if isinstance(source.path, str) else list(source.path)
    inner = part.file.rpartition("/")[0]
    places: list[str] = []
    for path in paths:
        fixed = split_glob(path)[0] if is_glob(path) else path
        root = fixed if is_local(fixed) and expanded(fixed).is_dir() else fixed.rpartition("/")[0]
        root = str(expanded(root)) if is_local(root) else root
        places += [f"{root}/{inner}" if inner else root, root]
    return list(dict.fromkeys(places))


def payload_schema(run: RunFolder, partitions: Iterable[Partition]) -> pa.Schema:
    """All columns of all files, each nullable; a type that holds every file's values.

    Raises:
        InputError: a column's types have nothing in common; names it and two files.
    """
    seen: dict[str, tuple[str, pa.Schema]] = {}
    for part in partitions:
        if part.address not in seen:
            where = f"{part.source}/{part.file}"
            seen[part.address] = where, stored_schema(run, part)
    union = union_schema(seen.values())
    if union is None:
        raise InputError("there are no rows to read", fix="run `curate index` first")
    return union


_files: OrderedDict[tuple[str, str], StoredFile] = OrderedDict()


@contextmanager
def _cached(run: RunFolder, part: Partition) -> Generator[StoredFile]:
    """An open file; the last few stay open in the process."""
    address = resolve_address(run, part.address)
    key = (address, part.stamp)
    file = _files.pop(key, None)
    if file is not None and _is_gone(file, part.stamp):
        file = None
    if file is None:
        file = open_stored(address, part.stamp, buffer_bytes=_BUFFER_BYTES)
    while len(_files) >= _OPEN_FILES:
        _files.popitem(last=False)[1].close()
    _files[key] = file
    try:
        yield file
    except BaseException:
        # A failed read may leave the handle anywhere.
        if _files.pop(key, None) is not None:
            file.close()
        raise


def _is_gone(file: StoredFile, stamp: str) -> bool:
    """Whether another file stands in its place, or none; it is closed then."""
    gone = True
    try:
        gone = is_stale(file, stamp)
    finally:
        if gone:
            file.close()
    return gone
