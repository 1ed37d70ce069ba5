"""Histograms and quantiles of very many values in a few thousand numbers.

Two passes: the first learns the range and the rough shape of a column, which settle the bins; the
second counts in them, group by group. What is below or above the bins is counted apart.

Shapes: N values, B bins, F fine bins, G groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from curate.report.document import QUANTILES, Distribution

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]

BINS = 40
_FINE = 25
"""Fine bins in a bin: quantiles are read off them."""
_BUCKETS = 1 << 16
_LARGEST = float(np.finfo(np.float32).max)
_LONG = ((0.001, 4.0), (0.01, 20.0))
"""Such shares of both ends are cut off where the range is that many times as wide as the rest."""
_SKEWED = 30.0
"""A range of positive values is logarithmic where the largest is that many times the median."""
_LANDMARKS = np.unique(np.concatenate([
    np.arange(1, 101) / 100, 0.01 / 2 ** np.arange(1, 15), 1 - 0.01 / 2 ** np.arange(1, 15)
]))  # fmt: skip
"""Where many values lie, and in the tails, fine bins have edges at these shares of the values."""


@dataclass(slots=True)
class Spread:
    """Range, mean and rough shape of a column, streamed.

    The shape is a histogram over the upper 16 bits of each number as float32: about 128 buckets
    for each power of two, whatever the range turns out to be.
    """

    rows: int = 0
    missing: int = 0
    low: float = np.inf
    high: float = -np.inf
    _buckets: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BUCKETS, np.int64))

    def add(self, values: NDArray[Any]) -> None:
        """Add (N,) values; those that are not finite are missing."""
        known = values[np.isfinite(values)]
        self.rows += len(known)
        self.missing += len(values) - len(known)
        if not len(known):
            return
        self.low = min(self.low, float(known.min()))
        self.high = max(self.high, float(known.max()))
        narrow = np.clip(known, -_LARGEST, _LARGEST).astype(np.float32)
        self._buckets += np.bincount(_bucket(narrow), minlength=_BUCKETS)

    def quantile(self, share: float) -> float:
        """Roughly: the lower end of the bucket in which that share of the values is reached."""
        return float(self._starts(self._reached(np.array([share])))[0])

    def landmarks(self) -> Floats:
        """(M,) both ends of the buckets in which certain shares of the values are reached."""
        at = self._reached(_LANDMARKS)
        return np.unique(self._starts(np.concatenate([at, at + 1])))

    def _reached(self, shares: Floats) -> Codes:
        at = np.searchsorted(np.cumsum(self._buckets), shares * self.rows, side="left")
        return np.minimum(at, _BUCKETS - 2)

    def _starts(self, buckets: Codes) -> Floats:
        return np.clip(_bucket_starts(buckets), self.low, self.high)


@dataclass(frozen=True, slots=True)
class Bins:
    """Where values are counted."""

    scale: Literal["linear", "log"]
    bounds: Floats
    """(B + 1,) edges of the bins."""
    fine: Floats
    """(F + 1,) edges of the fine bins, those of the bins among them; some may lie in the tails."""

    @property
    def edges(self) -> list[float]:
        """(B + 1,)"""
        return self.bounds.tolist()

    @property
    def places(self) -> Codes:
        """(B + 1,) of the edges of the bins among those of the fine bins."""
        return np.searchsorted(self.fine, self.bounds)

    def codes(self, values: Floats) -> Codes:
        """(N,) 0 below, F + 1 above, else the number of the fine bin from 1."""
        found = np.searchsorted(self.fine, values, side="right")
        for edge in (self.bounds[-1], self.fine[-1]):  # the last bin holds its upper edge
            found[values == edge] = np.searchsorted(self.fine, edge)
        return found


def bins_for(spread: Spread, *, num_bins: int = BINS) -> Bins | None:
    """Bins for a column whose range is known; None where it has no values."""
    if not spread.rows:
        return None
    low, high = spread.low, spread.high
    if low == high:
        width = max(abs(low) / 2, 0.5)
        return _bins("linear", np.linspace(low - width, high + width, _FINE + 1))
    steps, known = num_bins * _FINE + 1, spread.landmarks()
    if low > 0 and high > _SKEWED * spread.quantile(0.5):
        return _bins("log", _with_ends(np.geomspace(low, high, steps), low, high), known)
    for tail, times in _LONG:
        inner = spread.quantile(tail), spread.quantile(1 - tail)
        if inner[0] < inner[1] and high - low > times * (inner[1] - inner[0]):
            low, high = inner
    return _bins("linear", _with_ends(np.linspace(low, high, steps), low, high), known)


def length_bins(longest: int) -> Bins:
    """Bins for counts from 1 up, on a logarithmic scale; 0 is below."""
    high = float(max(2, longest))
    return _bins("log", _with_ends(np.geomspace(1.0, high, BINS * _FINE + 1), 1.0, high))


def _bins(scale: Literal["linear", "log"], fine: Floats, more: Floats | None = None) -> Bins:
    """Each `_FINE`th edge is that of a bin; `more` are further edges of fine bins."""
    parts = fine if more is None else np.concatenate([fine, more])
    return Bins(scale, fine[::_FINE], np.unique(parts))


class Tally:
    """Values counted in bins, group by group."""

    def __init__(self, bins: Bins, num_groups: int) -> None:
        self._bins, self._groups = bins, num_groups
        self._width = len(bins.fine) + 1
        self._counts = np.zeros(num_groups * self._width, np.int64)
        self._missing = np.zeros(num_groups, np.int64)
        # Of the values less the middle of the bins, so that squares lose no digits.
        self._offset = float(bins.fine[len(bins.fine) // 2])
        self._sums, self._squares = np.zeros(num_groups), np.zeros(num_groups)
        self._low, self._high = np.full(num_groups, np.inf), np.full(num_groups, -np.inf)

    def add(self, values: Floats, groups: Codes, times: Codes | None = None) -> None:
        """Add (N,) values, each to its group (N,) and, where that is given, so many times (N,)."""
        known = np.isfinite(values)
        missing = np.bincount(groups[~known], _of(times, ~known), self._groups)
        self._missing += missing.astype(np.int64)
        values, groups, weights = values[known], groups[known], _of(times, known)
        if not len(values):
            return
        codes = groups * self._width + self._bins.codes(values)
        counts = np.bincount(codes, weights, len(self._counts))
        self._counts += counts.astype(np.int64)
        moved = values - self._offset
        times_moved = moved if weights is None else moved * weights
        self._sums += np.bincount(groups, times_moved, self._groups)
        self._squares += np.bincount(groups, times_moved * moved, self._groups)
        used = values if weights is None else values[weights > 0]
        where = groups if weights is None else groups[weights > 0]
        np.minimum.at(self._low, where, used)
        np.maximum.at(self._high, where, used)

    def distribution(self, groups: Sequence[int]) -> Distribution:
        """How the values of some groups together are spread."""
        chosen = list(groups)
        fine = self._counts.reshape(self._groups, self._width)[chosen].sum(axis=0)
        rows = int(fine.sum())
        inside = np.cumsum(fine)[self._bins.places]
        mean = std = None
        if rows:
            middle = float(self._sums[chosen].sum()) / rows
            mean = self._offset + middle
            std = max(0.0, float(self._squares[chosen].sum()) / rows - middle**2) ** 0.5
            low, high = float(self._low[chosen].min()), float(self._high[chosen].max())
            mean, std = (low, 0.0) if low == high else (mean, std)
        return Distribution(
            rows=rows,
            missing=int(self._missing[chosen].sum()),
            mean=rounded(mean),
            std=rounded(std),
            quantiles=self._quantiles(fine, chosen) if rows else [],
            counts=np.diff(inside).tolist(),
            below=int(inside[0]),
            above=rows - int(inside[-1]),
        )

    def rows_of(self, group: int) -> int:
        """Values of a group."""
        return int(self._counts.reshape(self._groups, self._width)[group].sum())

    def _quantiles(self, fine: NDArray[np.int64], groups: list[int]) -> list[float]:
        low, high = float(self._low[groups].min()), float(self._high[groups].max())
        ends = np.concatenate([[min(low, self._bins.fine[0])], self._bins.fine,
                               [max(high, self._bins.fine[-1])]])  # fmt: skip
        reached = np.concatenate([[0], np.cumsum(fine)])
        found: list[float] = []
        for share in QUANTILES:
            wanted = share * reached[-1]
            at = int(np.clip(np.searchsorted(reached, wanted, side="left") - 1, 0, len(fine) - 1))
            part = (wanted - reached[at]) / max(1, fine[at])
            value = ends[at] + part * (ends[at + 1] - ends[at])
            found.append(float(np.clip(value, low, high)))
        found[0], found[-1] = low, high
        return [float(f"{value:.6g}") for value in found]


def rounded(value: float | None) -> float | None:
    """Six digits; None for what is no number."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.6g}")


def _of(times: Codes | None, rows: NDArray[np.bool_]) -> Floats | None:
    return None if times is None else times[rows].astype(np.float64)


def _with_ends(edges: Floats, low: float, high: float) -> Floats:
    """The same edges, of which rounding may have moved the first and the last."""
    edges[0], edges[-1] = low, high
    return edges


def _bucket(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """(N,) upper half of integers that sort as the numbers do."""
    bits = (values + np.float32(0)).view(np.uint32)  # -0.0 is 0.0
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)) >> np.uint32(16)


def _bucket_starts(buckets: Codes) -> Floats:
    """(N,) the least number of each bucket."""
    ordered = buckets.astype(np.uint32) << np.uint32(16)
    bits = np.where(ordered >> 31, ordered ^ np.uint32(1 << 31), ~ordered)
    return bits.view(np.float32).astype(np.float64)
