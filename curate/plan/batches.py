"""The tables that the planner reads, and their training rows, gone through as often as it takes.

The first pass reads the tables. The numbers that the planner needs of each row go to a file beside
them, which has no name and is gone with the process; all later passes read that.

Shapes: N training rows of a partition.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from curate.plan.groups import Batch, Cells, batch_of

_MEMORY_BYTES = 8 << 20
"""Up to this size the numbers stay in memory."""


@dataclass(frozen=True, slots=True)
class Tables:
    """What the planner reads: partition by partition, as often as it asks."""

    scorers: Mapping[str, Sequence[str]]
    """Scorer -> its columns."""
    frames: Callable[[Sequence[str]], Iterable[pl.DataFrame]]
    """Names of score columns, as `scorer.column` -> one frame for each partition, in canonical
    order, with the columns of `curate.plan.groups.INDEX` and those."""
    folder: Path | None = None
    """Where some 30 bytes a row may lie while a plan is made; None: in memory."""
    _read: list["Batches"] = field(default_factory=list["Batches"])

    def batches(self, columns: Sequence[str], *, with_labels: bool, seed: int) -> "Batches":
        """The training rows; read once where they are asked for again.

        Args:
            columns: names of score columns, as `scorer.column`.
            with_labels: whether labels tell cells apart.
            seed: of the rows' hashes.
        """
        for known in self._read:
            if known.cells.with_labels == with_labels and known.has(columns, seed):
                return known
        self._read[:] = [Batches(self, columns, Cells(with_labels), seed)]
        return self._read[0]


class _Stored(NamedTuple):
    """Where the numbers of a batch lie."""

    start: int
    num_rows: int
    held_out: int
    types: dict[str, np.dtype[Any]]


class Batches:
    """Iterates over the batches of all partitions, each time from the start."""

    def __init__(self, tables: Tables, columns: Sequence[str], cells: Cells, seed: int) -> None:
        self.cells = cells
        self._tables, self._columns, self._seed = tables, columns, seed
        self._stored: list[_Stored] = []
        self._is_whole = False
        # It lives as long as this object does.
        folder = None if tables.folder is None else str(tables.folder)
        most = 0 if folder is None else _MEMORY_BYTES  # 0 is no limit
        self._file = tempfile.SpooledTemporaryFile(most, dir=folder)  # noqa: SIM115

    def __del__(self) -> None:
        self._file.close()

    def has(self, columns: Sequence[str], seed: int) -> bool:
        """Whether it holds these columns of scores, and hashes of this seed."""
        return seed == self._seed and set(columns) <= set(self._columns)

    def __iter__(self) -> Iterator[Batch]:
        if self._is_whole:
            yield from (self._load(entry) for entry in self._stored)
            return
        self._stored = []
        self._file.seek(0)
        for frame in self._tables.frames(self._columns):
            batch = batch_of(frame, self.cells, seed=self._seed)
            self._store(batch)
            yield batch
        self._is_whole = True

    def _store(self, batch: Batch) -> None:
        arrays = {"": batch.base, **batch.columns, "cell": batch.cell.astype(np.int32)}
        types = {name: array.dtype for name, array in arrays.items()}
        entry = _Stored(self._file.tell(), len(batch.base), batch.held_out, types)
        self._stored.append(entry)
        for array in arrays.values():
            self._file.write(array.tobytes())

    def _load(self, entry: _Stored) -> Batch:
        size = sum(kind.itemsize for kind in entry.types.values()) * entry.num_rows
        self._file.seek(entry.start)
        content = self._file.read(size)
        arrays: dict[str, np.ndarray] = {}
        at = 0
        for name, kind in entry.types.items():
            arrays[name] = np.frombuffer(content, kind, entry.num_rows, at)
            at += kind.itemsize * entry.num_rows
        base, cell = arrays.pop(""), arrays.pop("cell").astype(np.int64)
        return Batch(self.cells, cell, arrays["num_tokens"], base, arrays, entry.held_out)
