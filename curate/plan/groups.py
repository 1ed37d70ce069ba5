"""Groups inside which examples compete, and the training rows of a partition as arrays.

Shapes: N training rows of a partition, G groups.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
        """(N,) index of each row's cell; new cells are added in order of appearance."""
        if not frame.height:
            return np.zeros(0, np.int64)
        columns = [frame["source"], frame["domain"]]
        if self.with_labels:
            columns.append(frame["label"].cast(pl.String).fill_null(NO_LABEL))
        factors = [_factor(column) for column in columns]
        joint, present = _joined(factors)
        codes = [self._code(Cell(*row, *([] if self.with_labels else [""]))) for row in present]
        return np.array(codes, np.int64)[joint]

    def _code(self, cell: Cell) -> int:
        if cell not in self._codes:
            self._codes[cell] = len(self.cells)
            self.cells.append(cell)
        return self._codes[cell]


class _Factor(NamedTuple):
    """A column as numbers."""

    codes: NDArray[np.int64]
    """(N,) index into `values`."""
    values: list[str]
    """In order of appearance."""


def _factor(column: pl.Series) -> _Factor:
    if _is_constant(column):
        return _Factor(np.zeros(len(column), np.int64), [column[0]])
    values = column.unique(maintain_order=True)
    codes = column.cast(pl.Enum(values)).to_physical().to_numpy().astype(np.int64)
    return _Factor(codes, values.to_list())


def _joined(factors: Sequence[_Factor]) -> tuple[NDArray[np.int64], list[list[str]]]:
    """(N,) numbers of the different combinations, and these, in order of appearance."""
    sizes = [len(factor.values) for factor in factors]
    widest = factors[int(np.argmax(sizes))]
    if sum(size > 1 for size in sizes) <= 1:
        places = range(len(widest.values))
        rows = [[f.values[min(at, len(f.values) - 1)] for f in factors] for at in places]
        return widest.codes, rows
    joint = factors[0].codes
    for factor in factors[1:]:
        joint = joint * len(factor.values) + factor.codes
    _, first, codes = np.unique(joint, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rows = [[f.values[int(f.codes[at])] for f in factors] for at in first[order].tolist()]
    return np.argsort(order)[codes], rows


def _is_constant(column: pl.Series) -> bool:
    """Whether all rows, of which there is one, have one value; cheaper than to look for others."""
    return bool((column == column[0]).all())


@dataclass(frozen=True, slots=True)
class Batch:
    """The training rows of a partition."""

    cells: Cells
    cell: NDArray[np.int64]
    """(N,) index into `cells`."""
    tokens: NDArray[np.int64]
    """(N,)"""
    base: Bits
    """(N,) hash of (seed, source, file, row)."""
    columns: Mapping[str, NDArray[Any]]
    """Scores and index columns; NaN where a row has no value."""
    held_out: int
    """Rows of the partition that are left out here."""

    def hashes(self, label: str) -> Bits:
        """(N,) draws of the plan called `label`, independent of those of other labels."""
        return mixed_bits(self.base ^ np.uint64(xxhash.xxh3_64_intdigest(label.encode())))

    def take(self, rows: NDArray[np.bool_]) -> "Batch":
        """The rows for which `rows` (N,) is True."""
        columns = {name: values[rows] for name, values in self.columns.items()}
        return Batch(
            self.cells, self.cell[rows], self.tokens[rows], self.base[rows], columns, self.held_out
        )

    def column(self, name: str) -> Values:
        """(N,) a score or an index column; NaN where a row has no value."""
        return self.columns[name].astype(np.float64)


def batch_of(frame: pl.DataFrame, cells: Cells, *, seed: int) -> Batch:
    """The training rows of a frame, held-out rows left out."""
    training = frame
    if not (is_training := frame["split"] == TRAIN).all():
        training = frame.filter(is_training)
    columns = {
        column.name: column.to_numpy()
        for column in training
        if column.dtype.is_numeric() and column.name not in ("row", "label")
    }
    return Batch(
        cells=cells,
        cell=cells.codes(training),
        tokens=columns["num_tokens"],
        base=_base(training, seed),
        columns=columns,
        held_out=frame.height - training.height,
    )


def _base(training: pl.DataFrame, seed: int) -> Bits:
    """(N,) hashes of the keys."""
    row = training["row"].to_numpy()
    if not training.height:
        return np.zeros(0, np.uint64)
    if _is_constant(training["source"]) and _is_constant(training["file"]):
        start = file_hash(training["source"][0], training["file"][0], seed=seed)
        return row_hashes(start, row)
    base = np.empty(training.height, np.uint64)
    files = training.select("source", "file").unique(maintain_order=True)
    for source, file in files.iter_rows():
        own = ((training["source"] == source) & (training["file"] == file)).to_numpy()
        base[own] = row_hashes(file_hash(source, file, seed=seed), row[own])
    return base


def wide_enough(sums: NDArray[np.int64], columns: int) -> NDArray[np.int64]:
    """(rows, columns or more) the same sums, with zeros for what was not met before."""
    missing = columns - sums.shape[1]
    return np.pad(sums, ((0, 0), (0, missing))) if missing > 0 else sums


def add_up(
    sums: NDArray[np.int64], code: NDArray[np.int64], *amounts: NDArray[np.int64] | None
) -> None:
    """Adds the amounts of rows, each to its own row of `sums`, to the column that `code` names.

    Args:
        sums: (rows, columns) changed in place.
        code: (N,) column of each row of the batch.
        *amounts: (N,) whole numbers, 0 or more, one array for each row of `sums`; None stands for
            ones.
    """
    for row, amount in zip(sums, amounts, strict=True):
        if amount is None:
            row += np.bincount(code, minlength=len(row))
            continue
        # Summing floats is faster, and exact below 2^53.
        is_exact = int(amount.max(initial=0)) * len(amount) < 1 << 53
        if is_exact:
            row += np.bincount(code, amount, len(row)).astype(np.int64)
        else:
            np.add.at(row, code, amount)


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
            table[cell] = self.code(batch.cells.cells[cell])
        return table[batch.cell]

    def code(self, cell: Cell) -> int:
        """Index of a cell's group; a new one is added."""
        group = self.grouping.group(cell)
        if group not in self._codes:
            self._codes[group] = len(self.groups)
            self.groups.append(group)
        return self._codes[group]
