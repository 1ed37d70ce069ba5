"""Sampling at one mixture, loss weights to another: what upweighting is, beside upsampling.

Written for comparison, apart from the mixers: loss = sum over tokens of w_d l / number of tokens.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from jobs.proxy_rules import sequence_shares
from jobs.proxy_work import Making
from mixers.rules import Rule, Seen, Step, loss_sums, token_counts


class WeightedRule:
    """Fixed shares, a fixed weight for each domain's tokens, and the length of each gradient.

    Args:
        shares: (K,) of the sequences.
        weights: (K,) of the tokens' losses.
    """

    columns: ClassVar[Mapping[str, str]] = {"gradient_norm": "of the step, before clipping"}
    by_domain: ClassVar[bool] = False

    def __init__(self, shares: Tensor, weights: Tensor) -> None:
        self._shares, self._weights = shares.double(), weights.double()

    def shares(self) -> Tensor:
        return self._shares

    def step(self, step: Step) -> Seen:
        counts = token_counts(step)
        sums = torch.zeros_like(counts)
        for piece in step.pieces:
            tokens = step.tokens(piece)
            weights = self._weights.to(tokens.losses)[tokens.domains]
            step.backward((weights * tokens.losses).sum() / counts.sum().to(tokens.losses))
            sums += loss_sums(tokens, step.num_domains)
        squares = [p.grad.square().sum() for p in step.parameters if p.grad is not None]
        norm = torch.full_like(counts, float(torch.stack(squares).sum().sqrt()))
        return Seen(self._shares, step.total(sums), counts, {"gradient_norm": norm})

    def mixture(self) -> Tensor:
        return self._shares

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """There is nothing to go back to."""


def make_rule(making: Making) -> Rule:
    """Options: `shares`, domain -> share of the tokens; `weights`, domain -> weight, 1 each by
    default."""
    domains = making.data.sequences.domains
    weights = making.options.get("weights") or {}
    own = torch.tensor([float(weights.get(name, 1.0)) for name in domains], dtype=torch.float64)
    return WeightedRule(sequence_shares(making.options["shares"], making.data.sequences), own)
