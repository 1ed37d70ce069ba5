"""How well numbers agree: rank correlation, area under the ROC curve, effective sample size.

Shapes: N values, K columns.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Spearman's rho: the correlation of the ranks, ties at their mean rank.

    Args:
        left: (N,) finite numbers, N >= 2, not all equal.
        right: (N,), likewise.

    Returns:
        In [-1, 1]; 1 is the same order, -1 the reverse.

    Raises:
        ValueError: lengths differ, fewer than two values, one not finite, or one side is constant.
    """
    if len(left) != len(right):
        raise ValueError(f"{len(left)} values against {len(right)}")
    found = _correlation(_ranks(left), _ranks(right))
    if np.isnan(found):
        raise ValueError("a constant has no order")
    return found


def rank_correlations(columns: Floats) -> Floats:
    """Spearman's rho of every two columns, each pair over the rows where both have a value.

    Args:
        columns: (N, K), NaN where a row has no value.

    Returns:
        (K, K) in [-1, 1]; NaN where fewer than three rows have both, or one side is constant.
    """
    width = columns.shape[1]
    found = np.full((width, width), np.nan)
    known = np.isfinite(columns)
    whole = [at for at in range(width) if len(columns) > 1 and known[:, at].all()]
    ranked = {at: _ranks(columns[:, at]) for at in whole}  # once, as a rule there are no gaps
    for left in range(width):
        for right in range(left, width):
            both = known[:, left] & known[:, right]
            if both.sum() < 3:
                continue
            if left in ranked and right in ranked:
                first, second = ranked[left], ranked[right]
            else:
                first, second = (_ranks(columns[both, at]) for at in (left, right))
            found[left, right] = found[right, left] = _correlation(first, second)
    return found


def roc_auc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """Chance that a positive example has the higher score of a random pair, ties counted half.

    Args:
        scores: (N,) finite numbers.
        positive: (N,) which of them are positive, at least one of each kind.

    Returns:
        In [0, 1]; 0.5 is chance.

    Raises:
        ValueError: lengths differ, one score is not finite, or one kind is missing.
    """
    if len(scores) != len(positive):
        raise ValueError(f"{len(scores)} scores against {len(positive)} labels")
    wanted = np.asarray(positive, dtype=bool)
    hits = int(wanted.sum())
    others = len(wanted) - hits
    if not hits or not others:
        raise ValueError("the area needs positive and negative examples")
    return float((_ranks(scores)[wanted].sum() - hits * (hits + 1) / 2) / (hits * others))


def effective_sample_size(weights: Sequence[float]) -> float:
    """How many equally weighted examples carry as much: (sum w)^2 / sum w^2 (Kish).

    Args:
        weights: (N,) >= 0, not all 0.

    Returns:
        In [1, N]; N where all weights are equal.

    Raises:
        ValueError: a weight is negative or not finite, or all are 0.
    """
    values = np.asarray(weights, dtype=np.float64)
    if not np.isfinite(values).all() or (values < 0).any() or not values.any():
        raise ValueError("weights are finite, not negative, and not all 0")
    values = values / values.max()  # the squares of very large or small ones leave the range
    return float(values.sum() ** 2 / (values @ values))


def _correlation(first: Floats, second: Floats) -> float:
    """Pearson's of two columns (N,); NaN where one is constant."""
    first, second = first - first.mean(), second - second.mean()
    norm = float(np.sqrt((first @ first) * (second @ second)))
    return float(np.clip(first @ second / norm, -1.0, 1.0)) if norm else float("nan")


def _ranks(values: Sequence[float] | Floats) -> Floats:
    """(N,) ranks from 1, ties at their mean."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2 or not np.isfinite(array).all():
        raise ValueError("ranks need two or more finite numbers")
    _, group, sizes = np.unique(array, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    return (last - (sizes - 1) / 2)[group]
