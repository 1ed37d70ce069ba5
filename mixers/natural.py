"""Natural and uniform: every token alike, or every domain alike; the two ends of all others.

    natural  p_i = n_i / sum_j n_j          uniform  p_i = 1 / k

Source: none; the yardsticks of every paper on mixtures. They are temperature sampling at 1 and at
infinity.

Departures: none.
Cost: none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from curate.config import STRICT
from curate.plan.mixture import DomainSize, Mixture
from mixers.sizes import Unit, one_phase, token_shares


@dataclass(frozen=True, slots=True, kw_only=True)
class Natural:
    """Domains in proportion to their tokens."""

    __pydantic_config__: ClassVar = STRICT

    def mixture(self, sizes: Mapping[str, DomainSize], *, budget_tokens: float) -> Mixture:
        """Every domain's share of the pool."""
        parts = {domain: float(size.num_tokens) for domain, size in sizes.items()}
        weights = token_shares(parts, sizes, "tokens")
        rules = dict.fromkeys(sizes, "its size")
        return one_phase("natural", weights, sizes, budget_tokens, rules)


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform:
    """Every domain gets the same."""

    __pydantic_config__: ClassVar = STRICT

    unit: Unit = "tokens"
    """The same number of tokens, or of examples."""

    def mixture(self, sizes: Mapping[str, DomainSize], *, budget_tokens: float) -> Mixture:
        """One k-th of the tokens or examples for each of k domains."""
        weights = token_shares(dict.fromkeys(sizes, 1.0), sizes, self.unit)
        rules = dict.fromkeys(sizes, f"an equal part of the {self.unit}")
        return one_phase("uniform", weights, sizes, budget_tokens, rules)
