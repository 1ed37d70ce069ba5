"""A Parquet file, here or in a store: opened, checked against its stamp, read by row numbers."""

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curate.data.columns import PROBLEM
from curate.data.layout import RunFolder
from curate.data.mirror import ensure
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
from curate.errors import InputError

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
            ensure(Path(address))
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


def is_stale(file: StoredFile, stamp: str) -> bool:
    if not is_local(file.address):
        return False
    if is_local_stamp(stamp):
        with store_errors(file.address):
            return local_stamp(Path(file.address)) != stamp
    # A converted input, replaced by rename: the open handle would still read the old file.
    with store_errors(file.address):
        now, then = Path(file.address).stat(), os.fstat(file.handle.fileno())
    return (now.st_ino, now.st_dev) != (then.st_ino, then.st_dev)


def take_rows(
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


def _changed(address: str) -> InputError:
    return InputError(
        f"{address} has changed since it was indexed",
        fix="run `curate index` again; only what depends on this file is redone",
    )
