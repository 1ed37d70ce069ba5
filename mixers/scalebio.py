"""ScaleBiO: weights of sources under which a model that learns from them does best on a target.

    min over lambda, w  max over u   L1(w) + alpha (L2(lambda, w) - L2(lambda, u))
    L2(lambda, w) = sum_i p_i L2_i(w),   p = softmax(lambda)
    d / d lambda  = alpha (diag(p) - p p^T) (L2(w) - L2(u))

L1 is the loss on the target, L2_i(w) the mean over the examples of source i of the mean loss of
their counted tokens. u learns from the sources alone, w from sources and target, both from one
start: a source whose loss falls on the way from u to w gains weight. As alpha grows the gradient
tends to the one through the whole training.

Source: Pan, Zhang, Zhang, Pan, Xu, Zhang, Pi, Wang and Zhang, "ScaleBiO: Scalable Bilevel
Optimization for LLM Data Reweighting", ACL 2025, arXiv:2406.19976.

Departures: u and w learn from the same batch, with the same dropout and (LISA) the same blocks: the
difference of their losses would measure those too. lambda has no weight decay, which would pull p
to uniform; the authors' code leaves it at 0.01. Each source has equally many sequences in a batch,
and an absent one keeps its lambda. The mixture is the mean of p over the last half of the steps.
Both models' losses are divided by alpha: it changes no minimum and no step of AdamW but for its
epsilon, and clipping at the usual norm is then clipping at alpha times that.
Cost: 2 + (target sequences) / (batch) passes for each step, and a second model with its moments; of
an adapter the model under it is there once.
Shapes: K domains (the sources).
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from curate.config import STRICT
from curate.errors import ConfigError
from mixers.lisa import Lisa
from mixers.proxy_settings import Proxy

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""AdamW's own, for lambda."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleBiO:
    """How the weights follow from the two models."""

    __pydantic_config__: ClassVar = STRICT

    proxy: Proxy = field(default_factory=Proxy)
    """How both models are trained; `packed: false` makes each example count once, as in the paper,
    and `packed: true` each window."""
    seeds: tuple[int, ...] = (0,)
    """Of the run, beside the proxy's own: one run each, and the mixture is their mean."""
    alpha: float = 10.0
    """Penalty for leaving the inner optimum: large ones are nearer to the true gradient, small ones
    less noisy. The paper takes 10 for small models, 100 for large ones."""
    lr: float = 1e-2
    """Learning rate of lambda (AdamW), on the schedule of the models': no lambda moves by more than
    its sum over the steps, so that short runs need at least 3 / steps. 0 keeps the weights."""
    target_sequences: int = 8
    """Sequences of the target in each step, over all ranks."""
    mixture: Literal["last_half", "last"] = "last_half"
    """The mean of the weights over the last half of the steps, or those of the last step."""
    lisa: Lisa | None = None
    """Let only some blocks of the models learn at a time; by default all of them learn."""
    separate_batches: bool = False
    """Another batch for u than for w: for experiments, as it hides what is looked for in noise."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(
                f"seeds are {list(self.seeds)}", fix="list different seeds: [0, 1, 2]"
            )
        for name in ("alpha", "target_sequences"):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}, not above 0",
                    fix=f"remove {name} to use its default",
                )
        if self.lr < 0:
            raise ConfigError(f"lr is {self.lr}, below 0", fix="remove mix.lr to use 0.01")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceWeights:
    """lambda, and AdamW's moments of it."""

    logits: Tensor
    """(K,) float64, lambda."""
    first: Tensor
    """(K,) float64 mean of the gradients."""
    second: Tensor
    """(K,) float64 mean of their squares."""
    steps: Tensor
    """(K,) float64 updates of each source."""

    @classmethod
    def uniform(cls, num_domains: int) -> "SourceWeights":
        """Before the first step."""
        zeros = torch.zeros(num_domains, dtype=torch.float64)
        return cls(logits=zeros, first=zeros, second=zeros, steps=zeros)

    @property
    def weights(self) -> Tensor:
        """(K,) p."""
        return self.logits.softmax(0)

    def moved(self, gradient: Tensor, present: Tensor, *, lr: float) -> "SourceWeights":
        """After a step of AdamW down a gradient, without weight decay.

        Args:
            gradient: (K,) of lambda.
            present: (K,) bool; what was absent stays where it is, with its moments.
            lr: of this step.
        """
        steps = self.steps + present
        first = torch.where(present, torch.lerp(gradient, self.first, BETAS[0]), self.first)
        square = gradient.square()
        second = torch.where(present, torch.lerp(square, self.second, BETAS[1]), self.second)
        bias = [1 - beta ** steps.clamp(min=1) for beta in BETAS]
        change = first / bias[0] / ((second / bias[1]).sqrt() + EPSILON)
        logits = torch.where(present, self.logits - lr * change, self.logits)
        return SourceWeights(logits=logits, first=first, second=second, steps=steps)


def lambda_gradient(weights: Tensor, losses_w: Tensor, losses_u: Tensor, *, alpha: float) -> Tensor:
    """Gradient of the objective for lambda: only losses are needed.

        alpha (diag(p) - p p^T) (L2(w) - L2(u))

    Args:
        weights: (K,) float64, p.
        losses_w: (K,) of each source, nats; NaN where it is absent.
        losses_u: (K,) likewise, of the same examples.
        alpha: the penalty.

    Returns:
        (K,) summing to 0; below 0 where the source is to gain. An absent source has 0, and the
        others are held against their own mean.
    """
    difference = losses_w - losses_u
    present = ~difference.isnan()
    difference = torch.where(present, difference, 0.0)
    mean = (weights * difference).sum() / weights[present].sum()
    return alpha * weights * torch.where(present, difference - mean, 0.0)


def notes(settings: ScaleBiO, total_steps: int) -> list[str]:
    """What is doubtful about the settings of a run of so many steps."""
    if 0 < settings.lr < 3 / total_steps:
        return [
            f"lr is {settings.lr:g}, below 3 / steps = {3 / total_steps:.2g}: the weights stay near"
            " uniform, whatever the sources are; raise it, or the steps"
        ]
    return []
