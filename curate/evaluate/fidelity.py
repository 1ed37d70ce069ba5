"""How well estimates stand in for measurements: the same order, and the same examples on top.

Shapes: N examples, C columns.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from curate.evaluate.agreement import rank_correlation

Floats = npt.NDArray[np.float64]
Positions = npt.NDArray[np.int64]

TOP = 0.1

_ONE_SIDED_95 = 1.645


class Fidelity(NamedTuple):
    """How well estimates agree with measurements."""

    rank_correlation: float
    """Spearman's rho; 0 where either side is constant."""
    top_recall: float
    """Share of the highest tenth that is among the highest tenth of the estimates; by chance a
    tenth."""


def fidelity(measured: Floats, estimated: Floats) -> Fidelity:
    """Agreement of estimates with measurements.

    Args:
        measured: (N,) finite, N at least 2.
        estimated: (N,) finite.
    """
    constant = np.ptp(measured) == 0 or np.ptp(estimated) == 0
    rho = 0.0 if constant else rank_correlation(measured.tolist(), estimated.tolist())
    size = max(1, round(TOP * len(measured)))
    top, guessed = (set(_highest(values, size)) for values in (measured, estimated))
    return Fidelity(rho, len(top & guessed) / size)


def chance_level(num: int) -> float:
    """The rank correlation that one in twenty pairs of unrelated columns of N values exceeds."""
    return _ONE_SIDED_95 / (num - 1) ** 0.5


def fold_numbers(draws: npt.NDArray[np.uint64], folds: int) -> Positions:
    """(N,) a fold for each example, at random, sizes equal but for one.

    Args:
        draws: (N,) random bits of each example.
        folds: how many.
    """
    found = np.empty(len(draws), dtype=np.int64)
    found[np.argsort(draws, kind="stable")] = np.arange(len(draws)) % folds
    return found


def out_of_fold(folds: Positions, estimate: Callable[[Positions, Positions], Floats]) -> Floats:
    """(N, C) estimates of each example from the examples of the other folds.

    Args:
        folds: (N,) fold of each example.
        estimate: from the positions (n,) to learn from and those (m,) to estimate to (m, C).
    """
    found: Floats | None = None
    for fold in np.unique(folds).tolist():
        rows = np.flatnonzero(folds == fold)
        estimates = estimate(np.flatnonzero(folds != fold), rows)
        if found is None:
            found = np.empty((len(folds), estimates.shape[1]))
        found[rows] = estimates
    assert found is not None
    return found


def _highest(values: Floats, size: int) -> list[int]:
    return np.argsort(-values, kind="stable")[:size].tolist()
