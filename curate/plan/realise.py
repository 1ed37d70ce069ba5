"""From shares to whole numbers: how far each group is gone through, and how often.

Shapes: P phases, D domains, G groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from curate.errors import CurateError
from curate.plan.groups import Group
from curate.plan.mixture import Mixture
from curate.plan.settings import Keep

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Supply:
    """What there is of a group."""

    group: Group
    rows: int
    """Training rows."""
    tokens: int
    eligible_rows: int
    """Those that have a score and were not dropped."""
    eligible_tokens: int


@dataclass(frozen=True, slots=True)
class Demand:
    """How far each group is gone through by the end of each phase."""

    unit: Literal["rows", "tokens"]
    asked: int
    """Rows or tokens that the settings ask for, copies counted."""
    shares: tuple[float, ...]
    """(G,) share of all rows or tokens that each group was to get, before limits."""
    steps: tuple[tuple[int, ...], ...]
    """(G, P) rows or tokens, rising from phase to phase; beyond what is there, it starts again."""

    @property
    def placed(self) -> int:
        """Rows or tokens that found a place; fewer than asked where limits do not allow more."""
        return sum(steps[-1] for steps in self.steps)


def water_fill(weights: Floats, budgets: Floats, limits: Floats) -> Floats:
    """(P, D) quotas in proportion to the weights, no domain above its limit.

    What a domain cannot take goes to the others, in each phase in proportion to their weights,
    until nobody is above or nobody is left. A domain at its limit keeps its proportions between
    phases.

    Args:
        weights: (P, D) 0 or more.
        budgets: (P,) to give out in each phase.
        limits: (D,) most that a domain takes in all phases together.

    Returns:
        Rows sum to the budgets unless all domains with a weight in a phase are at their limits.
    """
    totals = weights.sum(axis=1, keepdims=True)
    shares = np.divide(weights, totals, out=np.zeros_like(weights), where=totals > 0)
    quotas = shares * budgets[:, None]
    full = np.zeros(weights.shape[1], np.bool_)
    while True:
        taken = quotas.sum(axis=0)
        over = ~full & (taken > limits * (1 + 1e-12))
        if not over.any():
            return quotas
        quotas[:, over] *= limits[over] / taken[over]
        full |= over
        free = np.where(full, 0.0, weights)
        free_total = free.sum(axis=1, keepdims=True)
        missing = budgets[:, None] - quotas.sum(axis=1, keepdims=True)
        quotas += np.divide(
            free * missing, free_total, out=np.zeros_like(free), where=free_total > 0
        )


def whole_numbers(quotas: Floats, total: int, limits: Ints) -> Ints:
    """(D,) whole numbers near the quotas that sum to the total, by largest remainder.

    Args:
        quotas: (D,) 0 or more; who has nothing gets nothing.
        total: sum that is wanted.
        limits: (D,) never exceeded: where they forbid it, the sum stays below the total.
    """
    floors = np.minimum(np.floor(quotas), limits).astype(np.int64)
    order = np.argsort(floors - quotas, kind="stable")  # largest remainder first
    left = total - int(floors.sum())
    while left > 0:
        takers = [i for i in order.tolist() if quotas[i] > 0 and floors[i] < limits[i]][:left]
        if not takers:
            break
        floors[takers] += 1
        left -= len(takers)
    return floors


def share_out(shares: Floats, total: int, limits: Ints) -> Ints:
    """(D,) whole numbers in proportion to the shares, summing to the total, within the limits."""
    quotas = water_fill(shares[None], np.array([float(total)]), limits.astype(np.float64))[0]
    return whole_numbers(quotas, total, limits)


def asked_amount(keep: Keep, supplies: Sequence[Supply]) -> tuple[Literal["rows", "tokens"], int]:
    """Unit and amount that the settings ask for."""
    if keep.examples is not None:
        return "rows", keep.examples
    if keep.share is not None:
        return "rows", round(keep.share * sum(supply.rows for supply in supplies))
    if keep.tokens is not None:
        return "tokens", int(keep.tokens)
    assert keep.token_share is not None
    return "tokens", int(keep.token_share * sum(supply.tokens for supply in supplies))


def demand(
    supplies: Sequence[Supply], keep: Keep, *, mixture: Mixture | None, most_copies: float
) -> Demand:
    """How far each group is gone through.

    Without a mixture every group gives the same share of its rows or tokens. With one, a domain's
    share of the tokens is its weight; where rows are counted, its rows are in proportion to weight
    over mean length. What a group cannot give, the others give.

    Args:
        supplies: (G,) one for each group.
        keep: how much is kept.
        mixture: shares of domains; groups lie within domains then.
        most_copies: how often a group may be gone through.

    Raises:
        CurateError: the mixture does not know a domain.
    """
    # Equal remainders go to the first name, not to what happens to stand first in the input.
    order = sorted(range(len(supplies)), key=lambda code: supplies[code].group)
    found = _demand([supplies[code] for code in order], keep, mixture, most_copies)
    back = np.argsort(order).tolist()
    return replace(
        found,
        shares=tuple(found.shares[at] for at in back),
        steps=tuple(found.steps[at] for at in back),
    )


def _demand(
    supplies: Sequence[Supply], keep: Keep, mixture: Mixture | None, most_copies: float
) -> Demand:
    unit, asked = asked_amount(keep, supplies)
    eligible = [s.eligible_rows if unit == "rows" else s.eligible_tokens for s in supplies]
    limits = np.floor(np.array(eligible, np.float64) * most_copies).astype(np.int64)
    amounts = np.array([s.rows if unit == "rows" else s.tokens for s in supplies], np.float64)
    if mixture is None:
        placed = share_out(amounts, asked, limits)
        shares = amounts / max(1.0, amounts.sum())
        steps = tuple((int(amount),) for amount in placed)
        return Demand(unit, asked, tuple(shares.tolist()), steps)
    return _mixed(supplies, mixture, unit, asked, limits, amounts)


def _mixed(
    supplies: Sequence[Supply],
    mixture: Mixture,
    unit: Literal["rows", "tokens"],
    asked: int,
    limits: Ints,
    amounts: Floats,
) -> Demand:
    domains = list(dict.fromkeys(supply.group.domain for supply in supplies))
    of = np.array([domains.index(supply.group.domain) for supply in supplies])
    weights = _weights(supplies, domains, mixture)
    if unit == "rows":
        weights = weights / _mean_tokens(supplies, of, len(domains))
    per_phase = weights.sum(axis=1)
    budgets = asked * per_phase / max(per_phase.sum(), 1e-300)
    domain_limits = np.bincount(of, limits, len(domains)).astype(np.float64)
    quotas = water_fill(weights, budgets, domain_limits)
    totals = whole_numbers(quotas.sum(axis=0), asked, domain_limits.astype(np.int64))
    # (D, P) part of a domain's total that is reached by the end of each phase.
    reached = np.cumsum(quotas, axis=0) / np.maximum(quotas.sum(axis=0), 1e-300)
    shares = weights.sum(axis=0) / max(weights.sum(), 1e-300)
    group_shares = np.zeros(len(supplies))
    steps = list[tuple[int, ...]]([()] * len(supplies))
    for domain in range(len(domains)):
        own = np.flatnonzero(of == domain)
        placed = share_out(amounts[own], int(totals[domain]), limits[own])
        group_shares[own] = shares[domain] * amounts[own] / max(1.0, amounts[own].sum())
        for group, amount in zip(own.tolist(), placed.tolist(), strict=True):
            inner = [int(part * amount + 1e-6) for part in reached[:-1, domain].tolist()]
            steps[group] = (*inner, amount)
    return Demand(unit, asked, tuple(group_shares.tolist()), tuple(steps))


def _weights(supplies: Sequence[Supply], domains: Sequence[str], mixture: Mixture) -> Floats:
    """(P, D) share of all tokens."""
    tokens = dict.fromkeys(domains, 0)
    for supply in supplies:
        tokens[supply.group.domain] += supply.tokens
    for domain in domains:
        if domain not in mixture.phases[0].weights and tokens[domain] > 0:
            raise CurateError(
                f"the mixture {mixture.mixer} has no weight for the domain {domain}",
                fix="run `curate mix` again: the data have changed since",
            )
    return np.array(
        [
            [phase.share * phase.weights.get(domain, 0.0) for domain in domains]
            for phase in mixture.phases
        ]
    )


def _mean_tokens(supplies: Sequence[Supply], of: NDArray[np.intp], num_domains: int) -> Floats:
    """(D,) mean length of the eligible examples; 1 where there are none."""
    rows = np.bincount(of, [s.eligible_rows for s in supplies], num_domains)
    tokens = np.bincount(of, [s.eligible_tokens for s in supplies], num_domains)
    return np.where((rows > 0) & (tokens > 0), tokens / np.maximum(rows, 1), 1.0)
