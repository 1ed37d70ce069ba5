"""Fixed: weights given by hand, from a paper, another run or judgement.

    p_i = w_i / sum_j w_j

Source: none.

Departures: none.
Cost: none.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from curate.config import STRICT, nearest
from curate.errors import ConfigError
from curate.plan.mixture import DomainSize, Mixture
from mixers.sizes import one_phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """The user's own weights."""

    __pydantic_config__: ClassVar = STRICT

    weights: dict[str, float]
    """Domain -> share of the tokens, in any scale; domains that are not named get nothing."""

    def __post_init__(self) -> None:
        for domain, weight in self.weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ConfigError(
                    f"the weight of {domain} is {weight}",
                    fix="set mix.weights to numbers from 0 up",
                )
        if not math.fsum(self.weights.values()) > 0:
            raise ConfigError(
                "no weight is above 0", fix="give at least one domain a weight: {news: 0.7}"
            )

    def mixture(self, sizes: Mapping[str, DomainSize], *, budget_tokens: float) -> Mixture:
        """The weights, scaled to sum to 1.

        Raises:
            ConfigError: a weight is for a domain that the data do not have, or no domain that has
                tokens got a weight.
        """
        for domain in self.weights:
            if domain not in sizes:
                known = ", ".join(sorted(sizes)[:10])
                raise ConfigError(
                    f"mix.weights names {domain!r}, but no domain of that name has training tokens",
                    fix=nearest(domain, sizes) or f"use some of {known}",
                )
        total = math.fsum(self.weights.values())
        shares = {domain: self.weights.get(domain, 0.0) / total for domain in sizes}
        unnamed = sorted(domain for domain in sizes if domain not in self.weights)
        notes = (f"without a weight, so left out: {', '.join(unnamed)}",) if unnamed else ()
        rules = {
            domain: f"the weight {self.weights[domain]:g} given by hand"
            if domain in self.weights
            else "no weight given by hand"
            for domain in sizes
        }
        return one_phase("fixed", shares, sizes, budget_tokens, rules, notes)
