"""DoReMi: the domains where a proxy is furthest behind a reference weigh more, averaged over time.

    lambda_i = sum over tokens of domain i of max(l - l_ref, 0) / number of those tokens
    alpha'   = alpha exp(eta lambda) / sum;      alpha = (1 - c) alpha' + c / K
    the proxy's next step minimises  sum_i alpha_i * mean over tokens of domain i of l
    mixture  = mean of alpha over the steps, for sampling, never as weights of a loss

Source: Xie, Pham, Dong, Du, Liu, Lu, Liang, Le, Ma and Yu, "DoReMi: Optimizing Data Mixtures Speeds
Up Language Model Pretraining", NeurIPS 2023, arXiv:2305.10429, Algorithm 1. eta 1, c 1e-3.

Departures: alpha stays uniform for the first 2 % of the steps, where losses of an untrained model
differ between domains by nats. A domain without a token in a step keeps its last lambda; before its
first it has the mean of the others', where the authors' code gives it ln V and nearly all weight.
The proxy's loss is the paper's, a mean over each domain's own tokens; that of the authors' code is
one mean over all tokens, which weighs domains by their tokens once more.
Cost: a few numbers for each domain and step, beside a forward pass of the reference for each
example, once.
Shapes: K domains, n tokens of a step on this rank.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from curate.config import STRICT
from curate.errors import ConfigError, DivergedError
from mixers.proxy_settings import Proxy
from mixers.rules import Seen, Step, first_look, loss_sums, second_look, token_counts


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainWeights:
    """Where the weights stand; all of it goes into a checkpoint."""

    log_weights: Tensor
    """(K,) float64, of alpha."""
    sums: Tensor
    """(K,) float64, of alpha over the steps."""
    excess: Tensor
    """(K,) float64, the last lambda of each domain; NaN for those not seen yet."""
    num_steps: int = 0

    @classmethod
    def uniform(cls, num_domains: int) -> "DomainWeights":
        """Before the first step."""
        zeros = torch.zeros(num_domains, dtype=torch.float64)
        return cls(
            log_weights=zeros - math.log(num_domains),
            sums=zeros,
            excess=torch.full_like(zeros, torch.nan),
        )

    @property
    def weights(self) -> Tensor:
        """(K,) alpha."""
        return self.log_weights.exp()

    @property
    def mean(self) -> Tensor:
        """(K,) mean of alpha after each step so far: the mixture.

        The uniform steps of `warm_share` are in it; the state before the first step is not.
        """
        return self.sums / self.num_steps if self.num_steps else self.weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The model whose losses the proxy's are compared with; as large as the proxy."""

    __pydantic_config__: ClassVar = STRICT

    shares: Literal["natural", "uniform"] | dict[str, float] = "natural"
    """Of the tokens that it is trained on. What small domains it repeats often it learns by heart,
    so that their excess looks large: natural shares are the authors' rule of thumb."""
    seeds: tuple[int, ...] = (0, 1)
    """One reference and one proxy each; the mixture is their mean, and their spread is shown."""
    models: tuple[dict[str, Any], ...] = ()
    """Configurations from scratch, one reference and one proxy of each size for every seed; by
    default that of the proxy."""
    path: str | None = None
    """A model that exists, in place of training one; of the run's tokenizer."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(
                f"reference.seeds are {list(self.seeds)}", fix="list different seeds: [0, 1]"
            )
        if self.path is not None and self.models:
            raise ConfigError(
                "reference has both path and models",
                fix="remove mix.reference.models, or mix.reference.path to train references",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DoReMi:
    """The domains where a proxy is furthest behind a reference."""

    __pydantic_config__: ClassVar = STRICT

    proxy: Proxy = field(default_factory=Proxy)
    """How reference and proxy are trained."""
    reference: Reference = field(default_factory=Reference)
    """The reference."""
    rounds: int = 1
    """At most so many: from the second on, the reference is trained on the mixture found before."""
    tolerance: float = 1e-3
    """Rounds end where no weight has moved by more."""
    eta: float = 1.0
    """Step of the weights; 0.1 where they go to a single domain."""
    eta_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of the step over the run; the latter two fall to 0 at its end."""
    smoothing: float = 1e-3
    """The paper's c: share of uniform in every step. Without any excess the weights return to
    uniform with a half-life of ln 2 / c steps, so that long runs need a smaller one."""
    warm_share: float = 0.02
    """Share of the run at its start in which the weights stay uniform."""

    def __post_init__(self) -> None:
        if not self.eta > 0:
            raise ConfigError(f"eta is {self.eta}, not above 0", fix="remove it to use 1")
        if self.rounds < 1 or (self.rounds > 1 and self.reference.path is not None):
            raise ConfigError(
                f"rounds is {self.rounds}, and the reference "
                + ("exists already" if self.reference.path else "is trained in each"),
                fix="set mix.rounds to 1",
            )
        for name in ("smoothing", "warm_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}, outside [0, 1)",
                    fix=f"remove {name} to use its default",
                )

    def eta_at(self, num_steps: int, total_steps: int) -> float:
        """Step of the weights after so many steps of a run."""
        done = min(1.0, num_steps / total_steps)
        if self.eta_schedule == "linear":
            return self.eta * (1 - done)
        if self.eta_schedule == "cosine":
            return self.eta * (1 + math.cos(math.pi * done)) / 2
        return self.eta

    def update(
        self, state: DomainWeights, sums: Tensor, counts: Tensor, *, total_steps: int
    ) -> DomainWeights:
        """The state after one more step.

        Args:
            state: before it; left as it is.
            sums: (K,) clipped excess over all tokens of a domain, over all ranks and micro-batches
                of the step.
            counts: (K,) tokens of each.
            total_steps: of the run, which says how long the weights stay uniform.

        Raises:
            DivergedError: a sum is not finite.
        """
        sums, counts = sums.double().cpu(), counts.double().cpu()
        if not bool(sums.isfinite().all()):
            raise DivergedError(
                f"the excess loss of domain {int(sums.isfinite().int().argmin())} is"
                f" {float(sums[~sums.isfinite()][0])} in step {state.num_steps + 1}",
                fix="lower the learning rate of the proxy, or look at that domain's examples",
            )
        excess = torch.where(counts > 0, sums / counts.clamp(min=1), state.excess)
        seen = ~excess.isnan()
        rest = excess[seen].mean() if bool(seen.any()) else torch.zeros((), dtype=torch.float64)
        log_weights = state.log_weights
        if state.num_steps >= self.warm_share * total_steps:
            eta = self.eta_at(state.num_steps, total_steps)
            moved = log_weights + eta * torch.where(seen, excess, rest)
            moved = moved.log_softmax(0)
            if self.smoothing:
                floor = torch.full_like(moved, math.log(self.smoothing / len(moved)))
                moved = torch.logaddexp(moved + math.log1p(-self.smoothing), floor)
            log_weights = moved
        return DomainWeights(
            log_weights=log_weights,
            sums=state.sums + log_weights.exp(),
            excess=excess,
            num_steps=state.num_steps + 1,
        )


def excess_sums(
    losses: Tensor, reference: Tensor, domains: Tensor, *, num_domains: int
) -> tuple[Tensor, Tensor]:
    """What `DoReMi.update` takes, of some tokens; those of others, or other ranks, add up.

    Args:
        losses: (n,) of the proxy, nats, before its step.
        reference: (n,) of the reference, of the same tokens.
        domains: (n,) of each token, in [0, K).
        num_domains: K.

    Returns:
        (K,) float64 sums of the excess, each token's clipped at 0 before it is added, and (K,)
        float64 numbers of tokens.
    """
    excess = (losses.detach() - reference).clamp(min=0).double()
    sums = torch.zeros(num_domains, dtype=torch.float64, device=losses.device)
    counts = torch.zeros_like(sums)
    sums.index_add_(0, domains, excess)
    counts.index_add_(0, domains, torch.ones_like(excess))
    return sums, counts


def weighted_loss(losses: Tensor, domains: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """The proxy's loss: sum over domains of alpha_i times the mean over that domain's tokens.

    Args:
        losses: (n,) of the proxy, nats; not clipped, and without the reference.
        domains: (n,) of each token.
        weights: (K,) alpha of this step, after its update.
        counts: (K,) tokens of each domain in the whole step: over all ranks and micro-batches, so
            that their losses add up. Where gradients are averaged over ranks, multiply by the
            number of ranks.
    """
    shares = (weights / counts.clamp(min=1)).to(losses)
    return (shares[domains] * losses).sum()


class DoReMiRule:
    """DoReMi inside the loop: uniform batches, weights from the excess over cached losses.

    Args:
        settings: of the weights.
        num_domains: K.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "excess": "mean over the domain's tokens of the loss above the reference's, clipped at 0"
    }
    by_domain: ClassVar[bool] = False

    def __init__(self, settings: DoReMi, num_domains: int) -> None:
        self._settings = settings
        self._domains = DomainWeights.uniform(num_domains)

    def shares(self) -> Tensor:
        """Uniform, whatever the weights are."""
        return torch.full_like(self._domains.sums, 1 / len(self._domains.sums))

    def step(self, step: Step) -> Seen:
        counts = token_counts(step)
        excess = torch.zeros_like(counts)
        looks = first_look(step)
        for look, piece in zip(looks, step.pieces, strict=True):
            assert piece.reference is not None
            own, _ = excess_sums(
                look.losses, piece.reference, look.domains, num_domains=len(counts)
            )
            excess += own.cpu()
        self._domains = self._settings.update(
            self._domains, step.total(excess), counts, total_steps=step.total_steps
        )
        weights = self._domains.weights
        sums = torch.zeros_like(counts)
        for look in second_look(step, looks):
            on_device = weights.to(look.losses.device)
            loss = weighted_loss(look.losses, look.domains, on_device, counts.to(on_device))
            step.backward(loss)
            sums += loss_sums(look, len(counts))
        shown = torch.where(counts > 0, self._domains.excess, torch.nan)
        return Seen(weights, step.total(sums), counts, {"excess": shown})

    def mixture(self) -> Tensor:
        return self._domains.mean

    def state(self) -> dict[str, Tensor]:
        state = self._domains
        return {
            "log_weights": state.log_weights,
            "sums": state.sums,
            "excess": state.excess,
            "num_steps": torch.tensor(state.num_steps),
        }

    def load(self, saved: Mapping[str, Tensor]) -> None:
        self._domains = DomainWeights(
            log_weights=saved["log_weights"],
            sums=saved["sums"],
            excess=saved["excess"],
            num_steps=int(saved["num_steps"]),
        )
