"""Scores of rows by an expression, its ranks and z-scores taken over all rows of a group first.

Shapes: N training rows of a partition, G groups, M values that a rank was taken over.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from curate.plan.expression import Expression, Statistic, Values, evaluate
from curate.plan.groups import Batch, Group, Grouping, Groups

T = TypeVar("T")

Passes = Generator[Callable[[Batch], None], None, T]
"""A computation that needs the data several times: it yields a function, which is then called with
every batch in canonical order, and goes on. Several of them share their passes."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Sorted values by group; the only thing that grows with the data: 4 bytes a row."""

    values: NDArray[np.float32]
    """(M,) groups one after another, ascending within each."""
    ends: tuple[int, ...]
    """(G,) where each group ends."""

    def of(self, values: Values, group: NDArray[np.int64]) -> Values:
        """(N,) mid-ranks as shares: 0 for the lowest of a group, 1 for the highest, ties alike."""
        found = np.full(len(values), np.nan)
        narrow = _narrow(values)
        for code in np.unique(group).tolist():
            own = self.values[self.ends[code - 1] if code else 0 : self.ends[code]]
            rows = np.flatnonzero((group == code) & np.isfinite(narrow))
            low = np.searchsorted(own, narrow[rows], "left")
            high = np.searchsorted(own, narrow[rows], "right")
            middle = (low + high - 1) / 2
            found[rows] = middle / (len(own) - 1) if len(own) > 1 else 0.5
        return found


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and standard deviation by group."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def of(self, values: Values, group: NDArray[np.int64]) -> Values:
        """(N,) z-scores; 0 in groups without spread."""
        mean, deviation = np.array(self.mean)[group], np.array(self.deviation)[group]
        found = np.where(np.isfinite(values), 0.0, np.nan)
        return np.divide(values - mean, deviation, out=found, where=deviation > 0)


@dataclass(frozen=True, slots=True)
class Scoring:
    """How every row gets its score."""

    expression: Expression
    grouping: Grouping
    groups: tuple[Group, ...] = ()
    tables: dict[Statistic, Ranks | Moments] = field(
        default_factory=dict[Statistic, Ranks | Moments]
    )

    def values(self, batch: Batch) -> Values:
        """(N,) finite scores; NaN where a row is unscored."""
        group = Groups(self.grouping, self.groups).of(batch) if self.tables else None
        known = len(self.groups)

        def statistic(node: Statistic, values: Values) -> Values:
            assert group is not None
            # A group whose rows have all been dropped was never met.
            found = self.tables[node].of(values, np.minimum(group, known - 1))
            return np.where(group < known, found, np.nan)

        values = evaluate(self.expression.root, batch.column, statistic)
        return np.where(np.isfinite(values), values, np.nan)

    def holds(self, batch: Batch) -> NDArray[np.bool_]:
        """(N,) where the expression, read as a condition, has a value other than 0."""
        return np.nan_to_num(self.values(batch)) != 0


def scoring_passes(expression: Expression, grouping: Grouping) -> Passes[Scoring]:
    """The scoring of an expression; no pass where it has neither ranks nor z-scores."""
    groups = Groups(grouping)
    tables: dict[Statistic, Ranks | Moments] = {}
    for level in expression.statistics:
        gathered = [_Gather(node, groups, tables) for node in level]

        def add(batch: Batch, gathered: list["_Gather"] = gathered) -> None:
            for each in gathered:
                each.add(batch)

        yield add
        tables.update({each.node: each.table() for each in gathered})
    return Scoring(expression, grouping, tuple(groups.groups), tables)


def without_dropped(passes: Passes[T], drop: Scoring | None) -> Passes[T]:
    """The same computation, which never meets the rows for which `drop` holds."""
    result: T
    try:
        while True:
            add = next(passes)
            yield add if drop is None else _Filtered(add, drop)
    except StopIteration as stop:
        result = stop.value
    return result


@dataclass(frozen=True, slots=True)
class _Filtered:
    add: Callable[[Batch], None]
    drop: Scoring

    def __call__(self, batch: Batch) -> None:
        self.add(batch.take(~self.drop.holds(batch)))


class MomentSums:
    """Streamed mean and variance by group, in float64."""

    def __init__(self) -> None:
        self._count, self._mean, self._square = np.zeros(0), np.zeros(0), np.zeros(0)

    def add(self, values: Values, group: NDArray[np.int64], num_groups: int) -> None:
        """Add finite values; the others are left out."""
        grow = num_groups - len(self._count)
        self._count, self._mean, self._square = (
            np.pad(array, (0, grow)) for array in (self._count, self._mean, self._square)
        )
        finite = np.isfinite(values)
        values, group = values[finite], group[finite]
        count = np.bincount(group, minlength=num_groups).astype(np.float64)
        safe = np.maximum(count, 1)
        mean = np.bincount(group, values, num_groups) / safe
        square = np.bincount(group, (values - mean[group]) ** 2, num_groups)
        # Chan, Golub and LeVeque's update: no difference of large sums.
        total = np.maximum(self._count + count, 1)
        gap = mean - self._mean
        self._square += square + gap**2 * self._count * count / total
        self._mean += gap * count / total
        self._count += count

    def moments(self) -> Moments:
        """Of all that was added; the deviation is the population's."""
        variance = self._square / np.maximum(self._count, 1)
        deviation = np.sqrt(variance)
        # The mean of equal numbers may be off in its last digit; that is no spread.
        deviation[deviation <= 1e-12 * np.abs(self._mean)] = 0
        return Moments(tuple(self._mean.tolist()), tuple(deviation.tolist()))


class _Gather:
    """Collects what one statistic needs."""

    def __init__(
        self, node: Statistic, groups: Groups, tables: dict[Statistic, Ranks | Moments]
    ) -> None:
        self.node = node
        self._groups, self._tables = groups, tables
        self._sums = MomentSums()
        self._parts: dict[int, list[NDArray[np.float32]]] = {}

    def add(self, batch: Batch) -> None:
        group = self._groups.of(batch)
        values = evaluate(
            self.node.argument,
            batch.column,
            lambda node, values: self._tables[node].of(values, group),
        )
        if self.node.kind == "zscore":
            self._sums.add(values, group, len(self._groups))
            return
        narrow = _narrow(values)
        finite = np.isfinite(narrow)
        for code in np.unique(group[finite]).tolist():
            self._parts.setdefault(code, []).append(narrow[finite & (group == code)])

    def table(self) -> Ranks | Moments:
        if self.node.kind == "zscore":
            return self._sums.moments()
        ordered = [self._sorted(code) for code in range(len(self._groups))]
        ends = np.cumsum([len(values) for values in ordered]).tolist()
        return Ranks(np.concatenate([np.zeros(0, np.float32), *ordered]), tuple(ends))

    def _sorted(self, code: int) -> NDArray[np.float32]:
        parts = self._parts.pop(code, [])
        return np.sort(np.concatenate(parts)) if parts else np.zeros(0, np.float32)


def _narrow(values: Values) -> NDArray[np.float32]:
    """(N,) as float32; what does not fit is infinite, so not ranked."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32)
