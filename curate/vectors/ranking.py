"""Best-first lists of rows, far longer than what a neighbour search keeps, and cosines for them.

Cosines are summed in float64 and rounded to float32: the order of a sum, which differs from place
to place in a matrix product, then decides one pair in a hundred million at most. Equal rows tie,
and how rows are split into parts and blocks changes nothing.

Shapes: L lanes (queries, or groups of them), N rows, n rows of a block, k places, d dimensions.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from curate.vectors.store import Floats, Positions, Vectors

Bools = npt.NDArray[np.bool_]
Doubles = npt.NDArray[np.float64]

_QUERIES_AT_ONCE = 256
_BLOCK_ROWS = 1 << 14


def unit_rows(rows: npt.NDArray[np.floating]) -> Doubles:
    """(n, d) the rows at length 1; a zero vector stays what it is, and NaN stays NaN."""
    wide = np.asarray(rows, dtype=np.float64)
    norms = np.sqrt(np.square(wide).sum(axis=1, keepdims=True))
    return wide / np.where(norms == 0, 1.0, norms)


def products(queries: Doubles, rows: Doubles) -> Floats:
    """(L, n) inner products."""
    return (queries @ rows.T).astype(np.float32)


def cosine_blocks(
    queries: Doubles, vectors: Vectors, skip: Bools, *, block_rows: int = _BLOCK_ROWS
) -> Iterator[tuple[int, Positions, Floats]]:
    """Cosines of queries and rows, a few queries and a block of rows at a time.

    Args:
        queries: (L, d) of length 1.
        vectors: the rows, of any length.
        skip: (N,) rows that are left out; those without a vector are anyway.
        block_rows: rows in memory at a time.

    Yields:
        the first query's number, positions (n,) in rising order, and values (queries, n).
    """
    step = _QUERIES_AT_ONCE
    for positions, block in vectors.blocks(block_rows):
        there = ~skip[positions]
        if not there.any():
            continue
        rows = unit_rows(block[there])
        for first in range(0, len(queries), step):
            yield first, positions[there], products(queries[first : first + step], rows)


class Best:
    """The k best rows of each lane, exactly; equal values by position.

    Memory: at most about 2 k numbers and 2 k positions for each lane.

    Args:
        lanes: L.
        k: places of each.
    """

    def __init__(self, lanes: int, k: int) -> None:
        self._k = k
        self._values: list[list[Floats]] = [[] for _ in range(lanes)]
        self._rows: list[list[Positions]] = [[] for _ in range(lanes)]
        self._sizes = [0] * lanes
        self._least = np.full(lanes, -np.inf, dtype=np.float32)

    def add(self, first: int, positions: Positions, values: Floats) -> None:
        """Take the values (lanes, n) of some rows, whose positions follow those before.

        Args:
            first: the lane of the first row of `values`.
            positions: (n,) rising, behind all that were added.
            values: NaN takes no part.
        """
        for lane, own in enumerate(values, start=first):
            # A later row of the same value stands behind: strictly better ones alone get in.
            better = np.flatnonzero(own > self._least[lane])
            if not len(better):
                continue
            self._values[lane].append(own[better])
            self._rows[lane].append(positions[better])
            self._sizes[lane] += len(better)
            if self._sizes[lane] >= 2 * self._k:
                self._trim(lane)

    def lists(self) -> list[Positions]:
        """(L,) positions of each lane's rows, best first; fewer than k where there are fewer."""
        found: list[Positions] = []
        for lane in range(len(self._sizes)):
            values, rows = self._trim(lane)
            found.append(rows[np.argsort(-values, kind="stable")])
            self._values[lane], self._rows[lane] = [], []
        return found

    def _trim(self, lane: int) -> tuple[Floats, Positions]:
        """Leave the k best, in order of position."""
        values = np.concatenate([np.zeros(0, np.float32), *self._values[lane]])
        rows = np.concatenate([np.zeros(0, np.int64), *self._rows[lane]])
        if len(values) > self._k:
            least = np.partition(values, len(values) - self._k)[len(values) - self._k]
            keep = values > least
            ties = np.flatnonzero(values == least)[: self._k - int(keep.sum())]
            keep[ties] = True
            values, rows = values[keep], rows[keep]
            self._least[lane] = least
        elif len(values) == self._k:
            self._least[lane] = values.min(initial=np.inf)
        self._values[lane], self._rows[lane] = [values], [rows]
        self._sizes[lane] = len(values)
        return values, rows
