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
import numpy.typing as npt
from scipy.optimize import least_squares, minimize

from curate.errors import ConfigError, InputError
from curate.evaluate.agreement import rank_correlation

Floats = npt.NDArray[np.float64]

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


def fit(mixtures: Floats, losses: Floats) -> MixingLaw:
    """The law by least squares, target by target.

    Args:
        mixtures: (n, m) rows on the simplex.
        losses: (n, q) nats.

    Raises:
        InputError: too few runs, a mixture that is none, or a loss that is no number.
    """
    _check(mixtures, losses)
    fitted = [_fit_one(mixtures, own) for own in losses.T]
    floors, scales, slopes = (np.array(each) for each in zip(*fitted, strict=True))
    return MixingLaw(floors, scales, slopes)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """How well runs are foretold that a law was not fitted on."""

    spearman: Floats
    """(q,) rank correlation over all runs; NaN where losses do not differ."""
    error: Floats
    """(q,) mean absolute difference, nats."""


def held_out(mixtures: Floats, losses: Floats, *, folds: int = 5, seed: int = 0) -> HeldOut:
    """Each run foretold by a law of the other folds.

    Args:
        mixtures: (n, m).
        losses: (n, q).
        folds: parts that are left out in turn.
        seed: of the assignment to folds.

    Raises:
        InputError: too few runs for that many folds.
    """
    places = np.random.default_rng(seed).permutation(len(mixtures)) % folds
    foretold = np.empty_like(losses)
    for fold in range(folds):
        own = places == fold
        foretold[own] = fit(mixtures[~own], losses[~own]).losses(mixtures[own])
    ranks = [
        rank_correlation(one, two) if np.ptp(one) > 0 and np.ptp(two) > 0 else np.nan
        for one, two in zip(foretold.T, losses.T, strict=True)
    ]
    return HeldOut(np.array(ranks), np.abs(foretold - losses).mean(0))


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
    size = law.slopes.shape[1]
    weights = np.ones(len(law.floors)) if shares is None else np.asarray(shares, dtype=float)
    weights = weights / weights.sum()
    upper = np.ones(size) if caps is None else np.minimum(np.asarray(caps, dtype=float), 1)
    if upper.sum() < 1:
        raise ConfigError(
            f"the caps add up to {upper.sum():.3g} of the budget, and leave no mixture",
            fix="allow more epochs, or a smaller budget",
        )
    if penalty and natural is None:
        raise ConfigError("the penalty has no mixture to stay near", fix="give the natural shares")
    anchor = np.full(size, 1 / size) if natural is None else np.asarray(natural, dtype=float)
    anchor = anchor / anchor.sum()

    def value(mixture: Floats) -> tuple[float, Floats]:
        rises = law.scales * np.exp(law.slopes @ mixture) * weights
        held = np.maximum(mixture, _SMALLEST)
        ratio = np.log(held / anchor) if penalty else np.zeros(size)
        total = float(weights @ law.floors + rises.sum() + penalty * (held * ratio).sum())
        return total, rises @ law.slopes + penalty * (ratio + 1)

    start = _under(anchor, upper)
    found = minimize(
        value,
        start,
        jac=True,
        method="SLSQP",
        bounds=[(0.0, float(high)) for high in upper],
        constraints=[{"type": "eq", "fun": lambda p: p.sum() - 1, "jac": np.ones_like}],
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    best = np.clip(found.x, 0, upper)
    return best / best.sum()


def _under(shares: Floats, caps: Floats) -> Floats:
    """Shares as near as may be, none above its cap: what is over goes to those with room."""
    found = np.minimum(shares, caps)
    for _ in range(len(shares)):
        rest = 1 - found.sum()
        if rest <= 0:
            break
        room = caps - found
        found = np.minimum(found + rest * room / room.sum(), caps)
    return found


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
            max_nfev=2000,
        )  # fmt: skip
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    shift = float(best.x[2:].mean())
    return float(best.x[0]), float(np.exp(best.x[1] + shift)), best.x[2:] - shift


def _check(mixtures: Floats, losses: Floats) -> None:
    num, size = mixtures.shape
    if num < size + 2:
        raise InputError(
            f"{num} runs are too few for {size} domains",
            fix=f"give {3 * (size + 1)} or more, with different mixtures",
        )
    wrong = (mixtures < 0).any(1) | (np.abs(mixtures.sum(1) - 1) > 1e-3)
    if wrong.any():
        row = int(wrong.argmax())
        raise InputError(
            f"the mixture of run {row} adds up to {mixtures[row].sum():.6g}, or has shares below 0",
            fix="give shares of the tokens that add up to 1",
        )
    if not np.isfinite(losses).all():
        row = int((~np.isfinite(losses)).any(1).argmax())
        raise InputError(f"a loss of run {row} is no finite number", fix="leave the run out")
