"""Mixing law: a domain's loss as a function of the mixture, fitted on small runs, and its optimum.

    L_i(p) = c_i + k_i exp(sum_j t_ij p_j),  k_i > 0
    p*     = argmin over the simplex, p_j <= cap_j, of  sum_i s_i L_i(p) + lambda KL(p, natural)

Source: Ye, Liu, Sun, Zhan, Zhou and Qiu, "Data Mixing Laws: Optimizing Data Mixtures by Predicting
Language Modeling Performance", ICLR 2025, arXiv:2403.16952, equation 1. The penalty is Olmix'.

Departures: least squares from a few starts that are the same each time, where the authors take
hundreds at random; of t only differences matter on the simplex, so that its mean over domains is 0.
The formula is fitted as it stands, without the authors' boosting.
Cost: none beside the runs. With m domains a law has m + 1 free numbers: 3 (m + 1) runs are a start.
Shapes: n runs, m domains of the mixture, q losses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from scipy.optimize import least_squares

from mixers import laws
from mixers.law_optimum import smooth_optimum, wanted
from mixers.laws import FOLDS, Floats, HeldOut, check_runs

__all__ = ["Floats", "HeldOut", "MixingLaw", "fit", "held_out", "optimum"]

_GAPS = (0.02, 0.1, 0.5, 2.0)
"""Starts: how far c lies below the lowest loss, as shares of the range of losses."""
_SMALLEST = 1e-12


@dataclass(frozen=True, slots=True)
class MixingLaw:
    """Losses of all targets, as functions of the mixture."""

    floors: Floats
    """(q,) c: what no mixture gets below."""
    scales: Floats
    """(q,) k, above 0."""
    slopes: Floats
    """(q, m) t: below 0 where more of the domain lowers the loss; each row has the mean 0."""

    def losses(self, mixtures: Floats) -> Floats:
        """(n, q) predicted losses of mixtures (n, m)."""
        return self.floors + self.scales * np.exp(mixtures @ self.slopes.T)

    def gradients(self, mixture: Floats) -> Floats:
        """(q, m) derivatives of the losses at one mixture (m,)."""
        return (self.scales * np.exp(self.slopes @ mixture))[:, None] * self.slopes


def fit(mixtures: Floats, losses: Floats) -> MixingLaw:
    """The law by least squares, target by target.

    Args:
        mixtures: (n, m) rows on the simplex.
        losses: (n, q) nats.

    Raises:
        InputError: too few runs, a mixture that is none, or a loss that is no number.
    """
    check_runs(mixtures, losses, least=mixtures.shape[1] + 2)
    fitted = [_fit_one(mixtures, own) for own in losses.T]
    floors, scales, slopes = (np.array(each) for each in zip(*fitted, strict=True))
    return MixingLaw(floors, scales, slopes)


def held_out(mixtures: Floats, losses: Floats, *, folds: int = FOLDS, seed: int = 0) -> HeldOut:
    """Each run foretold by a law of the other folds; arguments as in `mixers.laws.held_out`."""
    return laws.held_out(fit, mixtures, losses, folds=folds, seed=seed)


def optimum(
    law: MixingLaw,
    *,
    shares: Sequence[float] | Floats | None = None,
    caps: Sequence[float] | Floats | None = None,
    natural: Sequence[float] | Floats | None = None,
    penalty: float = 0.0,
) -> Floats:
    """(m,) the mixture with the lowest weighted sum of losses; a convex problem, so the only one.

    Args:
        law: of all losses.
        shares: (q,) s, at least 0; equal unless given.
        caps: (m,) largest share of each domain: max_epochs times its tokens by the budget.
        natural: (m,) shares of what there is, above 0; needed for the penalty.
        penalty: lambda, nats.

    Raises:
        ConfigError: the caps leave no mixture, or the penalty has nothing to compare with.
    """
    num_losses, size = law.slopes.shape
    want = wanted(size, num_losses, shares=shares, caps=caps, natural=natural, penalty=penalty)
    return smooth_optimum(law, want)


def _fit_one(mixtures: Floats, losses: Floats) -> tuple[float, float, Floats]:
    """c, k and t of one target."""
    size = mixtures.shape[1]
    low, spread = float(losses.min()), float(np.ptp(losses))
    if spread <= _SMALLEST * max(1.0, abs(low)):
        return low - 1.0, 1.0, np.zeros(size)

    def rises(values: Floats) -> Floats:
        return np.exp(np.clip(values[1] + mixtures @ values[2:], -700, 700))

    def residuals(values: Floats) -> Floats:
        return values[0] + rises(values) - losses

    def jacobian(values: Floats) -> Floats:
        rise = rises(values)
        return np.column_stack([np.ones_like(rise), rise, rise[:, None] * mixtures])

    best = None
    for gap in _GAPS:
        floor = low - gap * spread
        # log k and t by linear least squares; on the simplex they share one direction.
        logs, *_ = np.linalg.lstsq(mixtures, np.log(losses - floor), rcond=None)
        start = np.concatenate([[floor, float(logs.mean())], logs - logs.mean()])
        found = least_squares(
            residuals, start, cast(Any, jacobian), method="trf", xtol=1e-15, ftol=1e-15, gtol=1e-15,
            max_nfev=300,
        )  # fmt: skip
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    shift = float(best.x[2:].mean())
    return float(best.x[0]), float(np.exp(best.x[1] + shift)), best.x[2:] - shift
