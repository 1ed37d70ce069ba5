"""What a comparison could have found: the power of its t test, the smallest detectable difference.

With standard error sigma * c, a true difference delta and T as in `paired`, T has the noncentral t
distribution with noncentrality delta / (sigma c). The power is the chance that |T| passes the
critical value, on either side.

sigma is not known: three to five seeds estimate it badly, and a difference computed as if S were
sigma is too small half of the time. The *detectable difference* therefore carries that uncertainty:

    delta = k S c,   k such that  E[ P(|(Z + k U) / V| > t) ] = power

with Z standard normal and U, V independent, each sqrt(chi2 / (n - 1)): U the spread of this run, V
that of the repetition. In words: repeat the comparison with a true difference of that size, and the
verdict finds it with at least the power asked for, our ignorance of the spread included. With five
seeds k is 4.68 where a known sigma would give 3.76; with three 8.77 in place of 5.65.

Shapes: Q nodes of the quadrature.
"""

from functools import cache
from typing import cast

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from curate.evaluate.paired import critical

Floats = NDArray[np.float64]

_NODES = 120


def power(effect: float, *, num_seeds: int, level: float = 0.05) -> float:
    """Chance that the two-sided t test finds a true difference.

    Args:
        effect: the difference over the true standard error of its mean, delta / (sigma c).
        num_seeds: n >= 2.
        level: of the test.

    Returns:
        A probability, at least `level`.
    """
    ratios, weights = _spreads(num_seeds)
    return float(_found(np.float64(effect), ratios, critical(level, num_seeds - 1)) @ weights)


def detectable_difference(
    standard_error: float, *, num_seeds: int, level: float = 0.05, chance: float = 0.8
) -> float:
    """The smallest true difference that a repetition would find with the given chance.

    Args:
        standard_error: as observed, S times c; its uncertainty is accounted for.
        num_seeds: n >= 2.
        level: at which the verdict is given, correction across arms included.
        chance: the power asked for, in (level, 1).

    Returns:
        A difference in the metric's own unit, > 0.
    """
    return standard_error * _multiple(num_seeds, level, chance)


@cache
def _multiple(num_seeds: int, level: float, chance: float) -> float:
    """k: the detectable difference over the observed standard error."""
    ratios, weights = _spreads(num_seeds)
    limit = critical(level, num_seeds - 1)

    def excess(multiple: float) -> float:
        found = _found(multiple * ratios[:, None], ratios, limit)  # (Q, Q)
        return float(weights @ found @ weights) - chance

    top = 2 * limit
    while excess(top) < 0:
        top *= 2
    return cast(float, optimize.brentq(excess, 0.0, top, xtol=1e-9))


def _found(shift: Floats | np.float64, ratios: Floats, limit: float) -> Floats:
    """Chance that |Z + shift| passes limit * V, for each observed-to-true spread V in `ratios`."""
    edge = limit * ratios
    return special.ndtr(shift - edge) + special.ndtr(-shift - edge)


@cache
def _spreads(num_seeds: int) -> tuple[Floats, Floats]:
    """Nodes (Q,) and weights (Q,) to average over sqrt(chi2 / (n - 1)), by its quantiles."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    freedom = num_seeds - 1
    upper = special.chdtri(freedom, (nodes + 1) / 2)  # the inverse of the upper tail
    return np.sqrt(upper / freedom), weights / 2
