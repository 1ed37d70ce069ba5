"""ScaleBiO inside the proxy's loop: two models on one batch, and a step of lambda.

Source, formulas, departures, cost: see `mixers.scalebio`. Losses are measured before either model's
update; u goes first, so that one set of activations and gradients is there at a time.
Shapes: K domains, B sequences and n counted tokens of a piece.
"""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from curate.errors import ConfigError, DivergedError
from curate.models.optimiser import Optimiser
from curate.models.sharded import is_spread
from mixers.lisa import Sampled
from mixers.proxy_step import sum_gradients
from mixers.rules import Piece, Seen, Step, Tokens, loss_sums
from mixers.scalebio import ScaleBiO, SourceWeights, lambda_gradient, notes

log = logging.getLogger(__name__)

_FIELDS = ("logits", "first", "second", "steps")
"""Of `SourceWeights`."""


def example_means(tokens: Tokens, piece: Piece) -> Tensor:
    """(B,) mean loss of each sequence over its counted tokens, with the graph; 0 without any."""
    sums = tokens.losses.new_zeros(len(piece.domains)).index_add(0, tokens.owner, tokens.losses)
    return sums / piece.counts.clamp(min=1).to(sums)


def example_counts(pieces: Sequence[Piece], num_domains: int) -> Tensor:
    """(K,) float64 sequences of each domain that have a counted token; on the CPU."""
    counts = torch.zeros(num_domains, dtype=torch.float64)
    for piece in pieces:
        has = (piece.counts > 0).double().cpu()
        counts.index_add_(0, piece.domains.cpu(), has)
    return counts


class ScaleBiORule:
    """Two models in the proxy's loop; the proxy is w.

    Args:
        settings: of the method.
        num_domains: K.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "loss_w": "mean loss of the domain's examples under the proxy, nats",
        "loss_u": "the same under the second model, which learns from the domains alone, nats",
        "difference": "loss_w - loss_u; the domains where it is lowest gain weight",
        "target_loss": "mean loss of the target's examples under the proxy, nats; one for all",
    }
    by_domain: ClassVar[bool] = False

    def __init__(self, settings: ScaleBiO, num_domains: int) -> None:
        self.settings = settings
        self._lambda = SourceWeights.uniform(num_domains)
        self._sums = torch.zeros(num_domains, dtype=torch.float64)
        self._num_summed = 0
        self._second: Optimiser | None = None  # before `start`
        self._sampled: Sampled | None = None
        self._peak = 1.0

    def start(self, optimiser: Optimiser) -> None:
        self._second = second_model(optimiser)
        self._peak = optimiser.settings.lr
        if self.settings.lisa is not None:
            self._sampled = Sampled(self.settings.lisa, [optimiser, self._second])
        for note in notes(self.settings, optimiser.total_steps):
            log.warning("scalebio: %s", note)

    def shares(self) -> Tensor:
        return torch.full_like(self._lambda.logits, 1 / len(self._lambda.logits))

    def step(self, step: Step) -> Seen:
        sampled = self._sampled
        with nullcontext() if sampled is None else sampled.learning(step.number):
            return self._step(step)

    def mixture(self) -> Tensor:
        if self.settings.mixture == "last" or not self._num_summed:
            return self._lambda.weights
        return self._sums / self._num_summed

    def state(self) -> dict[str, Tensor]:
        state, facts = self.second.state(), self.second.facts()
        scaler = facts["scaler"] or {}
        numbers = {key: torch.tensor(value) for key, value in scaler.items()}
        return {
            **{f"lambda.{name}": getattr(self._lambda, name) for name in _FIELDS},
            "sums": self._sums,
            "num_summed": torch.tensor(self._num_summed),
            "step": torch.tensor(facts["step"]),
            **{f"scaler.{key}": value for key, value in numbers.items()},
            **{f"u.{name}": value for name, value in state.items()},
        }

    def load(self, saved: Mapping[str, Tensor]) -> None:
        self._lambda = SourceWeights(**{name: saved[f"lambda.{name}"] for name in _FIELDS})
        self._sums, self._num_summed = saved["sums"], int(saved["num_summed"])
        scaler: dict[str, Any] = {k: v.item() for k, v in _under("scaler.", saved).items()}
        facts = {"step": int(saved["step"]), "scaler": scaler or None}
        self.second.load(_under("u.", saved), facts)

    @property
    def second(self) -> Optimiser:
        """u in training; there once `start` was called."""
        assert self._second is not None
        return self._second

    def _step(self, step: Step) -> Seen:
        u, size, weights = self.second, step.num_domains, self._lambda.weights
        target = step.target("scalebio", self.settings.target_sequences)
        counts = step.total(example_counts(step.pieces, size))
        others, counts_u = self._others(step, counts)
        count = step.total(example_counts(target, 1))

        u.begin()
        sums_u, *_ = _learn(step, others, weights / counts_u.clamp(min=1), u.model, u.backward)
        sum_gradients(u.trained)
        u.finish()

        share = weights / counts.clamp(min=1)
        of_w = _learn(step, step.pieces, share, step.model, step.backward)
        share = 1 / (self.settings.alpha * count.clamp(min=1))
        on_target, *_ = _learn(step, target, share, step.model, step.backward)

        sums = step.total(torch.cat([sums_u, *of_w, on_target]))
        _check(sums, step.number)
        sums_u, sums_w, token_sums, token_counts, on_target = sums.split([size] * 4 + [1])
        losses_w, losses_u = sums_w / counts, sums_u / counts_u  # NaN where a source is absent
        self._move(step, losses_w, losses_u)
        values = {
            "loss_w": losses_w,
            "loss_u": losses_u,
            "difference": losses_w - losses_u,
            "target_loss": (on_target / count).expand(size),
        }
        return Seen(weights, token_sums, token_counts, values)

    def _others(self, step: Step, counts: Tensor) -> tuple[Sequence[Piece], Tensor]:
        """What u learns from, and its counts: the batch, unless another is asked for."""
        if not self.settings.separate_batches:
            return step.pieces, counts
        pieces = step.more("scalebio", counts.long())
        return pieces, step.total(example_counts(pieces, step.num_domains))

    def _move(self, step: Step, losses_w: Tensor, losses_u: Tensor) -> None:
        """lambda goes down its gradient, from losses before either model's update."""
        weights = self._lambda.weights
        gradient = lambda_gradient(weights, losses_w, losses_u, alpha=self.settings.alpha)
        present = ~(losses_w - losses_u).isnan()
        lr = self.settings.lr * step.lr / self._peak
        self._lambda = self._lambda.moved(gradient, present, lr=lr)
        if 2 * step.number > step.total_steps:
            self._sums = self._sums + self._lambda.weights
            self._num_summed += 1


def second_model(optimiser: Optimiser) -> Optimiser:
    """A copy of a model in training, with an optimiser of its own, for the same steps.

    What does not learn, such as the model under an adapter, is not copied.

    Raises:
        ConfigError: the model is spread over devices.
    """
    model = optimiser.model
    if is_spread(model):
        raise ConfigError(
            "scalebio copies the model, which is spread over devices",
            fix="remove model.device_map, or use another mixer",
        )
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    return Optimiser(
        copy.deepcopy(model, frozen),
        optimiser.settings,
        seed=optimiser.seed,
        total_steps=optimiser.total_steps,
        device=optimiser.device,
        dtype=optimiser.dtype,
    )


def _learn(
    step: Step,
    pieces: Sequence[Piece],
    shares: Tensor,
    model: nn.Module,
    backward: Callable[[Tensor], None],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the examples' losses, each times its domain's share, piece by piece.

    Args:
        step: of the loop.
        pieces: of this rank.
        shares: (K,) float64.
        model: u or w.
        backward: of its optimiser.

    Returns:
        (K,) float64 each, of this rank: sum of the examples' mean losses, of the tokens' losses,
        and number of tokens; on the CPU.
    """
    sums = torch.zeros(2, len(shares), dtype=torch.float64)
    token_sums = torch.zeros(len(shares), dtype=torch.float64)
    for piece in pieces:
        tokens = step.tokens(piece, model)
        means = example_means(tokens, piece)
        backward((shares.to(means)[piece.domains] * means).sum())
        values = torch.stack([means.detach().double(), piece.counts.double()])
        sums.index_add_(1, piece.domains.cpu(), values.cpu())
        token_sums += loss_sums(tokens, len(shares))
    return sums[0], token_sums, sums[1]


def _check(sums: Tensor, number: int) -> None:
    if not bool(sums.isfinite().all()):
        raise DivergedError(
            f"scalebio: the losses of step {number} are not finite",
            fix="lower mix.proxy.lr, or raise mix.proxy.warmup",
        )


def _under(prefix: str, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)
    }
