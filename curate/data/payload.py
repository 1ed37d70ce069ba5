"""Rows of the original files, read in order and in bounded memory.

`curate.data.reading` answers for one partition. Here the files of many consecutive partitions are
read once from front to back: a row group of gigabytes is decoded once, a batch at a time, and not
once for every partition that lies in it.
"""

from collections.abc import Generator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.data.reading import StoredFile, open_stored, readable, resolve_address
from curate.data.shard_columns import without_views
from curate.errors import InputError

_READ_BYTES = 1 << 20


class Payload:
    """Reads stretches of rows; fastest when they come in the order of the files.

    Use as a context manager: it keeps the last file open.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._reader: _Reader | None = None

    def __enter__(self) -> "Payload":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def batches(
        self, part: Partition, rows: npt.NDArray[np.int64], *, batch_rows: int
    ) -> list[tuple[int, pa.RecordBatch]]:
        """Stretches of the file that hold the rows with these numbers.

        They are not cut down to the rows: who deals rows out to several places takes them from
        here at once.

        Args:
            part: says which file.
            rows: (n,) numbers of the rows in the file, rising, at least one.
            batch_rows: how many rows are decoded at a time.

        Returns:
            For each stretch, in order, the number of its first row, and its rows with all columns
            of the file.

        Raises:
            InputError: the file is gone, has changed since it was indexed, or is damaged.
        """
        address = resolve_address(self._run, part.address)
        with readable(address):
            if self._reader is None or self._reader.file.address != address:
                self._close()
                self._reader = _Reader(open_stored(address, part.stamp, buffer_bytes=_READ_BYTES))
            return self._reader.batches(rows, batch_rows)

    def _close(self) -> None:
        if self._reader is not None:
            self._reader.file.close()
            self._reader = None


class _Reader:
    """One Parquet file and the batch that was read last."""

    def __init__(self, file: StoredFile) -> None:
        self.file = file
        self._group = -1
        self._batches: Generator[pa.RecordBatch] | None = None
        self._batch: pa.RecordBatch | None = None
        self._start = 0

    def batches(
        self, rows: npt.NDArray[np.int64], batch_rows: int
    ) -> list[tuple[int, pa.RecordBatch]]:
        if rows[-1] >= self.file.starts[-1]:
            raise InputError(
                f"{self.file.address} has {self.file.starts[-1]} rows, row {rows[-1]} was indexed",
                fix="run `curate index` again",
            )
        found: list[tuple[int, pa.RecordBatch]] = []
        at = 0
        while at < len(rows):
            batch = self._batch_with(int(rows[at]), batch_rows)
            found.append((self._start, batch))
            at = int(np.searchsorted(rows, self._start + batch.num_rows))
        return found

    def _batch_with(self, row: int, batch_rows: int) -> pa.RecordBatch:
        """The batch in which a row lies; earlier ones are let go."""
        group = int(np.searchsorted(self.file.starts, row, side="right")) - 1
        if group != self._group or row < self._start:
            self._group, self._batch = group, None
            self._start = int(self.file.starts[group])
            self._batches = self.file.parquet.iter_batches(
                batch_size=batch_rows, row_groups=[group]
            )
        assert self._batches is not None
        while self._batch is None or row >= self._start + self._batch.num_rows:
            if self._batch is not None:
                self._start += self._batch.num_rows
                self._batch = None
            batch = next(self._batches)
            plain = without_views(batch.schema)
            self._batch = batch if plain.equals(batch.schema) else batch.cast(plain)
        return self._batch
