"""Groups inside which examples compete, and the training rows of a partition as arrays.

Shapes: N training rows of a partition, G groups.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import polars as pl
import xxhash
from numpy.typing import NDArray

from curate.data.example import TRAIN
from curate.plan.expression import Values
from curate.plan.positions import Bits, file_hash, mixed_bits, row_hashes

INDEX = ("source", "file", "row", "domain", "label", "split", "num_chars", "num_tokens")
"""Columns that every frame has which the planner reads."""

PLACE = "draw:place"
"""Column of a draw for diversity: the place of a row in its group's order from 0, or
`NOT_REACHED`, or `NO_CANDIDATE`; null without a vector."""

NOT_REACHED, NO_CANDIDATE = -1, -2

NO_LABEL = "none"
"""Group of the rows without a label, where the groups are labels."""


@dataclass(frozen=True, slots=True)
class Tables:
    """What the planner reads: partition by partition, as often as it asks."""

    scorers: Mapping[str, Sequence[str]]
    """Scorer -> its columns."""
    frames: Callable[[Sequence[str]], Iterable[pl.DataFrame]]
    """Names of score columns, as `scorer.column` -> one frame for each partition, in canonical
    order, with the columns of `INDEX` and those."""


class Cell(NamedTuple):
    """The finest groups."""

    source: str
    domain: str
    label: str


class Group(NamedTuple):
    """Where examples compete: within a domain, a label or a source of it, or everywhere."""

    domain: str
    """Empty where the group is not inside one domain."""
    value: str
    """The label or the source; empty where the group is a whole domain, or everything."""

    def __str__(self) -> str:
        return " / ".join(part for part in self if part) or "all"


@dataclass(frozen=True, slots=True)
class Grouping:
    """What makes a group."""

    within: str
    """domain, label, source or all."""
    by_domain: bool
    """Whether groups lie inside domains all the same, since a mixture gives each its share."""

    def group(self, cell: Cell) -> Group:
        domain = cell.domain if self.by_domain or self.within == "domain" else ""
        value = {"label": cell.label, "source": cell.source}.get(self.within, "")
        return Group(domain, value)


@dataclass(slots=True)
class Cells:
    """All cells met so far, in order of appearance, and their sizes once surveyed."""

    with_labels: bool
    """Whether labels tell cells apart."""
    cells: list[Cell] = field(default_factory=list[Cell])
    _codes: dict[Cell, int] = field(default_factory=dict[Cell, int])

    def codes(self, frame: pl.DataFrame) -> NDArray[np.int64]:
        """(N,) index of each row's cell; new cells are added."""
        label = pl.col("label").cast(pl.String).fill_null(NO_LABEL)
        keys = frame.select(
            "source", "domain", label if self.with_labels else pl.lit("").alias("label")
        )
        present = keys.unique(maintain_order=True)
        codes = [self._code(Cell(*row)) for row in present.iter_rows()]
        if len(codes) == 1:
            return np.full(frame.height, codes[0], np.int64)
        numbered = present.with_columns(code=pl.Series(codes, dtype=pl.Int64))
        joined = keys.join(numbered, on=keys.columns, how="left", maintain_order="left")
        return joined["code"].to_numpy()

    def _code(self, cell: Cell) -> int:
        if cell not in self._codes:
            self._codes[cell] = len(self.cells)
            self.cells.append(cell)
        return self._codes[cell]


@dataclass(frozen=True, slots=True)
class Batch:
    """The training rows of a partition."""

    frame: pl.DataFrame
    cells: Cells
    cell: NDArray[np.int64]
    """(N,) index into `cells`."""
    tokens: NDArray[np.int64]
    """(N,)"""
    base: Bits
    """(N,) hash of (seed, source, file, row)."""

    def hashes(self, label: str) -> Bits:
        """(N,) draws of the plan called `label`, independent of those of other labels."""
        return mixed_bits(self.base ^ np.uint64(xxhash.xxh3_64_intdigest(label.encode())))

    def take(self, rows: NDArray[np.bool_]) -> "Batch":
        """The rows for which `rows` (N,) is True."""
        frame = self.frame.filter(pl.Series(rows))
        return Batch(frame, self.cells, self.cell[rows], self.tokens[rows], self.base[rows])

    def column(self, name: str) -> Values:
        """(N,) a score or an index column; NaN where a row has no value."""
        return self.frame[name].cast(pl.Float64).fill_null(float("nan")).to_numpy()


def batch_of(frame: pl.DataFrame, cells: Cells, *, seed: int) -> Batch:
    """The training rows of a frame, held-out rows left out."""
    training = frame.filter(pl.col("split") == TRAIN)
    base = np.empty(training.height, np.uint64)
    files = training.select("source", "file").unique(maintain_order=True)
    for source, file in files.iter_rows():
        start = file_hash(source, file, seed=seed)
        if files.height == 1:
            base[:] = row_hashes(start, training["row"].to_numpy())
            continue
        own = ((training["source"] == source) & (training["file"] == file)).to_numpy()
        base[own] = row_hashes(start, training["row"].to_numpy()[own])
    tokens = training["num_tokens"].to_numpy()
    return Batch(training, cells, cells.codes(training), tokens, base)


class Groups:
    """The groups met so far, in order of appearance."""

    def __init__(self, grouping: Grouping, groups: Sequence[Group] = ()) -> None:
        self.grouping = grouping
        self.groups: list[Group] = list(groups)
        self._codes = {group: code for code, group in enumerate(groups)}

    def __len__(self) -> int:
        return len(self.groups)

    def of(self, batch: Batch) -> NDArray[np.int64]:
        """(N,) index of each row's group; new groups are added."""
        table = np.full(len(batch.cells.cells), -1, np.int64)
        for cell in np.flatnonzero(np.bincount(batch.cell, minlength=len(table))).tolist():
            table[cell] = self._code(batch.cells.cells[cell])
        return table[batch.cell]

    def _code(self, cell: Cell) -> int:
        group = self.grouping.group(cell)
        if group not in self._codes:
            self._codes[group] = len(self.groups)
            self.groups.append(group)
        return self._codes[group]
