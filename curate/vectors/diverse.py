"""Rows that stand far apart, or that stand for many others: greedy orders by vectors.

    k-centre            next = argmax_x min_{s in S} |x - s|            (farthest first)
    facility location   next = argmax_c F(S + c) - F(S)
                        F(S) = sum_x max(0, max_{s in S} cos(x, s))

Sources: Gonzalez, "Clustering to minimize the maximum intercluster distance", Theoretical Computer
Science 38, 1985: the largest distance to a chosen row is at most twice the smallest possible; Sener
and Savarese, "Active Learning for Convolutional Neural Networks: A Core-Set Approach", ICLR 2018,
arXiv:1708.00489; Nemhauser, Wolsey and Fisher, Mathematical Programming 14, 1978: F is at least
1 - 1/e of the largest possible; Minoux, 1978, for looking again at only those gains that may win.

Departures: equal values go to the earlier row, and the first row is the first centre. Distances are
computed in float32 from products of centred rows; what is below a thousandth of the rows' lengths
counts as 0. In groups above `DENSE_ROWS` facility location knows a row's nearest neighbours only;
similarities with others count as 0.
Cost: k-centre n m d multiplications for m rows out of n; facility location n^2 d for similarities
and little more, from `EXACT_ROWS` rows on fewer, by an approximate search. Memory 8 n d bytes.
Shapes: n rows, d dimensions, m rows that are chosen.
"""

import heapq
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from curate.vectors.ranking import unit_rows
from curate.vectors.search import nearest, nearest_approximate
from curate.vectors.store import Floats, Positions, Vectors

log = logging.getLogger(__name__)

DENSE_ROWS = 8192
"""Up to here facility location sees the similarities of all pairs: 256 MB."""

EXACT_ROWS = 200_000
"""Up to here neighbours are found exactly."""

NEIGHBOURS = 64
"""Of a row, itself included, that count in large groups."""

_WORKING_ROWS = 1024
_BLOCK_NUMBERS = 1 << 20
_SMALLEST = 1e-6
"""Squared, relative to the squared lengths: a few times what float32 can lose."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How far an order goes: until what was chosen costs more than `most`, or nothing is left."""

    costs: npt.NDArray[np.int64]
    """(n,) of each row, 0 or more."""
    most: int

    @classmethod
    def rows(cls, num_rows: int, count: int) -> "Budget":
        """Just so many of the rows."""
        return cls(np.ones(num_rows, np.int64), count - 1)


class Chosen(NamedTuple):
    """Rows in the order in which they were chosen."""

    order: Positions
    """(m,)"""
    worth: npt.NDArray[np.float64]
    """(m,) what each brought: its distance from those before it, inf for the first; or its gain."""


def farthest_first(rows: Floats, budget: Budget) -> Chosen:
    """Each next row is the one farthest from all chosen so far.

    Distances to most rows are brought up to date only now and then, for many new centres at once:
    they can only fall, so that rows near the top are enough to know who is next.

    Args:
        rows: (n, d) finite; the first is the first centre.
        budget: when to stop.
    """
    search = _Farthest(rows)
    order, worth, spent = list[int](), list[float](), 0
    while len(order) < len(rows) and spent <= budget.most:
        for row, squared in search.next_rows():
            order.append(row)
            worth.append(float(np.sqrt(squared)))
            spent += int(budget.costs[row])
            if spent > budget.most:
                break
    return Chosen(np.array(order, np.int64), np.array(worth))


def most_covering(rows: Floats, budget: Budget, *, threads: int = 1, seed: int = 0) -> Chosen:
    """Each next row is the one that adds most to the similarity of all rows to their nearest.

    Args:
        rows: (n, d) finite; of any length, a zero vector is like nothing.
        budget: when to stop.
        threads: of the search for neighbours.
        seed: of its cells, in large groups.
    """
    unit = unit_rows(rows).astype(np.float32)
    lists = _dense(unit) if len(rows) <= DENSE_ROWS else _sparse(unit, threads, seed)
    covered = np.zeros(len(rows), np.float32)

    def gain(row: int) -> float:
        others, values = lists(row)
        return float(np.maximum(values - covered[others], 0).sum(dtype=np.float64))

    heap = [(-gain(row), row) for row in range(len(rows))]
    heapq.heapify(heap)
    order, worth, spent = list[int](), list[float](), 0
    while heap and spent <= budget.most:
        _, row = heap[0]
        now = gain(row)
        # A gain can only have fallen: whoever is still first beats all that were not looked at.
        heapq.heapreplace(heap, (-now, row))
        if heap[0][1] != row:
            continue
        heapq.heappop(heap)
        order.append(row)
        worth.append(now)
        spent += int(budget.costs[row])
        others, values = lists(row)
        covered[others] = np.maximum(covered[others], values)
    return Chosen(np.array(order, np.int64), np.array(worth))


class _Farthest:
    """Distances of all rows to the chosen ones, up to date where it matters."""

    def __init__(self, rows: Floats) -> None:
        # Products lose least where the origin is in the middle.
        self._rows = rows - rows.mean(axis=0, dtype=np.float64).astype(np.float32)
        self._squares = np.einsum("nd,nd->n", self._rows, self._rows)
        self._least = np.full(len(rows), np.inf, np.float32)
        """(n,) squared distance to the nearest centre, or more; -1 for centres."""
        self._new: list[int] = []
        """Centres that most rows have not been compared with."""

    def next_rows(self) -> Iterator[tuple[int, float]]:
        """The next rows and their squared distances, as far as the rows near the top reach."""
        self._compare_all()
        if np.isinf(self._least[0]):
            yield from self._take(np.array([0]))
            return
        size = min(_WORKING_ROWS, len(self._least))
        least = np.partition(self._least, len(self._least) - size)[len(self._least) - size]
        if least <= 0 and not (self._least > 0).any():  # all that is left has its like
            yield from self._take(np.flatnonzero(self._least == 0))
            return
        floor = float(least)
        near = np.flatnonzero(self._least >= floor if floor > 0 else self._least > 0)
        rows, squares, values = self._rows[near], self._squares[near], self._least[near]
        while True:
            at = int(values.argmax())
            if values[at] < floor or values[at] <= 0:
                break
            row, value = int(near[at]), float(values[at])
            self._new.append(row)
            np.minimum(values, _squared(rows @ self._rows[row], squares, squares[at]), out=values)
            values[at] = -1
            self._least[near] = values
            yield row, value

    def _take(self, rows: Positions) -> Iterator[tuple[int, float]]:
        """All of some rows, in their order."""
        for row in rows.tolist():
            value = float(self._least[row])
            self._new.append(row)
            self._least[row] = -1
            yield row, value

    def _compare_all(self) -> None:
        """Bring all distances up to date."""
        if not self._new:
            return
        new = np.array(self._new)
        self._new = []
        step = max(1, _BLOCK_NUMBERS // len(new))
        centres, squares = self._rows[new], self._squares[new]
        for first in range(0, len(self._least), step):
            here = slice(first, first + step)
            table = self._rows[here] @ centres.T
            found = _squared(table, self._squares[here, None], squares).min(axis=1)
            least = self._least[here]
            np.minimum(least, found, out=least, where=least >= 0)


def _squared(products: Floats, left: npt.NDArray[np.float32], right: npt.ArrayLike) -> Floats:
    """Squared distances from products, 0 where rounding may have made them."""
    sums = left + np.asarray(right, np.float32)
    found = sums - 2 * products
    return np.where(found <= _SMALLEST * sums, np.float32(0), found)


_Lists = Callable[[int], tuple[Positions | slice, Floats]]
"""Row -> the rows that it is like, and how much."""


def _dense(unit: Floats) -> _Lists:
    table = _similar(unit @ unit.T)
    np.fill_diagonal(table, np.square(unit).sum(axis=1) > 0.5)  # 1, or 0 of a zero vector
    everyone = slice(None)
    return lambda row: (everyone, table[row])


def _similar(cosines: Floats) -> Floats:
    """Similarities from 0 to 1; 1 where only rounding stands between."""
    found = np.maximum(cosines, 0)
    found[found > 1 - _SMALLEST] = 1
    return found


def _sparse(unit: Floats, threads: int, seed: int) -> _Lists:
    count = len(unit)
    vectors = Vectors([unit])
    if count <= EXACT_ROWS:
        found = nearest(unit, vectors, NEIGHBOURS, threads=threads)
    else:
        found, recall = nearest_approximate(unit, vectors, NEIGHBOURS, threads=threads, seed=seed)
        log.info("neighbours of %d rows: recall %.3f", count, recall)
    rows = np.repeat(np.arange(count), found.positions.shape[1])
    others, values = found.positions.ravel(), _similar(np.nan_to_num(found.values).ravel())
    fit = (others >= 0) & (others != rows) & (values > 0)
    own = np.flatnonzero(np.square(unit).sum(axis=1) > 0.5)
    rows = np.concatenate([rows[fit], own])
    others = np.concatenate([others[fit], own])
    values = np.concatenate([values[fit], np.ones(len(own), np.float32)])
    order = np.lexsort((rows, others))
    rows, values = rows[order], values[order]
    ends = np.searchsorted(others[order], np.arange(count + 1))
    return lambda row: (rows[ends[row] : ends[row + 1]], values[ends[row] : ends[row + 1]])
