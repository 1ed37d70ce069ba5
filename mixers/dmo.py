"""DMO: a fine-tuning mixture from laws of each domain's loss in the tokens it gets.

    L_i(w) = C_i (w_i N + T_i)^-beta_i + E_i,   T_i = k_i (N - w_i N)^alpha_i
    w*     = argmin over the simplex, w_i <= max_epochs n_i / N, of
             sum_i s_i L_i(w) + lambda KL(w, natural)                               (N tokens)

A run for equal amounts, and for each domain four more with 1/3, 1/2, 2 and 3 times its amount. What
the others lend a domain, T, grows with them; the best mixture depends on N.

Source: Li, Liu and Xing, "Data Mixing Optimization for Supervised Fine-Tuning of Large Language
Models", ICML 2025, arXiv:2508.11953.

Departures: k and alpha of a domain cannot be told apart from the five runs in which it alone
varies, as the others then have one amount. They are fitted to all runs, in which the others vary
too; where these do not, T is a constant. The penalty and the limits of repeats are ours.
Cost: 4 m + 1 runs.
Shapes: n runs, m domains.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import numpy as np
from scipy.optimize import least_squares

from curate.config import STRICT
from curate.errors import ConfigError, InputError
from mixers.laws import Floats
from mixers.proxy_settings import Proxy

FACTORS = (1 / 3, 1 / 2, 2.0, 3.0)
"""Of a domain's amount, in the runs in which it alone varies."""
STEEPEST = 3.0
"""Largest beta of a fit; one that reaches it is not determined by its runs."""
_HUBER = 0.01
"""Nats from which residuals count linearly."""
_STARTS = ((0.3, 0.15, 0.3), (0.3, 0.5, 0.8), (0.8, 0.15, 0.8), (0.8, 0.5, 0.3))
"""E as a share of the lowest loss, beta and alpha."""
_SMALLEST = 1e-12
_SAME = 1.05
"""Amounts of the other domains within this ratio cannot say how what they lend grows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DMO:
    """For fine-tuning: from runs in which one domain after the other has less and more tokens."""

    __pydantic_config__: ClassVar = STRICT

    results: str | None = None
    """File of runs made elsewhere, with `tokens.DOMAIN` and `loss.DOMAIN` of every domain; by
    default the runs are made here."""
    target: dict[str, float] = field(default_factory=dict[str, float])
    """Domain -> weight of its loss in what is made small; all alike where none is given."""
    max_epochs: float = 4.0
    """Most passes over a domain."""
    penalty: float = 0.0
    """Nats for each nat by which the mixture diverges from the natural one."""
    check: bool = True
    """Train two proxies more, of the first one's length: on the mixture that is best there, and on
    the natural one; say what came of it."""
    proxy: Proxy = field(default_factory=Proxy)
    """How a proxy is trained; `steps` are those of the run with equal amounts, and the others have
    more or fewer."""

    def __post_init__(self) -> None:
        if not self.max_epochs > 0:
            raise ConfigError(
                f"max_epochs is {self.max_epochs}, not above 0",
                fix="set mix.max_epochs to a number of passes such as 4",
            )
        if self.penalty < 0:
            raise ConfigError(f"penalty is {self.penalty}, below 0", fix="set mix.penalty to 0")
        if any(weight < 0 for weight in self.target.values()):
            raise ConfigError("a weight of target is below 0", fix="set mix.target from 0 up")


@dataclass(frozen=True, slots=True)
class TransferLaw:
    """Losses of all domains, each as a function of its own tokens and of all others."""

    scales: Floats
    """(m,) C."""
    loans: Floats
    """(m,) k, tokens of the others to the power alpha; in tokens where alpha is 0."""
    growths: Floats
    """(m,) alpha, from 0 to 1."""
    decays: Floats
    """(m,) beta."""
    floors: Floats
    """(m,) E."""

    def losses(self, amounts: Floats) -> Floats:
        """(n, m) losses after training on so many tokens of each domain (n, m)."""
        others = np.maximum(amounts.sum(1, keepdims=True) - amounts, 1.0)
        total = amounts + self.loans * others**self.growths
        return self.scales * np.maximum(total, _SMALLEST) ** -self.decays + self.floors


@dataclass(frozen=True, slots=True)
class AtBudget:
    """The law for mixtures of a budget."""

    law: TransferLaw
    budget: float
    """N, tokens."""

    def losses(self, mixtures: Floats) -> Floats:
        """(n, m) predicted losses of mixtures (n, m)."""
        return self.law.losses(mixtures * self.budget)

    def gradients(self, mixture: Floats) -> Floats:
        """(m, m) derivatives at one mixture (m,): a domain's loss knows its own share alone."""
        law, own = self.law, mixture * self.budget
        others = np.maximum(self.budget - own, 1.0)
        total = np.maximum(own + law.loans * others**law.growths, _SMALLEST)
        lent = law.loans * law.growths * others ** (law.growths - 1)
        slopes = -law.decays * law.scales * total ** (-law.decays - 1) * self.budget * (1 - lent)
        return np.diag(slopes)


def design(num_domains: int, start: float) -> Floats:
    """(4 m + 1, m) tokens of each domain in each run: equal, then each domain by itself varied."""
    amounts = np.full((1 + len(FACTORS) * num_domains, num_domains), float(start))
    for domain in range(num_domains):
        for place, factor in enumerate(FACTORS):
            amounts[1 + len(FACTORS) * domain + place, domain] *= factor
    return amounts


def fit(amounts: Floats, losses: Floats) -> TransferLaw:
    """The law by least squares with Huber's loss, domain by domain.

    Args:
        amounts: (n, m) tokens of each domain in each run.
        losses: (n, m) nats, of each domain.

    Raises:
        InputError: too few runs, or a number that is none.
    """
    if len(amounts) < 5:
        raise InputError(
            f"{len(amounts)} runs are too few: a domain's law has up to five free numbers",
            fix=f"make {4 * amounts.shape[1] + 1}: equal amounts, then four of each domain",
        )
    if not (np.isfinite(amounts).all() and np.isfinite(losses).all() and (amounts >= 0).all()):
        raise InputError(
            "a run has a loss or an amount that is no finite number", fix="leave the run out"
        )
    others = amounts.sum(1, keepdims=True) - amounts
    parts = [_fit_one(*each) for each in zip(amounts.T, others.T, losses.T, strict=True)]
    return TransferLaw(*(np.array(part) for part in zip(*parts, strict=True)))


def _fit_one(own: Floats, others: Floats, losses: Floats) -> tuple[float, ...]:
    """C, k, alpha, beta and E of one domain."""
    unit = float(own.mean())  # amounts near 1, so that all five numbers have like sizes
    mine, theirs = own / unit, np.maximum(others, 1.0) / unit
    grows = theirs.max() > _SAME * theirs.min()
    low = float(losses.min())

    def parts(values: Floats) -> tuple[Floats, Floats, Floats]:
        """Tokens lent, tokens in all, and what of the loss they can take away."""
        lent = np.exp(values[1]) * theirs ** (values[2] if grows else 0.0)
        total = mine + lent
        return lent, total, np.exp(values[0]) * total ** -values[3]

    def residuals(values: Floats) -> Floats:
        return parts(values)[2] + values[4] - losses

    def jacobian(values: Floats) -> Floats:
        lent, total, part = parts(values)
        by_loan = -values[3] * part * lent / total
        by_growth = by_loan * np.log(theirs) * grows
        ones = np.ones_like(part)
        return np.column_stack([part, by_loan, by_growth, -part * np.log(total), ones])

    bounds = ([-20.0, -15.0, 0.0, 1e-3, 0.0], [20.0, 10.0, 1.0, STEEPEST, max(low, 1e-9)])

    def descended(start: Floats, most: int) -> Any:
        return least_squares(
            residuals, start, bounds=bounds, method="trf", loss="huber", f_scale=_HUBER,
            jac=cast(Any, jacobian), x_scale="jac", xtol=1e-12, ftol=1e-12, gtol=1e-12,
            max_nfev=most,
        )  # fmt: skip

    starts = [
        np.array([np.log(max(low * (1 - floor), 1e-6)), np.log(0.3), alpha, beta, floor * low])
        for floor, beta, alpha in _STARTS
    ]
    # A few steps tell which start is good; only that one is followed to its end.
    first = min((descended(start, 20) for start in starts), key=lambda found: found.cost)
    best = descended(np.clip(first.x, *bounds), 200)
    scale, loan, growth, beta, floor = best.x
    growth = growth if grows else 0.0
    return (
        float(np.exp(scale) * unit**beta), float(np.exp(loan) * unit ** (1 - growth)),
        float(growth), float(beta), float(floor),
    )  # fmt: skip
