"""DoGE: domains whose gradient step lowers the loss that matters weigh more, averaged over time.

    W_j = <g_j, g_tgt>,  g_j = gradient of domain j's mean token loss
    alpha_t ~ alpha_{t-1} exp(eta_t W / mu)                  (mirror descent: KL to alpha_{t-1})
    the proxy's step goes down sum_j alpha_j g_j;  mixture = mean of alpha over the steps
    universal: g_tgt = sum of g_i over all domains, i = j among them;  target: that of the target

Source: Fan, Pagliardini and Jaggi, "DoGE: Domain Reweighting with Generalization Estimation", ICML
2024, arXiv:2310.15393, Algorithm 1; mu, and what the paper leaves open, from the authors' code.

Departures: the step is taken on W_j / (mean_i |g_i| |g_tgt|) with a size of its own, kappa, since
eta W / mu depends on the scale of losses and gradients; `form: raw` is the paper's. The authors'
code divides by mean_i |g_i| alone and clips at 0, which hides domains that hurt; we do not. The
target's batch is always drawn apart from the domains': <g, g> on one batch measures its noise.
Weights move after the first 2 % of the steps, in which all gradients point the same way. The
proxy's step has the weights before the update, so that no gradient needs to be kept (`lag`).
Cost: a backward pass of the target's batch in each step, and smaller pieces. Memory: two gradients.
Shapes: K domains.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from curate.config import STRICT
from curate.errors import ConfigError, DivergedError
from mixers.alignment import Alignments, Gradient, How, Part, alignments, target_gradient
from mixers.proxy_settings import Proxy
from mixers.rules import Piece, Seen, Step, loss_sums, token_counts

_MU = {"universal": 0.01, "target": 0.05}


@dataclass(frozen=True, slots=True, kw_only=True)
class DoGE:
    """Domains whose gradient step lowers the loss that matters."""

    __pydantic_config__: ClassVar = STRICT

    proxy: Proxy = field(default_factory=Proxy)
    """How the proxy is trained. Give it 4 sequences of each domain in a step at least."""
    seeds: tuple[int, ...] = (0,)
    """Of the proxy, beside its own: one run each, and the mixture is their mean."""
    mode: Literal["universal", "target"] = "target"
    """What is to be learned: all training domains, each as much as another, or the target."""
    form: Literal["normalised", "raw"] = "normalised"
    """Whether products are divided by the gradients' lengths; `raw` is the paper's, with `mu`."""
    kappa: float = 0.2
    """Step on the log weights of the normalised form, at the peak learning rate."""
    mu: float | None = None
    """Of the raw form, whose step is the learning rate over mu; by default 0.01 in the universal
    mode and 0.05 with a target. It has to fit the scale of the gradients."""
    coupled: bool = True
    """The step follows the learning rate through warm-up and fall; else it stays at its peak."""
    skip_share: float = 0.02
    """Share of the run at its start in which the weights stay uniform."""
    smoothing: float = 0.0
    """Share of uniform in every step."""
    precondition: Literal["adam"] | None = None
    """`adam`: products with what AdamW makes of the gradient, since that is where a step goes."""
    lag: bool = True
    """The proxy goes down the gradient with the weights before the update; False: after it, with a
    second pass over the batch."""
    how: How = "dots"
    """`forward`: products by forward-mode passes; needs `form: raw` and `lag: false`."""
    across: bool = True
    """Over several ranks: exact products, for which the normalised form sums every domain's
    gradient over the ranks; False: each rank multiplies its own, which is noisier."""
    target_sequences: int | None = None
    """Sequences of the target's batch (in the universal mode of all domains together), over all
    ranks; by default a quarter of the step's."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(
                f"seeds are {list(self.seeds)}", fix="list different seeds: [0, 1, 2]"
            )
        for name in ("kappa", "mu", "target_sequences"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(
                    f"{name} is {value}, not above 0", fix=f"remove {name} to use its default"
                )
        for name in ("skip_share", "smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}, outside [0, 1)",
                    fix=f"remove {name} to use its default",
                )
        if self.how == "forward" and (self.form == "normalised" or self.lag):
            raise ConfigError(
                "how: forward finds products without gradients: there is nothing to take lengths of"
                " or to go down",
                fix="set form: raw and lag: false beside it, or use how: dots",
            )

    def step_size(self, lr: float, peak_lr: float) -> float:
        """What W is multiplied by in a step of this learning rate."""
        if self.form == "normalised":
            return self.kappa * lr / peak_lr if self.coupled else self.kappa
        return (lr if self.coupled else peak_lr) / (self.mu or _MU[self.mode])


class DomainWeights(NamedTuple):
    """Where the weights stand; all of it goes into a checkpoint."""

    log_weights: Tensor
    """(K,) float64, of alpha."""
    sums: Tensor
    """(K,) float64, of alpha over the steps."""
    num_steps: int

    @classmethod
    def uniform(cls, num_domains: int) -> "DomainWeights":
        """Before the first step."""
        zeros = torch.zeros(num_domains, dtype=torch.float64)
        return cls(zeros - math.log(num_domains), zeros, 0)

    @property
    def weights(self) -> Tensor:
        """(K,) alpha."""
        return self.log_weights.exp()

    @property
    def mean(self) -> Tensor:
        """(K,) mean of alpha over the steps so far: the mixture."""
        return self.sums / self.num_steps if self.num_steps else self.weights


def normalised(products: Tensor, norms: Tensor, target_norm: float) -> Tensor:
    """W_j / (mean_i |g_i| |g_tgt|): scales of losses and of parameters leave it as it is.

    One length for all domains, not each its own: a domain with a short gradient moves the target
    little, however well it points.

    Args:
        products: (K,) W; NaN where a domain was absent.
        norms: (K,) lengths |g_i|, NaN likewise; a domain may have a gradient of 0.
        target_norm: |g_tgt|.
    """
    return products / (norms.nanmean() * target_norm + 1e-12)


def update(
    state: DomainWeights, alignment: Tensor, *, step_size: float, smoothing: float = 0.0
) -> DomainWeights:
    """The state after one more step.

    Domains that are there share what they had together; one that is absent keeps its weight.

    Args:
        state: before it; left as it is.
        alignment: (K,) W of either form; NaN where a domain was absent.
        step_size: eta / mu, or kappa.
        smoothing: share of uniform.
    """
    here = ~alignment.isnan()
    log_weights = state.log_weights.clone()
    if bool(here.any()):
        before = log_weights[here]
        moved = (before + step_size * alignment[here].double()).log_softmax(0)
        if smoothing:
            floor = torch.full_like(moved, math.log(smoothing / len(moved)))
            moved = torch.logaddexp(moved + math.log1p(-smoothing), floor)
        log_weights[here] = moved + before.logsumexp(0)
    return DomainWeights(log_weights, state.sums + log_weights.exp(), state.num_steps + 1)


class DoGERule:
    """DoGE inside the loop.

    Args:
        settings: of the method.
        num_domains: K.
        peak_lr: the proxy's highest learning rate.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "alignment": "product of the domain's gradient with the target's, as the update takes it"
    }
    by_domain: ClassVar[bool] = True

    def __init__(self, settings: DoGE, num_domains: int, *, peak_lr: float) -> None:
        self._settings, self._peak_lr = settings, peak_lr
        self._state = DomainWeights.uniform(num_domains)

    def shares(self) -> Tensor:
        return torch.full_like(self._state.sums, 1 / len(self._state.sums))

    def step(self, step: Step) -> Seen:
        settings = self._settings
        if step.number <= settings.skip_share * step.total_steps:
            counts = token_counts(step)
            sums = _descend(step, self._state.weights, counts)
            alignment = torch.full_like(counts, torch.nan)
            self._state = update(self._state, alignment, step_size=0.0)
        else:
            kept = _Kept(step, self._state.weights)
            found, alignment = self._measured(step, kept)
            counts, sums = found.counts, found.loss_sums
            self._state = update(
                self._state,
                alignment,
                step_size=settings.step_size(step.lr, self._peak_lr),
                smoothing=settings.smoothing,
            )
            if settings.lag:
                kept.leave()
            else:
                _descend(step, self._state.weights, counts)
        _check(sums, step)
        return Seen(self._state.weights, sums, counts, {"alignment": alignment})

    def mixture(self) -> Tensor:
        return self._state.mean

    def state(self) -> dict[str, Tensor]:
        state = self._state
        return {
            "log_weights": state.log_weights,
            "sums": state.sums,
            "num_steps": torch.tensor(state.num_steps),
        }

    def load(self, saved: Mapping[str, Tensor]) -> None:
        self._state = DomainWeights(saved["log_weights"], saved["sums"], int(saved["num_steps"]))

    def _measured(self, step: Step, kept: "_Kept") -> tuple[Alignments, Tensor]:
        """The products, and (K,) what the update takes of them."""
        settings = self._settings
        gradient = self._gradient(step)
        found = alignments(
            step,
            step.pieces,
            gradient,
            how=settings.how,
            norms=settings.form == "normalised",
            across=settings.across,
            keep=kept if settings.lag else None,
        )
        _check(found.loss_sums, step)
        if not math.isfinite(gradient.norm):
            raise DivergedError(
                f"the gradient of the target is {gradient.norm} long in step {step.number}",
                fix="lower the learning rate of the proxy, or look at the target's examples",
            )
        if found.norms is None:
            return found, found.products
        return found, normalised(found.products, found.norms, gradient.norm)

    def _gradient(self, step: Step) -> Gradient:
        settings = self._settings
        moments = step.second_moments() if settings.precondition == "adam" else None
        count = settings.target_sequences
        if count is None:
            own = torch.tensor([sum(len(piece.domains) for piece in step.pieces)])
            count = math.ceil(int(step.total(own)) / 4)
        pieces: Sequence[Piece]
        if settings.mode == "universal":
            pieces = step.more("doge", math.ceil(count / step.num_domains))
        else:
            pieces = step.target("doge", count)
        return target_gradient(
            step,
            pieces,
            each_domain=settings.mode == "universal",
            across=settings.across,
            moments=moments,
        )


class _Kept:
    """sum_j alpha_j g_j of this rank, built up while the products are measured."""

    def __init__(self, step: Step, weights: Tensor) -> None:
        self._step = step
        self._weights = weights.tolist()
        self._sum: list[Tensor | None] = [None] * len(step.parameters)

    def __call__(self, domain: int, part: Part) -> None:
        for place, grad in enumerate(part):
            if grad is None:
                continue
            held = self._sum[place]
            if held is None:
                self._sum[place] = grad * self._weights[domain]
            else:
                held.add_(grad, alpha=self._weights[domain])

    def leave(self) -> None:
        """Put it into `.grad`, as the gradient of a sum of products: so the loop may scale it."""
        pairs = zip(self._step.parameters, self._sum, strict=True)
        dots = [torch.dot(p.flatten(), kept.flatten()) for p, kept in pairs if kept is not None]
        self._sum = []
        if dots:  # a rank may have no sequence of the batch
            self._step.backward(torch.stack(dots).sum())


def _descend(step: Step, weights: Tensor, counts: Tensor) -> Tensor:
    """Leave sum_j alpha_j g_j in `.grad`; (K,) sums of the losses, over all ranks."""
    shares = weights / counts.clamp(min=1)
    sums = torch.zeros_like(counts)
    for piece in step.pieces:
        tokens = step.tokens(piece)
        step.backward((tokens.losses * shares.to(tokens.losses)[tokens.domains]).sum())
        sums += loss_sums(tokens, step.num_domains)
    return step.total(sums)


def _check(sums: Tensor, step: Step) -> None:
    if not bool(sums.isfinite().all()):
        raise DivergedError(
            f"the loss of domain {int(sums.isfinite().int().argmin())} is not finite in step"
            f" {step.number}",
            fix="lower the learning rate of the proxy, or look at that domain's examples",
        )
