"""UniMax: as uniform as possible without going through any domain more than N times.

    smallest domain first:  U_i = min(B_i / (k - i), N * n_i);  B_(i+1) = B_i - U_i;  p = U / sum U

Source: Chung, Constant, Garcia, Roberts, Tay, Narang and Firat, "UniMax: Fairer and More Effective
Language Sampling for Large-Scale Multilingual Pretraining", ICLR 2023, arXiv:2304.09151,
Algorithm 1. B_0 is the training budget.

Departures: tokens instead of characters; N is 4 instead of 1, the usual limit of repetition for
pre-training. Where the budget is more than N epochs of everything, the paper's weights are kept and
the mixture says how many tokens can be had: stretching them to the budget would break the limit.
Cost: none.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from curate.config import STRICT
from curate.errors import ConfigError
from curate.plan.mixture import DomainSize, Mixture
from mixers.sizes import Unit, amounts, mean_tokens, one_phase


def capped_amounts(
    amounts: Mapping[str, float],
    prices: Mapping[str, float],
    *,
    budget: float,
    max_epochs: float,
) -> dict[str, float]:
    """Domain -> amount to draw: the same everywhere, but at most `max_epochs` times what is there.

    Args:
        amounts: domain -> size, in the unit in which domains shall be equal.
        prices: domain -> tokens for one unit; 1 where the unit is tokens.
        budget: tokens in all; less is used where every domain reaches its limit.
        max_epochs: the paper's N.
    """
    # sorted() is stable, and equal sizes get equal amounts: the order of input cannot matter.
    ascending = sorted(amounts, key=lambda domain: amounts[domain])
    left, price_left = budget, math.fsum(prices.values())
    drawn = dict.fromkeys(amounts, 0.0)
    for domain in ascending:
        drawn[domain] = min(left / price_left, max_epochs * amounts[domain])
        left = max(0.0, left - drawn[domain] * prices[domain])
        price_left -= prices[domain]
    return drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class UniMax:
    """Uniform under a limit of epochs; the default mixer."""

    __pydantic_config__: ClassVar = STRICT

    max_epochs: float = 4.0
    """Most passes over a domain, the paper's N."""
    unit: Unit = "tokens"
    """What is made equal: tokens or examples."""

    def __post_init__(self) -> None:
        if not self.max_epochs > 0:
            raise ConfigError(
                f"max_epochs is {self.max_epochs}, not above 0",
                fix="set mix.max_epochs to a number of passes such as 4",
            )

    def mixture(self, sizes: Mapping[str, DomainSize], *, budget_tokens: float) -> Mixture:
        """The capped uniform mixture for this budget."""
        prices = {
            domain: 1.0 if self.unit == "tokens" else mean_tokens(size)
            for domain, size in sizes.items()
        }
        there = amounts(sizes, self.unit)
        drawn = capped_amounts(there, prices, budget=budget_tokens, max_epochs=self.max_epochs)
        tokens = {domain: drawn[domain] * prices[domain] for domain in sizes}
        total = math.fsum(tokens.values())
        rules = {
            domain: f"the limit of {self.max_epochs:g} epochs"
            if drawn[domain] >= self.max_epochs * there[domain]
            else f"an equal part of the {self.unit} that are left"
            for domain in sizes
        }
        notes: tuple[str, ...] = ()
        if total < budget_tokens * (1 - 1e-9):
            notes = (
                f"{self.max_epochs:g} epochs of everything are {total:,.0f} tokens, less than the "
                f"budget of {budget_tokens:,.0f}: stop there, or raise mix.max_epochs",
            )
        weights = {domain: value / total for domain, value in tokens.items()}
        return one_phase("unimax", weights, sizes, min(total, budget_tokens), rules, notes)
