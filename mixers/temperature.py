"""Temperature: flattens the natural proportions, so that small domains are seen more often.

    p_i(tau) = n_i^(1/tau) / sum_j n_j^(1/tau)      1 is natural, large values are uniform

Source: usual since multilingual BERT (tau 1.43), XLM-R and mT5 (3.33); in the notation of Li, Xu,
Tan, Murray and Khashabi, "Upsample or Upweight?", NAACL 2025, arXiv:2410.04579, Section 2.

Departures: none.
Cost: none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from curate.config import STRICT
from curate.errors import ConfigError
from curate.plan.mixture import DomainSize, Mixture
from mixers.sizes import Unit, amounts, one_phase, token_shares


def tempered_shares(amounts: Mapping[str, float], tau: float) -> dict[str, float]:
    """Domain -> share at a temperature, summing to 1.

    Args:
        amounts: domain -> size, above 0, in any unit: only ratios count.
        tau: temperature, above 0; infinity gives the uniform mixture.
    """
    # The softmax of log(n) / tau: the powers themselves overflow for small tau.
    logits = np.log(np.array(list(amounts.values()), np.float64)) / tau
    powers = np.exp(logits - logits.max())
    return dict(zip(amounts, (powers / powers.sum()).tolist(), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Temperature:
    """One temperature for the whole training."""

    __pydantic_config__: ClassVar = STRICT

    tau: float = 3.33
    """Above 0: 1 is natural, 100 nearly uniform; the default is that of XLM-R and mT5."""
    unit: Unit = "tokens"
    """What sizes and shares count."""

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise ConfigError(
                f"tau is {self.tau}, not above 0", fix="set mix.tau to a temperature such as 3.33"
            )

    def mixture(self, sizes: Mapping[str, DomainSize], *, budget_tokens: float) -> Mixture:
        """The flattened proportions."""
        shares = tempered_shares(amounts(sizes, self.unit), self.tau)
        weights = token_shares(shares, sizes, self.unit)
        rules = dict.fromkeys(sizes, f"temperature {self.tau:g}")
        return one_phase("temperature", weights, sizes, budget_tokens, rules)
