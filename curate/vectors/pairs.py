"""For each of some rows the most similar one among those that come before it, by cosine.

    M_i = max over j < i of <x_i, x_j>,   0 where nothing before is similar

in any order of precedence, block against block. Products are taken in float32; the best of a row is
valued anew in float64, so that it does not depend on the shape of the blocks.

Shapes: n rows, d dimensions, B rows of a block.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from curate.vectors.store import Floats, Positions, Vectors

BLOCK_ROWS = 4096
_HELD_NUMBERS = 1 << 26
"""Rows of up to so many numbers (256 MB) are read once; of more, block by block again and again."""


class Similar(NamedTuple):
    """The most similar other row of each row."""

    values: Floats
    """(n,) cosines in [0, 1]; 0 where there is none above 0."""
    others: Positions
    """(n,) position of that row, -1 where there is none."""


def best_earlier(vectors: Vectors, rows: Positions, *, block_rows: int = BLOCK_ROWS) -> Similar:
    """The most similar of the rows before each row; of equal ones the first.

    Args:
        vectors: of any length but 0.
        rows: (n,) positions, in order of precedence, each with a vector.
        block_rows: B.
    """
    read = _Reader(vectors, rows, block_rows)
    values = np.zeros(len(rows), dtype=np.float32)
    others = np.full(len(rows), -1, dtype=np.int64)
    for start in range(0, len(rows), block_rows):
        block = read(start)
        mine = slice(start, start + len(block))
        for first in range(0, start + 1, block_rows):
            products = block @ (block if first == start else read(first)).T
            if first == start:
                products[np.triu_indices(len(block))] = 0  # itself, and what comes after
            _improve(values[mine], others[mine], products, rows[first : first + block_rows])
    return _valued(vectors, rows, others, block_rows)


def best_among(
    vectors: Vectors, rows: Positions, among: Positions, *, block_rows: int = BLOCK_ROWS
) -> Similar:
    """The most similar of other rows to each row; of equal ones the first.

    Args:
        vectors: of any length but 0.
        rows: (n,) positions, each with a vector.
        among: positions of the others, each with a vector.
        block_rows: B.
    """
    read, read_other = _Reader(vectors, rows, block_rows), _Reader(vectors, among, block_rows)
    values = np.zeros(len(rows), dtype=np.float32)
    others = np.full(len(rows), -1, dtype=np.int64)
    for start in range(0, len(rows) if len(among) else 0, block_rows):
        block = read(start)
        mine = slice(start, start + len(block))
        for first in range(0, len(among), block_rows):
            products = block @ read_other(first).T
            _improve(values[mine], others[mine], products, among[first : first + block_rows])
    return _valued(vectors, rows, others, block_rows)


def mean_direction(vectors: Vectors) -> Floats:
    """(1, d) the mean of all vectors at length 1: the one centroid of a single cell; (0, d)
    where there is no vector."""
    total = np.zeros(vectors.dim)
    count = 0
    for _, block in vectors.blocks():
        total += _unit(block).astype(np.float64).sum(axis=0)
        count += len(block)
    length = float(np.linalg.norm(total))
    centroid = (total / length if length else total)[None]
    return centroid[: min(count, 1)].astype(np.float32)


class _Reader:
    """Blocks of some rows at length 1; kept where all of them fit."""

    def __init__(self, vectors: Vectors, rows: Positions, block_rows: int) -> None:
        self._vectors, self._rows, self._step = vectors, rows, block_rows
        fits = len(rows) * vectors.dim <= _HELD_NUMBERS
        self._held = _unit(vectors.take(rows)) if fits else None

    def __call__(self, start: int) -> Floats:
        if self._held is not None:
            return self._held[start : start + self._step]
        return _unit(self._vectors.take(self._rows[start : start + self._step]))


def _improve(values: Floats, others: Positions, products: Floats, candidates: Positions) -> None:
    """Take over what is strictly better, in place."""
    at = products.argmax(axis=1)
    found = products[np.arange(len(products)), at]
    better = found > values
    values[better] = found[better]
    others[better] = candidates[at[better]]


def _valued(vectors: Vectors, rows: Positions, others: Positions, block_rows: int) -> Similar:
    """Cosines of rows and others in float64."""
    values = np.zeros(len(rows), dtype=np.float32)
    there = np.flatnonzero(others >= 0)
    for start in range(0, len(there), block_rows):
        own = there[start : start + block_rows]
        left = vectors.take(rows[own]).astype(np.float64)
        right = vectors.take(others[own]).astype(np.float64)
        products = np.einsum("nd,nd->n", left, right)
        norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        values[own] = np.clip(products / norms, 0, 1)
    return Similar(values, others)


def _unit(rows: npt.NDArray[np.float32]) -> Floats:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
