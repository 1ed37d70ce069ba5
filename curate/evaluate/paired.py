"""Differences between two arms, paired by seed, and whether chance explains them.

Each seed gives one difference, arm minus random, d_s. What makes them differ is the noise of
training and the *luck of the draw*: which examples this seed's random choice happened to get.

    T = mean(d) / (S c),   c^2 = 1/n + (r_a + r_b) / (1 - r_a + (1 - r_b) / m)

S is the standard deviation of the n differences; T is compared with Student's t, n - 1 degrees of
freedom. With r_a = r_b = 0, every seed having drawn both sets anew, this is the paired t test.

An arm that trains on the *same* set with every seed (r_a = 1) carries the luck of that one set into
all its differences alike: the seeds cannot show it, and the plain test takes a lucky draw for a
better one (in 32 of 100 cases with five seeds, 52 with ten). Under the hypothesis that the set is
as good as any random one, its luck has at most the variance that the random draws show, so that
c^2 = 1/n + 1 is enough; it is exact where training itself has no noise, cautious elsewhere.

Random may be drawn m times with each seed, since it is there that luck is seen. An arm with a set
of its own for each seed is then compared with the mean of the m; one with a single set with each
of them, which gives n m differences (`differences`).

`shared_luck` gives r for anything in between: the correlation of a sum over random sets of which
two share as many examples as the arm's sets do.

Departures from the textbook: the second term of c. It has the form of Nadeau and Bengio's corrected
resampled t test ("Inference for the generalization error", Machine Learning 52, 2003), which meets
the same trouble for overlapping training sets.

Shapes: n seeds, m random draws a seed.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

Floats = NDArray[np.float64]

_EXACT_SEEDS = 20
"""Up to here all 2^n sign patterns are counted."""


@dataclass(frozen=True, slots=True)
class PairedTest:
    """A mean difference and what chance does to it."""

    num: int
    """Differences: one a seed, or one for each seed and random draw."""
    mean: float
    """Mean of the differences, arm minus random."""
    spread: float
    """Their standard deviation (n - 1 in the denominator), the paper's S."""
    standard_error: float
    """S times c: of the mean, the luck of the sets included."""
    interval: tuple[float, float]
    """Ends of the interval that holds the true difference at the confidence asked for."""
    p: float
    """Two-sided p of the t test."""
    sign_flip_p: float
    """Two-sided p of the sign-flip test over seeds; it knows nothing of the luck of a fixed set."""


def differences(
    arm: Mapping[int, float], random: Sequence[Mapping[int, float]], *, is_fixed: bool
) -> list[float]:
    """Arm minus random, in order of seed.

    Args:
        arm: seed -> value.
        random: m times seed -> value, with the same seeds.
        is_fixed: whether the arm trained on one set throughout.

    Returns:
        n differences to the mean of the m; n m differences where the set is fixed.
    """
    seeds = sorted(arm)
    if is_fixed:
        return [arm[seed] - draw[seed] for seed in seeds for draw in random]
    return [arm[seed] - math.fsum(draw[seed] for draw in random) / len(random) for seed in seeds]


def luck_factor(num: int, arm: float = 0.0, baseline: float = 0.0, *, num_draws: int = 1) -> float:
    """c: the standard error of the mean difference, as a multiple of the differences' spread.

    Args:
        num: differences, n.
        arm: r_a in [0, 1], how far the arm's sets of different seeds share their luck; 0 is a
            set drawn anew with each seed, 1 the same set each time.
        baseline: r_b, the same of random.
        num_draws: m, random sets whose mean each difference is taken to.

    Returns:
        The square root of the formula above; infinite where both sets are fixed, since the
        differences then show no luck at all.
    """
    shown = 1 - arm + (1 - baseline) / num_draws
    return math.inf if shown <= 0 else math.sqrt(1 / num + (arm + baseline) / shown)


class Stratum(NamedTuple):
    """The sets of an arm inside one domain, where rows compete with each other."""

    kept: float
    """K: rows of a set, the mean over the seeds."""
    common: float
    """O: rows that two of the sets share, the mean over all pairs; K where there is one set."""
    size: float
    """N: rows to choose from."""


def shared_luck(strata: Iterable[Stratum]) -> float:
    """r: the correlation of two sets' luck, from the examples that they share.

        r = sum (O - K^2/N) / sum (K - K^2/N)

    The total of any property over a random set of K of N rows has a variance in proportion to
    K - K^2/N, and a covariance with that over another set in proportion to O - K^2/N, which is 0
    for independent draws; strata add up.

    Returns:
        r in [0, 1]; 0 where everything is kept, since nothing is drawn then.
    """
    shared = drawn = 0.0
    for kept, common, size in strata:
        chance = kept * kept / size if size else 0.0
        shared += common - chance
        drawn += kept - chance
    return min(1.0, max(0.0, shared / drawn)) if drawn > 1e-9 else 0.0


def paired_test(
    differences: Sequence[float],
    *,
    factor: float,
    level: float = 0.05,
    by_seed: Sequence[float] | None = None,
) -> PairedTest:
    """Test the hypothesis that the mean difference is 0.

    Args:
        differences: n >= 2 finite numbers, not all equal.
        factor: c of `luck_factor`; 1 / sqrt(n) is the plain paired t test.
        level: 1 minus the confidence of the interval.
        by_seed: one difference for each seed, for the sign-flip test; `differences` themselves
            where they are that.

    Raises:
        ValueError: fewer than two differences, one that is not finite, or no spread.
    """
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2 or not np.isfinite(values).all():
        raise ValueError("a paired test needs two or more finite differences")
    mean, spread = float(values.mean()), float(values.std(ddof=1))
    error = spread * factor
    if not error > 0:
        raise ValueError("the differences have no spread")
    freedom = len(values) - 1
    half = critical(level, freedom) * error
    p = min(1.0, 2 * float(special.stdtr(freedom, -abs(mean) / error)))
    return PairedTest(
        num=len(values),
        mean=mean,
        spread=spread,
        standard_error=error,
        interval=(mean - half, mean + half),
        p=p,
        sign_flip_p=sign_flip_p(differences if by_seed is None else by_seed),
    )


def critical(level: float, freedom: int) -> float:
    """The value that |t| passes with probability `level` by chance."""
    return -float(special.stdtrit(freedom, level / 2))


def sign_flip_p(differences: Sequence[float], *, num_draws: int = 100_000, seed: int = 0) -> float:
    """How often random signs give a mean at least as far from 0 as the one observed.

    Exact, by counting all 2^n patterns, up to 20 seeds; beyond, from `num_draws` random patterns,
    (1 + hits) / (1 + draws). The smallest value that n seeds can give is 2 / 2^n: 0.25 with three,
    0.0625 with five, so that no verdict can rest on it there.

    Args:
        differences: one per seed, finite.
        num_draws: random patterns beyond 20 seeds.
        seed: of those.

    Returns:
        p in (0, 1]; 1 where all differences are 0.
    """
    sizes = np.abs(np.asarray(differences, dtype=np.float64))
    observed = abs(math.fsum(differences))
    # Sums that are equal but for rounding count as equal.
    threshold = observed - 1e-12 * float(sizes.sum())
    if len(sizes) <= _EXACT_SEEDS:
        sums = np.zeros(1)
        for size in sizes:
            sums = np.concatenate((sums - size, sums + size))
        return float((np.abs(sums) >= threshold).mean())
    generator = np.random.default_rng(seed)
    hits, left = 0, num_draws
    while left:
        count = min(left, 10_000)
        signs = generator.integers(0, 2, size=(count, len(sizes))) * 2 - 1
        hits += int((np.abs(signs @ sizes) >= threshold).sum())
        left -= count
    return (1 + hits) / (1 + num_draws)
