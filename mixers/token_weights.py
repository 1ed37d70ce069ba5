"""Weights for tokens from how likely the model finds them: TLDR, focal and TALR.

    TLDR   w = cos(pi p) + 1                  2 at p = 0, 1 at a half, 0 at 1: easy tokens go
    focal  w = (1 - p)^gamma                  easy tokens go
    TALR   w = max(p^(1/tau), 0.01)           tau = median over sequences of the mean token loss:
                                              hard tokens go, the opposite direction
    loss = sum_t w_t nll_t / number of target tokens, p the probability of the true token

Sources: Jiang, Wolf, Monz and de Rijke, "TLDR: Token Loss Dynamic Reweighting for Reducing
Repetitive Utterance Generation", 2020, arXiv:2003.11963; Lin et al., "SFT Doesn't Always Hurt
General Capabilities", 2025, arXiv:2509.20758 (TALR), whose weight is known to us second-hand only.

Departures: weights carry no gradient, as TALR's; the authors of TLDR let it flow, which `detach`
set to False does. TALR divides by the number of tokens; its normalisation could not be checked.

Cost: one exponential for each token.
Shapes: B sequences, T positions.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from curate.errors import ConfigError

_TALR_FLOOR = 0.01
_TEMPERATURE_FLOOR = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenWeights:
    """Which tokens of a sequence count."""

    kind: Literal["tldr", "focal", "talr"]
    """TLDR and focal leave easy tokens behind, TALR hard ones."""
    gamma: float = 2.0
    """Of focal: how fast easy tokens fade."""
    by_sequence: bool = False
    """One weight for all tokens of a sequence, from their mean probability (TLDR, focal)."""
    detach: bool = True
    """False lets gradients flow through the weights, as the code of TLDR does."""
    unit_mean: bool = False
    """Divide by the mean weight of the batch, so that the learning rate keeps its meaning."""

    def __post_init__(self) -> None:
        if self.kind not in ("tldr", "focal", "talr"):
            raise ConfigError(f"kind is {self.kind!r}", fix="use tldr, focal or talr")
        if not self.gamma >= 0:
            raise ConfigError(f"gamma is {self.gamma}", fix="set it to 0 or more, such as 2")
        if self.kind == "talr" and self.by_sequence:
            raise ConfigError("talr has no form by sequence", fix="remove by_sequence")


def tldr_weights(losses: Tensor) -> Tensor:
    """2 for a token that the model held impossible, 0 for one that it was sure of.

    Args:
        losses: negative log-likelihood of each token, nats, any shape.
    """
    return (math.pi * (-losses).exp()).cos() + 1


def focal_weights(losses: Tensor, *, gamma: float = 2.0) -> Tensor:
    """1 for a token that the model held impossible, 0 for one that it was sure of.

    Args:
        losses: negative log-likelihood of each token, nats, any shape.
        gamma: 0 gives 1 everywhere.
    """
    # 1 - exp(-x) cancels for a small x.
    return (-torch.expm1(-losses)) ** gamma


def talr_temperature(mean_losses: Tensor) -> Tensor:
    """Median over the sequences of the step, at least 1e-6; of two middle ones the mean.

    Args:
        mean_losses: (B,) mean token loss of each sequence, nats; without any, 1 is returned.
    """
    if not len(mean_losses):
        return torch.ones(())
    return mean_losses.detach().double().quantile(0.5).clamp(min=_TEMPERATURE_FLOOR)


def talr_weights(losses: Tensor, temperature: Tensor | float) -> Tensor:
    """1 for a token that the model was sure of, 0.01 for an unlikely one.

    Args:
        losses: negative log-likelihood of each token, nats, any shape.
        temperature: the paper's tau, above 0; infinity gives 1 everywhere.
    """
    return (-losses / temperature).exp().clamp(min=_TALR_FLOOR)


def token_weights(
    losses: Tensor,
    counted: Tensor,
    settings: TokenWeights,
    *,
    temperature: Tensor | float | None = None,
) -> Tensor:
    """Weight of each token.

    Args:
        losses: (B, T) negative log-likelihood of the true tokens, nats.
        counted: (B, T) bool, False where there is no target.
        settings: which form.
        temperature: of TALR, where the step has more sequences than these; by default their own.

    Returns:
        (B, T), 0 where nothing is counted.
    """
    given = losses.detach() if settings.detach else losses
    given = given.float() if given.dtype in (torch.float16, torch.bfloat16) else given
    counts = counted.sum(dim=1).clamp(min=1)
    if settings.by_sequence:
        # From the mean probability back to a loss, which is what the formulas take.
        means = ((-given).exp() * counted).sum(dim=1) / counts
        given = -means.clamp(min=torch.finfo(means.dtype).tiny).log()[:, None].expand_as(given)
    if settings.kind == "tldr":
        found = tldr_weights(given)
    elif settings.kind == "focal":
        found = focal_weights(given, gamma=settings.gamma)
    else:
        if temperature is None:
            has_any = counted.any(dim=1)
            temperature = talr_temperature(((losses * counted).sum(dim=1) / counts)[has_any])
        found = talr_weights(given, torch.as_tensor(temperature).to(given))
    found = found * counted
    if not settings.unit_mean:
        return found
    mean = found.sum() / counted.sum().clamp(min=1)
    return found / mean.clamp(min=torch.finfo(mean.dtype).tiny)
