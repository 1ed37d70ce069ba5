"""The best rows that queries have met so far, and those that may yet turn out to be among them.

Shapes: Q queries, K results of each, B rows of a piece.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from curate.models.scan_rows import Floats, Places

Settle = Callable[[int, Places], tuple[Places, Floats]]
"""The best K of some rows by their exact scores: query, (n,) -> ascending positions, scores."""
_CROWD = 2
"""Rows of one piece that are too many, by results."""
_ROUNDING = 1e-14
"""Of scores that have been settled, by their size."""

_ROOM = 4
"""Rows that are kept before the worse are let go, by results."""


class Found(NamedTuple):
    """The best rows of each query, best first."""

    positions: Places
    """(Q, K) counted over all parts; -1 where there are fewer rows."""
    scores: Floats
    """(Q, K) NaN where there are fewer rows."""


class Ranked:
    """Results, put in order query by query."""

    def __init__(self, num_queries: int, num_best: int) -> None:
        self.found = Found(
            np.full((num_queries, num_best), -1, np.int64), np.full((num_queries, num_best), np.nan)
        )

    def put(self, query: int, positions: Places, scores: Floats) -> None:
        """The best of these rows (n,), by score and then by position."""
        order = np.lexsort((positions, -scores))[: self.found.positions.shape[1]]
        self.found.positions[query, : len(order)] = positions[order]
        self.found.scores[query, : len(order)] = scores[order]


class Candidates:
    """Rows that can be among the best K of each query, by scores that may be off.

    A row is let go when K others are better by more than the errors of both.

    Args:
        num_queries: Q.
        size: K.
        settle: where errors are so large, or scores so equal, that too many rows remain, their
            exact scores decide; None for scores without errors, of which the first K are kept.
    """

    def __init__(self, num_queries: int, size: int, settle: Settle | None) -> None:
        self._size = size
        self._settle = settle
        self._last = np.full(num_queries, -np.inf)  # what a row must reach to matter
        self._positions = [np.empty(0, np.int64) for _ in range(num_queries)]
        self._scores = [np.empty(0) for _ in range(num_queries)]
        self._slack = [np.empty(0) for _ in range(num_queries)]
        self._waiting: list[tuple[Places, Places, Floats, Floats]] = []
        self._num_waiting = 0

    def is_crowded(self, scores: npt.NDArray[np.floating], slack: Floats) -> bool:
        """Whether far more rows of a piece than K would be kept, as its errors are large.

        Args:
            scores: as `add` takes them.
            slack: as `add` takes them.
        """
        most = float(slack.max(initial=0))
        bar = self._last
        if scores.shape[1] >= self._size and (bar == -np.inf).any():
            place = scores.shape[1] - self._size
            bar = np.maximum(bar, np.partition(scores, place, axis=1)[:, place] - most)
        near = (scores >= (bar - most).astype(scores.dtype)[:, None]).sum()
        return bool(near > _CROWD * self._size * len(bar))

    def add(
        self, start: int, scores: npt.NDArray[np.floating], slack: Floats | None = None
    ) -> None:
        """Rows of a piece.

        Args:
            start: position of the first of them; positions ascend from piece to piece.
            scores: (Q, B), -inf for rows that have none.
            slack: (B,) how far those of a row may be off.
        """
        most = 0.0 if slack is None else float(slack.max(initial=0))
        # Rounded down, where the scores are of float32.
        bar = np.nextafter((self._last - most).astype(scores.dtype), scores.dtype.type(-np.inf))
        queries, rows = np.nonzero(scores >= bar[:, None])
        found = scores[queries, rows].astype(np.float64)
        off = np.zeros(len(rows)) if slack is None else slack[rows]
        kept = (found + off >= self._last[queries]) & (found > -np.inf)
        if not kept.any():
            return
        self._waiting.append((queries[kept], rows[kept] + start, found[kept], off[kept]))
        self._num_waiting += int(kept.sum())
        if self._num_waiting > _ROOM * self._size * len(self._last):
            self._sift()

    def best(self) -> Iterator[tuple[Places, Floats]]:
        """Ascending positions (n,) of each query's rows, and their scores as they were given."""
        self._sift()
        yield from zip(self._positions, self._scores, strict=True)

    def _sift(self) -> None:
        """Let go of the rows that cannot be among the best."""
        if not self._waiting:
            return
        queries, positions, scores, slack = (
            np.concatenate(one) for one in zip(*self._waiting, strict=True)
        )
        self._waiting, self._num_waiting = [], 0
        order = np.argsort(queries, kind="stable")
        bounds = np.searchsorted(queries[order], np.arange(len(self._last) + 1))
        for query in range(len(self._last)):
            own = order[bounds[query] : bounds[query + 1]]
            if len(own):
                self._merge(query, positions[own], scores[own], slack[own])

    def _merge(self, query: int, positions: Places, scores: Floats, slack: Floats) -> None:
        positions = np.concatenate([self._positions[query], positions])
        scores = np.concatenate([self._scores[query], scores])
        slack = np.concatenate([self._slack[query], slack])
        place = len(positions) - self._size
        if place >= 0:
            last = np.partition(scores - slack, place)[place]
            kept = scores + slack >= last
            if self._settle is None and kept.sum() > self._size:
                kept = _first_of_equals(scores, last, self._size)
            positions, scores, slack = positions[kept], scores[kept], slack[kept]
            self._last[query] = last
            if self._settle is not None and len(positions) > 2 * _ROOM * self._size:
                positions, scores = self._settle(query, positions)
                slack = _ROUNDING * np.abs(scores)
                self._last[query] = (scores - slack).min()
        self._positions[query], self._scores[query], self._slack[query] = positions, scores, slack


def _first_of_equals(scores: Floats, last: float, size: int) -> npt.NDArray[np.bool_]:
    """(n,) which `size` rows are the best, the first of those that are `last`."""
    kept = scores > last
    kept[np.flatnonzero(scores == last)[: size - int(kept.sum())]] = True
    return kept
