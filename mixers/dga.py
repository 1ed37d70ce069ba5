"""DGA: train on the domains whose gradients point where the target's does, measured as one trains.

    every T_r steps:  a_i = <g_i, g_target> / (|g_i| |g_target|)    batches drawn for this alone
                      alpha^ ~ alpha * exp(kappa a);   alpha = (1 - beta) alpha + beta alpha^
    every step:       the batch is drawn by alpha; ordinary mean loss over its tokens

Source: Fan, Grangier and Ablin, "Dynamic Gradient Alignment for Online Data Mixing", 2024,
arXiv:2410.02498, with the values of the first author's code for a later paper (T_r 100, 8 sequences
a domain); those of the paper itself could not be checked.

Departures: cosines in place of raw products, kappa 0.5 and no moving average (beta 1) by default:
raw products let the first measurement decide, and an average of the *weights* is a smaller step
and no more (to first order beta kappa takes the place of kappa). The first 2 % of the steps keep
the start. A gradient of 0 says nothing, and its domain keeps its weight. Weights that are measured
at a step hold from the next one on. `max_epochs` caps a domain at the share with which its last
allowed epoch ends with the run.
Cost: every T_r steps (N + 1) gradients of `sequences`; memory of two gradients at that time.
Shapes: K domains, N distributions over them (N = K where none are given).
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from curate.config import STRICT
from curate.errors import ConfigError, DivergedError
from mixers.basis import Distributions, simplex
from mixers.proxy_settings import Proxy

log = logging.getLogger(__name__)

_DEAR = 0.5
"""Sequences measured for each one trained on, from which on the log says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DGA:
    """How often gradients are compared, and how far the weights go."""

    __pydantic_config__: ClassVar = STRICT

    proxy: Proxy = field(default_factory=Proxy)
    """How the model is trained. Not read in your own training, nor are `seeds` and `phases`."""
    seeds: tuple[int, ...] = (0,)
    """Of the model, beside its own: one run each, and the mixture is their mean."""
    phases: int = 20
    """The mixture follows the schedule in so many stretches at most; 1 for one mixture, the mean
    over the measurements."""
    every: int = 100
    """Steps between two measurements, the paper's T_r."""
    sequences: int = 8
    """Sequences of each domain (or distribution of `basis`) in a measurement."""
    target_sequences: int = 32
    """Sequences of the target in a measurement."""
    form: Literal["cosine", "raw"] = "cosine"
    """`raw`: products of gradients, each scaled down to `clip_norm` first."""
    kappa: float = 0.5
    """Step on the log weights; the authors' code has 1.5 with raw products."""
    clip_norm: float = 1.0
    """Of the raw form; 0 leaves gradients as they are, and the first measurement decides."""
    beta: float = 1.0
    """Share of the new weights in their moving average; below 1 it is a smaller step."""
    warm_share: float = 0.02
    """Share of the run at its start without measurements."""
    floor: float = 1e-4
    """Least weight that a step starts from, since nothing comes back from 0; at most 0.1 / N."""
    max_epochs: float | None = None
    """Most passes over a domain."""
    start: dict[str, float] | Literal["target"] | None = None
    """Weights before the first measurement, by domain (or distribution), in any scale. `target`,
    for a pool that `domains` has cut into clusters: how many target examples lie nearest to each,
    as importance sampling does. Uniform by default."""
    start_uniform: float = 0.1
    """Share of uniform that is mixed into `start`."""
    precondition: Literal["adam"] | None = None
    """`adam`: the target's gradient divided by the root of AdamW's mean squares, as a step is."""
    basis: Distributions | str | None = None
    """Distributions over the domains that weights are learned for, or a YAML file of them: for
    hundreds of domains. Each domain by itself by default."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(
                f"seeds are {list(self.seeds)}", fix="list different seeds: [0, 1, 2]"
            )
        for name in ("phases", "every", "sequences", "target_sequences", "kappa"):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}, not above 0",
                    fix=f"remove {name} to use its default",
                )
        for name in ("warm_share", "floor"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}, outside [0, 1)",
                    fix=f"remove {name} to use its default",
                )
        if not 0 < self.beta <= 1 or not 0 <= self.start_uniform <= 1:
            raise ConfigError(
                f"beta is {self.beta} and start_uniform {self.start_uniform}",
                fix="beta lies in (0, 1], start_uniform in [0, 1]",
            )
        if self.max_epochs is not None and not self.max_epochs > 0:
            raise ConfigError(
                f"max_epochs is {self.max_epochs}, not above 0",
                fix="set it to a number of passes such as 4, or remove it",
            )
        if self.clip_norm < 0:
            raise ConfigError(f"clip_norm is {self.clip_norm}", fix="0 switches clipping off")

    def is_due(self, done: int, total_steps: int) -> bool:
        """Whether gradients are compared after so many steps.

        Args:
            done: steps behind, 0 at the start.
            total_steps: of the run.
        """
        return done >= self.warm_share * total_steps and done % self.every == 0

    def alignment(
        self,
        products: Tensor,
        norms: Tensor,
        target_norm: float,
        *,
        present: Tensor,
        names: Sequence[str],
    ) -> Tensor:
        """(N,) what `update` takes; NaN where a gradient is 0 or there was none.

        Args:
            products: (N,) inner products with the target's gradient.
            norms: (N,) lengths of the gradients.
            target_norm: length of the target's gradient.
            present: (N,) bool, False where nothing was drawn.
            names: N, for messages.

        Raises:
            DivergedError: a gradient is not finite.
        """
        products, norms = products.double().cpu(), norms.double().cpu()
        wrong = (present & ~(norms.isfinite() & products.isfinite())).nonzero()
        if len(wrong) or not math.isfinite(target_norm):
            raise DivergedError(
                f"the gradient of {names[int(wrong[0])] if len(wrong) else 'the target'} is not"
                " finite",
                fix="lower the learning rate, or look at those examples",
            )
        lengths = norms * target_norm
        if self.form == "cosine":
            found = products / lengths
        elif self.clip_norm:
            # The product, had each of the two been scaled down to the norm.
            ours = (self.clip_norm / norms).clamp(max=1)
            found = products * ours * min(1.0, self.clip_norm / (target_norm or math.inf))
        else:
            found = products
        return torch.where(present & (lengths > 0), found, torch.nan)

    def tell_cost(self, num_measured: int, batch: float) -> None:
        """Warn where more is measured than makes sense.

        Args:
            num_measured: N.
            batch: sequences of a training step.
        """
        measured = num_measured * self.sequences + self.target_sequences
        share = measured / (self.every * batch)
        if share > _DEAR:
            log.warning(
                "dga: %.1f sequences are measured for each one trained on; raise every, lower"
                " sequences, or give a basis of few distributions over the domains",
                share,
            )

    def start_weights(self, names: Sequence[str]) -> Tensor:
        """(N,) float64 before the first measurement.

        Raises:
            ConfigError: `start` has an unknown name or no share above 0.
        """
        uniform = torch.full((len(names),), 1 / len(names), dtype=torch.float64)
        if self.start is None:
            return uniform
        if self.start == "target":
            raise ConfigError(
                "start: target is found by `curate mix`, from clusters of a run",
                fix="give the weights by domain",
            )
        given = simplex(self.start, names, what="start")
        return (1 - self.start_uniform) * given + self.start_uniform * uniform


def update(
    log_weights: Tensor,
    alignment: Tensor,
    *,
    kappa: float,
    beta: float = 1.0,
    floor: float = 1e-4,
) -> Tensor:
    """One step on the weights.

        alpha' = (1 - beta) alpha + beta softmax(log max(alpha, floor) + kappa a)

    Args:
        log_weights: (N,) float64 of alpha, which sums to 1; left as they are.
        alignment: (N,) the paper's a; NaN where a domain was not measured: it keeps its weight, and
            the others share the rest.
        kappa: step size.
        beta: share of the new weights.
        floor: least weight before the step, at most 0.1 / N.

    Returns:
        (N,) float64 log weights.
    """
    present = ~alignment.isnan()
    if not bool(present.any()):
        return log_weights
    least = min(floor, 0.1 / len(log_weights))
    lifted = log_weights.clamp(min=math.log(least)) if least else log_weights
    tilted = (lifted + kappa * alignment.double())[present].log_softmax(0)
    stepped = log_weights.clone()
    stepped[present] = tilted + log_weights[present].logsumexp(0)
    if beta == 1:
        return stepped
    return torch.logaddexp(log_weights + math.log1p(-beta), stepped + math.log(beta))
