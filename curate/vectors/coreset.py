"""Choosing a few rows that stand for all: evenly over strata, at random, or near the median.

Shapes: N rows of the pool, M chosen, d dimensions, G groups.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from curate.vectors.store import Positions, Vectors

Draws = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]

QUINTILES = (0.2, 0.4, 0.6, 0.8)

_START_BITS = 32


def evenly(order: Positions, size: int, *, start: int) -> Positions:
    """Systematic sampling: rows at equal distances in an order, from a random start.

    Every row has the same chance M / N, and a stratum, which is a run of the order, gets its share
    of M but for one row more or less. Strata smaller than N / M are so not passed over for ever,
    as they would be if shares were rounded.

    Args:
        order: (N,) the rows, stratum by stratum, in random order within each.
        size: M, at most N.
        start: uniform in [0, 2^32).

    Returns:
        (M,) rows, ascending.
    """
    steps = size << _START_BITS
    chosen = [((i << _START_BITS) + start) * len(order) // steps for i in range(size)]
    return np.sort(order[np.array(chosen, dtype=np.int64)])


def strata_order(groups: Positions, sizes: npt.NDArray[np.number], draws: Draws) -> Positions:
    """(N,) rows by group, then by quintile of their size over all rows, then at random.

    Args:
        groups: (N,) cluster of each row.
        sizes: (N,) its length.
        draws: (N,) random bits of each row.
    """
    quintile = np.searchsorted(np.quantile(sizes, QUINTILES), sizes, side="right")
    return np.lexsort((draws, quintile, groups))


def near_median(groups: Positions, distances: Floats, draws: Draws, size: int) -> Positions:
    """(M,) of each group the rows whose distance from its mean is nearest to the median distance.

    A group's share of M is that of its rows, the largest remainders rounded up; equal rows are
    taken at random.

    Args:
        groups: (N,) class or cluster of each row, from 0.
        distances: (N,) from the mean of its group.
        draws: (N,) random bits of each row.
        size: M, at most N.
    """
    counts = np.bincount(groups)
    chosen: list[Positions] = []
    for group, share in enumerate(shares(counts.tolist(), size)):
        rows = np.flatnonzero(groups == group)
        if share:
            gap = np.abs(distances[rows] - np.median(distances[rows]))
            chosen.append(rows[np.lexsort((draws[rows], gap))[:share]])
    return np.sort(np.concatenate(chosen))


def shares(counts: Sequence[int], size: int) -> list[int]:
    """`size` dealt out in proportion to `counts`; the largest remainders get what is left."""
    total = sum(counts)
    found = [size * count // total for count in counts]
    rest = [-(size * count % total) for count in counts]
    for group in sorted(range(len(counts)), key=lambda g: (rest[g], g))[: size - sum(found)]:
        found[group] += 1
    return found


def group_distances(vectors: Vectors, groups: Positions) -> Floats:
    """(N,) distance of each row from the mean of its group; NaN where there is no vector.

    Args:
        vectors: N rows.
        groups: (N,) from 0; what it says of rows without a vector counts for nothing.
    """
    sums = np.zeros((int(groups.max()) + 1, vectors.dim))
    counts = np.zeros(len(sums))
    for positions, block in vectors.blocks():
        np.add.at(sums, groups[positions], block.astype(np.float64))
        counts += np.bincount(groups[positions], minlength=len(counts))
    means = sums / np.maximum(counts, 1)[:, None]
    found = np.full(len(vectors), np.nan)
    for positions, block in vectors.blocks():
        found[positions] = np.linalg.norm(block - means[groups[positions]], axis=1)
    return found
