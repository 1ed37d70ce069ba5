"""Reading inputs again: the rows of a partition as they are stored, or as fields of examples."""

import json
import os
from collections import OrderedDict
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from curate.config import nearest
from curate.data.columns import PROBLEM, Turns, field_values, resolve_columns
from curate.data.example import Source
from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.data.storage import (
    is_damage,
    is_local,
    is_local_stamp,
    local_stamp,
    locate,
    remote_stamp,
    store_errors,
)
from curate.data.tables import read_examples
from curate.errors import InputError

_OPEN_FILES = 4
_BUFFER_BYTES = 1 << 20
_CURSOR_ROWS = 4096


@dataclass(slots=True)
class _Cursor:
    """A place in a large row group, so that its partitions, read in order, decode it once."""

    columns: list[str]
    group: int
    batches: Iterator[pa.RecordBatch]
    batch: pa.RecordBatch | None = None
    first: int = 0
    """Position of `batch` in the row group."""

    def take(self, local: np.ndarray) -> list[pa.RecordBatch]:
        """Rows at sorted positions, none before those of earlier calls' last batch."""
        found: list[pa.RecordBatch] = []
        while len(local):
            batch = next(self.batches) if self.batch is None else self.batch
            self.batch = batch
            end = self.first + batch.num_rows
            here, local = np.split(local, [int(np.searchsorted(local, end))])
            if len(here):
                found.append(_pick(batch, here - self.first))
            if len(local):
                self.first, self.batch = end, None
        return found


@dataclass(slots=True)
class StoredFile:
    """An open Parquet file."""

    address: str
    handle: Any
    parquet: pq.ParquetFile
    starts: np.ndarray
    """Number of each row group's first row, and of the row after the last."""
    cursor: _Cursor | None = None

    @property
    def schema(self) -> pa.Schema:
        """Columns and metadata of the input, what the conversion added left out."""
        schema = self.parquet.schema_arrow
        at = schema.get_field_index(PROBLEM)
        return schema if at < 0 else schema.remove(at)

    def close(self) -> None:
        self.parquet.close(force=True)
        self.handle.close()


def resolve_address(run: RunFolder, address: str) -> str:
    """Where a partition's file is: an address, or the absolute path of a converted input."""
    if is_local(address) and not Path(address).is_absolute():
        return str(run.root.absolute() / address)
    return address


def open_stored(address: str, stamp: str, *, buffer_bytes: int = 0) -> StoredFile:
    """Open a Parquet file anywhere.

    Args:
        address: path or address in a store.
        stamp: what it is expected to be.
        buffer_bytes: read column chunks of local files by so much at a time, for those who
            read batches of a large row group; 0 reads each of them whole.

    Raises:
        InputError: it is missing, cannot be reached, or is no longer what the stamp says.
        pa.ArrowException, OSError: it is damaged, see `curate.data.storage.is_damage`.
    """
    with store_errors(address):
        if is_local(address):
            if is_local_stamp(stamp) and local_stamp(Path(address)) != stamp:
                raise _changed(address)
            handle = Path(address).open("rb")  # noqa: SIM115 - stays open in the cache
        else:
            system, path = locate(address)
            if remote_stamp(system.info(path)) != stamp:
                system.invalidate_cache()
                if remote_stamp(system.info(path)) != stamp:
                    raise _changed(address)
            handle = system.open(path, "rb", cache_type="readahead")
        try:
            parquet = pq.ParquetFile(
                handle,
                buffer_size=buffer_bytes if is_local(address) else 0,
                pre_buffer=not is_local(address),
                page_checksum_verification=True,
            )
        except BaseException:
            handle.close()
            raise
    groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
    starts = np.concatenate([[0], np.cumsum(groups, dtype=np.int64)])
    return StoredFile(address, handle, parquet, starts)


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
            return _take_rows(file, part, names, rows)


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
            return _take_rows(file, part, names, None), resolved


def read_fields(run: RunFolder, part: Partition, source: Source) -> pl.DataFrame:
    """The content of a partition's examples, one column a field, in the order of `examples/`.

    Returns:
        `text`; or `prompt` and `response`; or `messages`, a list of {role, content}; or
        `features`, an array of float32; and `label`, int64 or null.
    """
    examples = read_examples(run, part, ["row", "label"])
    schema = stored_schema(run, part)
    resolved = resolve_columns(source, schema, where=f"{part.source}/{part.file}")
    names = [c for group in resolved.content_columns.values() for c in group]
    table = read_rows(run, part, list(dict.fromkeys(names)), examples["row"].to_numpy())
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
            kind = pl.Array(pl.Float32, values.shape[1])
            columns.append(pl.Series(field, values, dtype=kind))
        elif isinstance(values, Turns):
            turns = pa.StructArray.from_arrays(
                [values.roles, values.contents], names=["role", "content"]
            )
            lists = pa.LargeListArray.from_arrays(pa.array(values.starts), turns)
            columns.append(pl.Series(field, lists))
        else:
            columns.append(pl.Series(field, values))
    return pl.DataFrame(columns)


def payload_schema(run: RunFolder, partitions: Iterable[Partition]) -> pa.Schema:
    """All columns of all files, each nullable; a type that holds every file's values.

    Raises:
        InputError: a column's types have nothing in common; names it and two files.
    """
    union: pa.Schema | None = None
    origin: dict[str, str] = {}
    metadata: list[dict[bytes, bytes]] = []
    seen = set[str]()
    for part in partitions:
        if part.address in seen:
            continue
        seen.add(part.address)
        schema = stored_schema(run, part)
        where = f"{part.source}/{part.file}"
        metadata.append(schema.metadata or {})
        bare = pa.schema([field.with_nullable(True) for field in schema.remove_metadata()])
        union = bare if union is None else _joined(union, bare, origin, where)
        origin.update({name: where for name in bare.names if name not in origin})
    if union is None:
        raise InputError("there are no rows to read", fix="run `curate index` first")
    return union.with_metadata(_common_metadata(metadata))


@contextmanager
def readable(address: str) -> Generator[None]:
    """Turns damage inside a file into an InputError that names it."""
    try:
        with store_errors(address):
            yield
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise
        raise InputError(
            f"{address} is damaged: {str(error).strip()}",
            fix="restore the file, then run `curate index` again",
        ) from error


_files: OrderedDict[tuple[str, str], StoredFile] = OrderedDict()


@contextmanager
def _cached(run: RunFolder, part: Partition) -> Generator[StoredFile]:
    """An open file; the last few stay open in the process."""
    address = resolve_address(run, part.address)
    key = (address, part.stamp)
    file = _files.pop(key, None)
    if file is None or _is_stale(file, part.stamp):
        if file is not None:
            file.close()
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


def _is_stale(file: StoredFile, stamp: str) -> bool:
    if not is_local(file.address):
        return False
    if is_local_stamp(stamp):
        with store_errors(file.address):
            return local_stamp(Path(file.address)) != stamp
    # A converted input, replaced by rename: the open handle would still read the old file.
    with store_errors(file.address):
        now, then = Path(file.address).stat(), os.fstat(file.handle.fileno())
    return (now.st_ino, now.st_dev) != (then.st_ino, then.st_dev)


def _take_rows(
    file: StoredFile, part: Partition, names: list[str], rows: np.ndarray | None
) -> pa.Table:
    first, end = part.first_row, part.first_row + part.num_rows
    if rows is None:
        wanted, back = np.arange(first, end), None
    else:
        wanted, back = np.unique(np.asarray(rows, np.int64), return_inverse=True)
        if len(wanted) and not first <= wanted[0] <= wanted[-1] < end:
            raise AssertionError(f"rows {wanted[0]} to {wanted[-1]} are not all in {part.name}")
        if np.array_equal(back, np.arange(len(back))):
            back = None
    cuts = np.searchsorted(wanted, file.starts)
    pieces = [
        _piece(file, part, group, names, wanted[low:high] - file.starts[group])
        for group, (low, high) in enumerate(pairwise(cuts.tolist()))
        if high > low
    ]
    schema = pa.schema([file.parquet.schema_arrow.field(n) for n in names],
                       file.schema.metadata)  # fmt: skip
    table = pa.concat_tables(pieces) if pieces else schema.empty_table()
    table = table.unify_dictionaries()
    return table if back is None else table.take(pa.array(back))


def _piece(
    file: StoredFile, part: Partition, group: int, names: list[str], local: np.ndarray
) -> pa.Table:
    """Rows of one row group, `local` being sorted positions in it."""
    if file.starts[group + 1] - file.starts[group] <= part.num_rows:
        table = file.parquet.read_row_group(group, columns=names, use_threads=False)
        return _pick(table.select(names), local)
    cursor = file.cursor
    if (
        cursor is None
        or (cursor.columns, cursor.group) != (names, group)
        or cursor.first > int(local[0])
    ):
        batches = file.parquet.iter_batches(
            _CURSOR_ROWS, row_groups=[group], columns=names, use_threads=False
        )
        file.cursor = cursor = _Cursor(names, group, batches)
    taken = pa.Table.from_batches(cursor.take(local))
    return taken.select(names)


def _pick(rows: Any, local: np.ndarray) -> Any:
    """Some rows of a table or a batch, by sorted positions; a run of rows is not copied."""
    first, last = int(local[0]), int(local[-1])
    if last - first + 1 == len(local):
        return rows.slice(first, len(local))
    return rows.take(pa.array(local))


def _joined(union: pa.Schema, other: pa.Schema, origin: dict[str, str], where: str) -> pa.Schema:
    for field in other:
        at = union.get_field_index(field.name)
        if at < 0:
            union = union.append(field)
            continue
        pair = [pa.schema([union.field(at)]), pa.schema([field])]
        try:
            joined = pa.unify_schemas(pair, promote_options="permissive").field(0)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise InputError(
                f"column {field.name!r} is {union.field(at).type} in {origin[field.name]}"
                f" and {field.type} in {where}",
                fix="convert one of them, so that both can stand in one table",
            ) from error
        union = union.set(at, joined)
    return union


def _common_metadata(metadata: list[dict[bytes, bytes]]) -> dict[bytes, bytes] | None:
    """Entries that all files share, and the union of what `datasets` wrote about the columns."""
    shared = {
        key: value
        for key, value in metadata[0].items()
        if all(entry.get(key) == value for entry in metadata)
    }
    features: dict[str, Any] = {}
    for entry in metadata:
        if b"huggingface" in entry:
            found = json.loads(entry[b"huggingface"]).get("info", {}).get("features", {})
            features = {**found, **features}
    if features and b"huggingface" not in shared:
        shared[b"huggingface"] = json.dumps({"info": {"features": features}}).encode()
    return shared or None


def _changed(address: str) -> InputError:
    return InputError(
        f"{address} has changed since it was indexed",
        fix="run `curate index` again; only what depends on this file is redone",
    )
