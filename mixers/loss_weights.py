"""Loss-based reweighting: weights for the examples of one step, from their losses alone.

    h_i = delta * (2 L_i - l_max - l_min) / (l_max - l_min)                   in [-delta, delta]
    LinUpper: f = min(h + delta, delta);   Quadratic: f = 1 - h^2 / delta^2;   Extremes: f = |h|
    w = softmax(f(h) / r) over all M examples of the step;   loss = sum_i w_i L_i, w held fixed

Source: Sow, Woisetschläger, Bulusu, Wang, Jacobsen and Liang, "Dynamic Loss-Based Sample
Reweighting for Improved Large Language Model Pretraining", ICLR 2025, arXiv:2502.06733. Defaults
are those of the configurations for 124 million parameters.

Departures: losses closer than 1e-4 weigh the same, where the authors' code gives noise a say.
`robust` (percentiles of the last steps in place of minimum and maximum) and `within_domain` are
ours. The authors' code also multiplies by each sequence's share of the tokens and takes weights by
the rank on its own machine; neither is done here. The uniform phase is a share of the run.

Cost: three reductions of a few numbers over the ranks of a step.
Shapes: M examples of this rank in the step, K domains, W losses that a window remembers.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from curate.errors import ConfigError, DivergedError
from mixers.ranks import over_ranks

Strategy = Literal["linupper", "quadratic", "extremes"]
"""LinUpper leaves the easy half behind, Quadratic both ends, Extremes the middle."""

_CLOSE = 1e-4
"""Losses within this range, in nats, count as equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossReweighting:
    """How the losses of a step become weights."""

    strategy: Strategy = "linupper"
    """Which losses are favoured; LinUpper is what the paper recommends."""
    temperature: float = 1.0
    """The paper's r: two weights differ by at most exp(1/r), 2.7 times at 1, 12 times at 0.4."""
    delta: float = 1.0
    """Scale of the normalised losses."""
    uniform_share: float = 0.05
    """Share of the run at its start with `warm_temperature`: 1,000 of the paper's 20,000 steps."""
    warm_temperature: float = math.inf
    """Temperature of that start; infinity is the plain mean, 100 what the code of the large runs
    has."""
    within_domain: bool = False
    """Minimum, maximum and weights by domain: every domain keeps a mean weight of 1. Where domains
    differ in entropy, the weights are otherwise a mixture in disguise."""
    robust: bool = False
    """The 2nd and 98th percentile of the last steps in place of minimum and maximum, so that one
    outlier cannot flatten all others."""
    window_steps: int = 50
    """How many steps the robust form remembers, this one included."""

    def __post_init__(self) -> None:
        if self.strategy not in ("linupper", "quadratic", "extremes"):
            raise ConfigError(
                f"strategy is {self.strategy!r}", fix="use linupper, quadratic or extremes"
            )
        for name in ("temperature", "delta", "warm_temperature"):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}, not above 0",
                    fix=f"remove {name}, or raise it",
                )
        if not 0 <= self.uniform_share <= 1:
            raise ConfigError(
                f"uniform_share is {self.uniform_share}, outside [0, 1]",
                fix="set it to a share of the run such as 0.05",
            )
        if self.window_steps < 1:
            raise ConfigError(
                f"window_steps is {self.window_steps}", fix="set it to 1 or more, such as 50"
            )

    def temperature_at(self, step: int, total_steps: int) -> float:
        """Temperature of a step; the change is one step, as in the paper's runs.

        Args:
            step: how many are done, from 0.
            total_steps: of the run.
        """
        is_warm = step < self.uniform_share * total_steps
        return self.warm_temperature if is_warm else self.temperature


class Bounds(NamedTuple):
    """The range that counts as that of the losses, by domain."""

    low: Tensor
    """(K,) nats; infinity where the domain has no example."""
    high: Tensor
    """(K,) nats; minus infinity where the domain has no example."""


class Summary(NamedTuple):
    """What the weights of one step do; the same on every rank."""

    mean_loss: float
    """Plain mean of the losses: comparable over time and with other runs, the weighted one not."""
    effective_size: float
    """1 / sum w^2: as many examples of weight 1 would give as noisy a gradient; at most M."""
    largest: float
    """M times the largest weight; the paper's theory assumes at most 2."""
    num_examples: int
    """M, over all ranks."""
    domain_weights: Tensor
    """(K,) mean of M w over each domain's examples: above 1, the domain gains. NaN if absent."""


def strategy_values(normalised: Tensor, strategy: Strategy, *, delta: float = 1.0) -> Tensor:
    """The paper's f: what a normalised loss is worth, before the softmax.

    Args:
        normalised: the paper's h, in [-delta, delta].
        strategy: which form.
        delta: scale of h.

    Returns:
        Of the same shape, in [0, delta], or [0, 1] for Quadratic.
    """
    if strategy == "linupper":
        return (normalised + delta).clamp(max=delta)
    if strategy == "quadratic":
        return 1 - (normalised / delta).square()
    return normalised.abs()


def normalised_losses(
    losses: Tensor, low: Tensor, high: Tensor, *, delta: float = 1.0, clip: bool = False
) -> Tensor:
    """The paper's h: where each loss stands between low and high, from -delta to delta.

    Args:
        losses: (M,) nats.
        low: (M,) or scalar; as `high`, the bounds that hold for each.
        high: (M,) or scalar.
        delta: scale.
        clip: for bounds that losses may exceed.

    Returns:
        (M,); 0 where low and high are within 1e-4 of each other.
    """
    range_ = high - low
    found = delta * (2 * losses - high - low) / range_.clamp(min=_CLOSE)
    found = torch.where(range_ < _CLOSE, 0.0, found)
    return found.clamp(-delta, delta) if clip else found


def step_bounds(
    losses: Tensor,
    *,
    domains: Tensor | None = None,
    num_domains: int = 1,
    group: dist.ProcessGroup | None = None,
) -> Bounds:
    """Smallest and largest loss of the step over all ranks, by domain.

    Args:
        losses: (M,) of this rank, which may have none.
        domains: (M,) indices in [0, K); None where there is one.
        num_domains: K.
        group: the ranks that share the step; None for all, or for a single process.

    Raises:
        DivergedError: a loss of some rank is not finite; all ranks raise it.
    """
    values = _raised(losses)
    of = _of(values, domains)
    empty = values.new_full((2 * num_domains + 1,), -math.inf)
    both = torch.cat([of, of + num_domains])
    extremes = empty.scatter_reduce(0, both, torch.cat([-values, values]), "amax")
    # A NaN gets lost in a reduction over ranks: it travels as a flag.
    extremes[-1] = (~values.isfinite()).sum()
    extremes = over_ranks(extremes, dist.ReduceOp.MAX, group)
    if extremes[-1] > 0:
        where = (~values.isfinite()).nonzero().flatten().tolist()
        raise DivergedError(
            f"losses of this step are not finite: examples {where[:10]} of this rank"
            if where
            else "losses of this step are not finite on another rank",
            fix="lower the learning rate, or leave out the examples concerned",
        )
    return Bounds(-extremes[:num_domains], extremes[num_domains:-1])


def example_weights(
    losses: Tensor,
    *,
    strategy: Strategy = "linupper",
    temperature: float = 1.0,
    delta: float = 1.0,
    domains: Tensor | None = None,
    num_domains: int = 1,
    bounds: Bounds | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Weights of this rank's examples; over all ranks of the step they sum to 1.

    With gradient accumulation pass the losses of all micro-batches of the step at once: weights
    found in each micro-batch by itself are another method.

    Args:
        losses: (M,) mean loss of each example, nats; ranks may hold different numbers.
        strategy: the paper's f.
        temperature: the paper's r, above 0; infinity gives 1 / M each.
        delta: the paper's delta.
        domains: (M,) indices in [0, K): the method within each domain, whose weights sum to its
            share of the examples. None for one domain.
        num_domains: K.
        bounds: a range to use in place of the step's own; losses outside count as on its edge.
        group: the ranks that share the step; None for all, or for a single process.

    Returns:
        (M,) weights, not negative, without a gradient.

    Raises:
        DivergedError: a loss is not finite.
    """
    values = _raised(losses)
    of = _of(values, domains)
    found = step_bounds(values, domains=of, num_domains=num_domains, group=group)
    low, high = found if bounds is None else (each.to(values) for each in bounds)
    inside = normalised_losses(values, low[of], high[of], delta=delta, clip=bounds is not None)
    worth = strategy_values(inside, strategy, delta=delta)  # (M,)
    # The largest of all ranks goes first: at a low temperature exp would overflow, or all be 0.
    best = values.new_full((num_domains,), -math.inf).scatter_reduce(0, of, worth, "amax")
    best = over_ranks(best, dist.ReduceOp.MAX, group)
    powers = ((worth - best[of]) / temperature).exp()
    sums = values.new_zeros(2 * num_domains)
    sums.index_add_(0, of, powers)
    sums.index_add_(0, of + num_domains, torch.ones_like(powers))
    totals, counts = over_ranks(sums, dist.ReduceOp.SUM, group).chunk(2)  # (K,) each
    return powers / totals[of] * (counts / counts.sum())[of]


def rank_loss(losses: Tensor, weights: Tensor, *, num_ranks: int = 1) -> Tensor:
    """What a rank has to back-propagate: the mean over ranks is sum_i w_i L_i.

    Args:
        losses: (M,) with their gradients.
        weights: (M,) of `example_weights`.
        num_ranks: how many ranks average their gradients, as DDP and FSDP do.
    """
    return num_ranks * (weights.detach() * losses).sum()


def summary(
    losses: Tensor,
    weights: Tensor,
    *,
    domains: Tensor | None = None,
    num_domains: int = 1,
    group: dist.ProcessGroup | None = None,
) -> Summary:
    """What the weights of a step do, over all ranks.

    Args:
        losses: (M,) nats.
        weights: (M,) that sum to 1 over all ranks.
        domains: (M,) indices in [0, K).
        num_domains: K.
        group: the ranks that share the step.
    """
    given = weights.double()
    of = _of(given, domains)
    sums = given.new_zeros(2 * num_domains + 2)
    sums.index_add_(0, of, given)
    sums.index_add_(0, of + num_domains, torch.ones_like(given))
    sums[-2], sums[-1] = losses.detach().double().sum(), given.square().sum()
    sums = over_ranks(sums, dist.ReduceOp.SUM, group)
    largest = given.new_zeros(1) if not len(given) else given.max()[None]
    largest = over_ranks(largest, dist.ReduceOp.MAX, group)
    shares, counts = sums[:-2].chunk(2)
    total = counts.sum()
    return Summary(
        mean_loss=float(sums[-2] / total),
        effective_size=float(1 / sums[-1]),
        largest=float(total * largest[0]),
        num_examples=int(total),
        domain_weights=(total * shares / counts).cpu(),
    )


def _raised(losses: Tensor) -> Tensor:
    """Without a gradient, and in float32 at least."""
    given = losses.detach()
    return given.float() if given.dtype in (torch.float16, torch.bfloat16) else given


def _of(values: Tensor, domains: Tensor | None) -> Tensor:
    """The domain of each example, (M,)."""
    if domains is None:
        return torch.zeros(len(values), dtype=torch.int64, device=values.device)
    return domains.to(values.device)
