"""Does an attribution foretell retraining, and do its scores find wrong labels?

    prediction(S, q) = sum_{i in S} tau(i, q)
    LDS(q) = Spearman over subsets S of [ prediction(S, q), f(S, q) ],   LDS = mean over q

the linear datamodeling score: f(S, q) is an output of models trained on S, tau(i, q) what the
attribution says that example i adds to it. A positive influence lowers the loss, so that f is
minus the loss of q. Spearman's rank correlation asks for no scale.

What is measured is noisy, since another seed gives another model. The ceiling is what a second
measurement would reach in the place of a prediction: with r models on each subset, the rank
correlation of the mean of one half of them with that of the other, corrected to r models by
Spearman and Brown,

    c = t rho / (1 + (t - 1) rho),   t = r / (models in a half).

A prediction has no noise of training of its own and can reach sqrt(c).

Source: Ilyas, Park, Engstrom, Leclerc and Madry, "Datamodels: Predicting Predictions from Training
Data", ICML 2022, arXiv:2202.00622; Park, Georgiev, Ilyas, Leclerc and Madry, "TRAK: Attributing
Model Behavior at Scale", ICML 2023, arXiv:2303.14186, section 3.
Departures: none for the score; the interval is a bootstrap over queries, TRAK's is over subsets
too. Subsets are the same for all queries, and their luck is not in it.

Shapes: S subsets, N examples, Q queries, r models.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from curate.evaluate.agreement import rank_correlation

Floats = NDArray[np.float64]
Members = NDArray[np.bool_]

DRAWS = 2000
"""Bootstrap samples of an interval."""
LEVEL = 0.05
"""1 minus the confidence of an interval."""
FEWEST_SUBSETS = 3
"""With fewer, an order says nothing."""


class Mean(NamedTuple):
    """A mean over queries; NaN where there is none."""

    value: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    num: int
    """Queries that could be judged."""


class Auc(NamedTuple):
    """Area under the ROC curve; 0.5 is chance."""

    value: float
    low: float
    high: float


def predictions(scores: Floats, members: Members) -> Floats:
    """(S, Q) what the attribution foretells: sums of the scores over each subset.

    Those of several sets of examples add up.

    Args:
        scores: (N, Q) tau; one that is not finite counts as 0, as an example without a score.
        members: (S, N) which examples are in which subset.
    """
    return members.astype(np.float64) @ np.where(np.isfinite(scores), scores, 0.0)


def rank_agreement(predicted: Floats, measured: Floats) -> Floats:
    """(Q,) Spearman's rho over subsets, ties at their mean rank.

    A subset without a finite number on either side is left out for its query. A constant
    prediction has foretold nothing and gets 0; a measurement that is constant, or of fewer than
    three subsets, cannot judge and gives NaN.

    Args:
        predicted: (S, Q)
        measured: (S, Q) minus the loss, or what else is foretold.
    """
    if predicted.shape != measured.shape:
        raise ValueError(f"{predicted.shape} predictions against {measured.shape} outputs")
    found = np.full(measured.shape[1], np.nan)
    for query in range(measured.shape[1]):
        own, other = predicted[:, query], measured[:, query]
        kept = np.isfinite(own) & np.isfinite(other)
        own, other = own[kept], other[kept]
        if len(other) < FEWEST_SUBSETS or np.ptp(other) == 0:
            continue
        constant = np.ptp(own) == 0
        found[query] = 0.0 if constant else rank_correlation(own.tolist(), other.tolist())
    return found


def mean_over_queries(
    values: Floats, *, seed: int = 0, change: Callable[[Floats], Floats] | None = None
) -> Mean:
    """Mean and percentile interval of a bootstrap over queries.

    Args:
        values: (Q,) NaN where a query cannot be judged; those are left out.
        seed: of the bootstrap.
        change: applied to the mean and to the bootstrap's means, not to single queries.
    """
    kept = values[np.isfinite(values)]
    if not len(kept):
        return Mean(math.nan, math.nan, math.nan, 0)
    generator = np.random.default_rng(seed)
    means = np.concatenate(
        [[kept.mean()], [kept[generator.integers(len(kept), size=len(kept))].mean()
                         for _ in range(DRAWS)]]
    )  # fmt: skip
    means = means if change is None else change(means)
    low, high = np.quantile(means[1:], [LEVEL / 2, 1 - LEVEL / 2])
    return Mean(float(means[0]), float(low), float(high), len(kept))


def one_query(predicted: Floats, measured: Floats, *, seed: int = 0) -> Mean:
    """Rank correlation of one query, with an interval from a bootstrap over subsets.

    Args:
        predicted: (S,)
        measured: (S,)
        seed: of the bootstrap.
    """
    value = float(rank_agreement(predicted[:, None], measured[:, None])[0])
    if not math.isfinite(value):
        return Mean(math.nan, math.nan, math.nan, 0)
    generator = np.random.default_rng(seed)
    draws = generator.integers(len(measured), size=(DRAWS, len(measured)))
    found = rank_agreement(predicted[draws].T, measured[draws].T)
    low, high = np.nanquantile(found, [LEVEL / 2, 1 - LEVEL / 2])
    return Mean(value, float(low), float(high), 1)


def halves_agreement(outputs: Sequence[Floats]) -> tuple[Floats, float]:
    """(Q,) rank correlation of one half of the models with the other, and t.

    Args:
        outputs: r times (S, Q), r at least 2; with an odd number the last is in no half.
    """
    half = len(outputs) // 2
    if not half:
        raise ValueError("a ceiling takes two models on each subset")
    first, second = (np.mean(part, axis=0) for part in (outputs[:half], outputs[half : 2 * half]))
    return rank_agreement(first, second), len(outputs) / half


def corrected(rho: Floats, times: float) -> Floats:
    """Correlation of two measurements with so many times more models, by Spearman and Brown.

    Args:
        rho: correlation of two halves; below 0 it is taken as 0.
        times: t.
    """
    own = np.clip(rho, 0.0, 1.0)
    return times * own / (1 + (times - 1) * own)


def ceiling(outputs: Sequence[Floats], *, seed: int = 0) -> Mean:
    """What a second measurement of as many models would reach: see the head of this file.

    Args:
        outputs: r times (S, Q).
        seed: of the bootstrap over queries.
    """
    values, times = halves_agreement(outputs)
    return mean_over_queries(values, seed=seed, change=lambda means: corrected(means, times))


def auc_interval(
    scores: Floats, positive: Members, *, seed: int = 0, draws: int = DRAWS
) -> tuple[Auc, int]:
    """Area under the ROC curve with an interval, and how many examples had no score.

    Positive and negative examples are drawn anew, each among themselves; ties count half.

    Args:
        scores: (N,) those that are not finite are left out.
        positive: (N,) of which kind each is.
        seed: of the bootstrap.
        draws: bootstrap samples.

    Raises:
        ValueError: no example of one of the kinds has a score.
    """
    kept = np.isfinite(scores)
    values, wanted = scores[kept], positive[kept]
    left_out = int((~kept).sum())
    hits, others = int(wanted.sum()), int((~wanted).sum())
    if not hits or not others:
        raise ValueError("the area needs positive and negative examples with a score")
    _, group = np.unique(values, return_inverse=True)
    size = int(group.max()) + 1

    def area(own: NDArray[np.int64], other: NDArray[np.int64]) -> float:
        """From positives and negatives at each value, in ascending order."""
        below = np.cumsum(other) - other
        return float((own * (below + other / 2)).sum() / (hits * others))

    own, other = group[wanted], group[~wanted]
    value = area(np.bincount(own, minlength=size), np.bincount(other, minlength=size))
    generator = np.random.default_rng(seed)
    found = [
        area(
            np.bincount(own[generator.integers(hits, size=hits)], minlength=size),
            np.bincount(other[generator.integers(others, size=others)], minlength=size),
        )
        for _ in range(draws)
    ]
    low, high = np.quantile(found, [LEVEL / 2, 1 - LEVEL / 2])
    return Auc(value, float(low), float(high)), left_out
