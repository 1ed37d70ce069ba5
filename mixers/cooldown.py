"""Cooldown: small domains often at first, then natural proportions before they are over-fitted.

    p_i(tau) = n_i^(1/tau) / sum_j n_j^(1/tau);   tau = tau_hot before the switch, tau_cold after it

Source: Li, Xu, Tan, Murray and Khashabi, "Upsample or Upweight? Balanced Training on Heavily
Imbalanced Datasets", NAACL 2025, arXiv:2410.04579, Section 4. tau 5 then 1, the switch half-way.

Departures: the switch is a share of the token budget, not a step. Domains that are gone through
more than `max_epochs` times before the switch are named, with the switch that would prevent it.
Cost: none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from curate.config import STRICT
from curate.errors import ConfigError
from curate.plan.mixture import DomainSize, Mixture, Phase
from mixers.sizes import Unit, amounts, epochs, reasons, token_shares
from mixers.temperature import tempered_shares


def latest_switch(
    hot: Mapping[str, float],
    sizes: Mapping[str, DomainSize],
    *,
    budget_tokens: float,
    max_epochs: float,
) -> float:
    """Largest share of the budget after which no domain has been seen more than `max_epochs` times.

        min_i  max_epochs * n_i / (p_i(tau_hot) * budget), at most 1

    Args:
        hot: domain -> share of the tokens in the first phase, above 0.
        sizes: what there is of each domain.
        budget_tokens: tokens of both phases together.
        max_epochs: limit of passes.
    """
    limits = (
        max_epochs * sizes[domain].num_tokens / (share * budget_tokens)
        for domain, share in hot.items()
    )
    return min(1.0, *limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cooldown:
    """Two temperatures, one after the other."""

    __pydantic_config__: ClassVar = STRICT

    tau_hot: float = 5.0
    """Temperature of the first phase."""
    tau_cold: float = 1.0
    """Temperature of the second; 1 is natural."""
    switch: float = 0.5
    """Share of the token budget after which the second phase begins, in (0, 1)."""
    max_epochs: float = 4.0
    """A domain that the first phase goes through more often is named in the notes."""
    unit: Unit = "tokens"
    """What sizes and shares count."""

    def __post_init__(self) -> None:
        if not (self.tau_hot > 0 and self.tau_cold > 0):
            raise ConfigError(
                f"tau_hot is {self.tau_hot} and tau_cold {self.tau_cold}; both must be above 0",
                fix="remove them to use 5 and 1",
            )
        if not 0 < self.switch < 1:
            raise ConfigError(
                f"switch is {self.switch}, outside (0, 1)",
                fix="set mix.switch to a share of the budget such as 0.5",
            )

    def mixture(self, sizes: Mapping[str, DomainSize], *, budget_tokens: float) -> Mixture:
        """The hot phase, then the cold one."""
        there = amounts(sizes, self.unit)
        hot, cold = (
            token_shares(tempered_shares(there, tau), sizes, self.unit)
            for tau in (self.tau_hot, self.tau_cold)
        )
        phases = (Phase(self.switch, hot), Phase(1 - self.switch, cold))
        rules = dict.fromkeys(sizes, f"temperature {self.tau_hot:g} then {self.tau_cold:g}")
        why = reasons(phases, sizes, budget_tokens, rules)
        return Mixture("cooldown", phases, why, self._notes(phases[0], sizes, budget_tokens))

    def _notes(
        self, hot: Phase, sizes: Mapping[str, DomainSize], budget_tokens: float
    ) -> tuple[str, ...]:
        """Domains that are over-used before the switch, and the switch that avoids it."""
        passes = epochs(hot, sizes, budget_tokens)
        over = sorted(
            (domain for domain, times in passes.items() if times > self.max_epochs),
            key=lambda domain: (-passes[domain], domain),
        )
        if not over:
            return ()
        named = ", ".join(f"{domain} ({passes[domain]:.3g})" for domain in over[:5])
        more = f" and {len(over) - 5} more" if len(over) > 5 else ""
        switch = latest_switch(
            hot.weights, sizes, budget_tokens=budget_tokens, max_epochs=self.max_epochs
        )
        return (
            f"before the switch, more than {self.max_epochs:g} epochs of {named}{more}: "
            f"switch at {switch:.3g} of the budget, or use the mixer unimax",
        )
