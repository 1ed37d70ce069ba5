"""The mixture that a law thinks best, under limits of each share and near to the natural mixture.

    p* = argmin over the simplex, low <= p <= high, of  sum_i s_i L_i(p) + lambda KL(p, natural)

A law with derivatives is followed to its minimum; one without is asked about many mixtures.
Shapes: m domains of the mixture, q losses, D draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize

from curate.errors import ConfigError
from mixers.laws import Floats, Law, SmoothLaw

_SMALLEST = 1e-12
Shares = Sequence[float] | Floats


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is made small, and where."""

    shares: Floats
    """(q,) s, at least 0, summing to 1."""
    low: Floats
    """(m,) smallest share of each domain."""
    high: Floats
    """(m,) largest."""
    natural: Floats
    """(m,) shares of what there is, summing to 1; above 0 where `high` is."""
    penalty: float
    """lambda, nats."""


def wanted(
    size: int,
    num_losses: int,
    *,
    shares: Shares | None = None,
    low: Shares | None = None,
    caps: Shares | None = None,
    natural: Shares | None = None,
    penalty: float = 0.0,
) -> Wanted:
    """The same with its parts checked and scaled.

    Args:
        size: m.
        num_losses: q.
        shares: (q,) in any scale; equal unless given.
        low: (m,) smallest shares; 0 unless given.
        caps: (m,) largest shares: max_epochs times its tokens by the budget; 1 unless given.
        natural: (m,) in any scale; needed for the penalty.
        penalty: nats.

    Raises:
        ConfigError: the limits leave no mixture, or the penalty has nothing to compare with.
    """
    weights = np.ones(num_losses) if shares is None else np.asarray(shares, dtype=float)
    high = np.ones(size) if caps is None else np.minimum(np.asarray(caps, dtype=float), 1)
    if high.sum() < 1 - 1e-9:
        raise ConfigError(
            f"the caps add up to {high.sum():.3g} of the budget, and leave no mixture",
            fix="allow more epochs, or a smaller budget",
        )
    under = np.zeros(size) if low is None else np.minimum(np.asarray(low, dtype=float), high)
    if under.sum() > 1 + 1e-9:
        raise ConfigError(
            f"the smallest shares add up to {under.sum():.3g}", fix="lower some of them"
        )
    if penalty and natural is None:
        raise ConfigError("the penalty has no mixture to stay near", fix="give the natural shares")
    anchor = np.ones(size) if natural is None else np.asarray(natural, dtype=float)
    return Wanted(weights / weights.sum(), under, high, anchor / anchor.sum(), penalty)


def values(law: Law, want: Wanted, mixtures: Floats) -> Floats:
    """(D,) what is made small, of mixtures (D, m)."""
    found = law.losses(mixtures) @ want.shares
    if not want.penalty:
        return found
    free = want.high > 0
    held = np.maximum(mixtures[:, free], _SMALLEST)
    return found + want.penalty * (held * np.log(held / want.natural[free])).sum(1)


def smooth_optimum(law: SmoothLaw, want: Wanted) -> Floats:
    """(m,) the lowest point; where the law is convex, as all of ours are, the only one."""
    free = want.high > 0
    anchor = want.natural[free]

    def spread(part: Floats) -> Floats:
        mixture = np.zeros(len(free))
        mixture[free] = part
        return mixture

    def slopes(part: Floats) -> Floats:
        found = (want.shares @ law.gradients(spread(part)))[free]
        if want.penalty:
            found = found + want.penalty * (np.log(np.maximum(part, _SMALLEST) / anchor) + 1)
        return found

    found = minimize(
        lambda part: float(values(law, want, spread(part)[None])[0]),
        filled(want.natural[None], want)[0, free],
        jac=slopes,
        method="SLSQP",
        bounds=list(zip(want.low[free].tolist(), want.high[free].tolist(), strict=True)),
        constraints=[{"type": "eq", "fun": lambda p: p.sum() - 1, "jac": np.ones_like}],
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    best: Any = spread(np.clip(found.x, want.low[free], want.high[free]))
    return best / best.sum()


def drawn_optimum(law: Law, want: Wanted, draws: Floats, *, best: int = 100) -> Floats:
    """(m,) the mean of the mixtures that the law thinks best; within the limits, as they are.

    Args:
        law: any.
        want: limits and weights.
        draws: (D, m) mixtures; each is brought within the limits first.
        best: how many are averaged.
    """
    within = filled(draws, want)
    order = np.argsort(values(law, want, within), kind="stable")
    return within[order[:best]].mean(0)


def filled(shares: Floats, want: Wanted) -> Floats:
    """(D, m) mixtures within the limits: what is over a cap goes to the domains with room.

    Args:
        shares: (D, m) mixtures.
        want: limits.
    """
    found = np.minimum(want.low + (1 - want.low.sum()) * shares, want.high)
    rest = np.maximum(1 - found.sum(1, keepdims=True), 0)
    room = want.high - found
    # The rest is never more than all the room together, so that one pass is enough.
    found = found + rest * room / np.maximum(room.sum(1, keepdims=True), _SMALLEST)
    return found / found.sum(1, keepdims=True)
