"""A trainer's model between two steps: its gradients on examples drawn for the purpose.

Source, departures: `mixers.dga`.
Cost: a backward pass over what is drawn; every rank takes its share. Memory of two gradients.
Shapes: K domains, N distributions over them (N = K where none are given), B examples of a piece.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn
from transformers import Trainer

from curate.errors import ConfigError
from curate.models.epochs import random_seed
from curate.models.optimiser import own_random_state
from mixers.alignment import alignments, target_gradient
from mixers.basis import Basis
from mixers.dga import DGA
from mixers.proxy_draws import Draw, stratified_counts
from mixers.ranks import num_ranks, over_ranks
from mixers.rules import Piece, Tokens
from mixers.stream import Examples, MixtureStream
from mixers.trainer_weights import shifts_labels
from mixers.weighted_loss import class_losses

log = logging.getLogger(__name__)


class LiveGradients:
    """Draws examples of the domains and of the target, and compares gradients on them.

    Args:
        trainer: of the model.
        stream: the trainer's, whose domains are drawn from apart from it.
        target: examples.
        settings: how many, and in which form they are compared.
        basis: what is drawn.

    Raises:
        ConfigError: it is not known how the losses of the model's tokens are computed.
    """

    def __init__(
        self,
        trainer: Trainer,
        stream: MixtureStream,
        target: Examples,
        settings: DGA,
        basis: Basis,
    ) -> None:
        self._trainer, self._stream, self._target = trainer, stream, target
        self._settings, self._basis = settings, basis
        self._in_target = {_content(target[row]) for row in range(len(target))} - {None}
        self._told: set[str] = set()
        self._shift = _shifts(trainer)
        self._draws: dict[str, Draw] = {}
        self.collate: Callable[[list[Any]], Any] = cast(Any, trainer.data_collator)

    @property
    def drawn(self) -> dict[str, list[int]]:
        """How many were drawn for each purpose, of each domain; all that a resume needs."""
        return {purpose: draw.drawn.tolist() for purpose, draw in self._draws.items()}

    @drawn.setter
    def drawn(self, saved: Mapping[str, Sequence[int]]) -> None:
        self._draws = {}
        for purpose, drawn in saved.items():
            self._draw(purpose).drawn = np.array(drawn, dtype=np.int64)

    def alignment(self, step: int) -> Tensor:
        """(N,) float64 see `DGA.alignment`; the same on every rank.

        Args:
            step: steps done, which the draws of dropout follow from.

        Raises:
            DivergedError: a gradient is not finite.
            ConfigError: batches have no labels, or the optimiser no mean squares.
        """
        settings = self._settings
        view = _Between(self._trainer, num_domains=len(self._basis.names), shift=self._shift)
        moments = view.second_moments() if settings.precondition == "adam" else None
        was_training = view.model.training
        view.model.train()
        with own_random_state(self._trainer.args.device):
            target = target_gradient(view, self._target_pieces(step), moments=moments)
            measured = alignments(view, self._domain_pieces(step), target)
        view.model.train(was_training)
        assert measured.norms is not None
        return settings.alignment(
            measured.products,
            measured.norms,
            target.norm,
            present=measured.counts > 0,
            names=self._basis.names,
        )

    def _target_pieces(self, step: int) -> list[Piece]:
        _, places = self._draw("target").take(np.array([self._settings.target_sequences]))
        rows = [self._target[int(place)] for place in places]
        return self._pieces(rows, 0, step, "target")

    def _domain_pieces(self, step: int) -> list[Piece]:
        """Of every domain or distribution in turn; `domains` is its number."""
        basis, each, names = self._basis, self._settings.sequences, list(self._stream.domains)
        found: list[Piece] = []
        for number, name in enumerate(basis.names):
            seed = random_seed(self._stream.seed, "basis", name, step)
            counts = stratified_counts(basis.rows[number].numpy(), each, seed)
            domains, places = self._draw(f"of {name}").take(counts)
            rows: list[Any] = []
            for domain, place in zip(domains.tolist(), places.tolist(), strict=True):
                example = self._stream.domains[names[domain]][place]
                if not self._is_shared(example, names[domain]):
                    rows.append(example)
            found += self._pieces(rows, number, step, name)
        return found

    def _is_shared(self, example: Any, domain: str) -> bool:
        """Whether the target holds it too: its gradient would be held against itself."""
        content = _content(example)
        if content is None or content not in self._in_target:
            return False
        if domain not in self._told:
            self._told.add(domain)
            log.warning("dga: examples of %s are in the target too; they are not measured", domain)
        return True

    def _pieces(self, rows: Sequence[Any], number: int, step: int, name: str) -> list[Piece]:
        """This rank's share of the rows, as many at a time as the trainer takes."""
        ranks = num_ranks()
        rank = dist.get_rank() if ranks > 1 else 0
        own, most = rows[rank::ranks], self._trainer.args.per_device_train_batch_size
        found: list[Piece] = []
        for first in range(0, len(own), most):
            batch: Any = self.collate(list(own[first : first + most]))
            if "labels" not in batch:
                raise ConfigError(
                    "the trainer's collator makes batches without labels",
                    fix="let it add labels, which the loss is computed from",
                )
            moved = cast(dict[str, Tensor], self._trainer._prepare_inputs(dict(batch)))  # pyright: ignore[reportPrivateUsage]
            labels = moved["labels"]
            counted = (labels[:, 1:] if self._shift else labels) != -100
            counts = counted.reshape(len(labels), -1).sum(1)
            seed = random_seed(self._stream.seed, "alignment", step, name, first, rank) % 2**63
            domains = torch.full_like(counts, number)
            found.append(Piece(moved, domains, counts, None, seed))
        return found

    def _draw(self, purpose: str) -> Draw:
        if purpose not in self._draws:
            is_target = purpose == "target"
            names = ("target",) if is_target else tuple(self._stream.domains)
            sizes = np.array([len(self._target)]) if is_target else self._stream.sizes
            seed = self._stream.seed
            self._draws[purpose] = Draw(names, sizes, seed=seed, purpose=f"live {purpose}")
        return self._draws[purpose]


class _Between:
    """The trainer's model between two steps, as `mixers.alignment` asks for it."""

    number = total_steps = 0
    lr = 0.0
    pieces: Sequence[Piece] = ()

    def __init__(self, trainer: Trainer, *, num_domains: int, shift: bool) -> None:
        self._trainer, self._shift = trainer, shift
        self.num_domains, self.num_ranks = num_domains, num_ranks()
        # Without the wrapper of several devices: its hooks would sum gradients by themselves.
        accelerator: Any = trainer.accelerator
        self.model = cast(nn.Module, accelerator.unwrap_model(trainer.model_wrapped))
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def tokens(self, piece: Piece, model: nn.Module | None = None) -> Tokens:
        torch.manual_seed(piece.seed)
        given: Mapping[str, Tensor] = piece.batch
        inputs = {key: value for key, value in given.items() if key != "labels"}
        with self._trainer.compute_loss_context_manager():
            output = (model or self.model)(**inputs)
        losses, counted = class_losses(output, given["labels"], shift=self._shift)
        owner = counted.nonzero()[:, 0]
        return Tokens(losses[counted], owner, piece.domains[owner])

    def second_moments(self) -> list[Tensor]:
        """AdamW's mean squares of the parameters, corrected for their start."""
        optimiser: Any = self._trainer.optimizer
        optimiser = getattr(optimiser, "optimizer", optimiser)
        decay = {id(p): group["betas"][1] for group in _groups(optimiser) for p in group["params"]}
        found: list[Tensor] = []
        for parameter in self.parameters:
            state = optimiser.state.get(parameter, {})
            if "exp_avg_sq" not in state or "step" not in state:
                raise ConfigError(
                    "the trainer's optimiser keeps no mean squares of the gradients",
                    fix="remove precondition, or train with optim=adamw_torch",
                )
            done = float(state["step"])
            found.append(state["exp_avg_sq"] / (1 - decay[id(parameter)] ** done))
        return found

    def total(self, values: Tensor) -> Tensor:
        # Some ranks can only exchange what lies on their device.
        moved = values.to(self._trainer.args.device)
        return over_ranks(moved, dist.ReduceOp.SUM, None).to(values.device)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def more(self, purpose: str, each: int | Tensor) -> Sequence[Piece]:
        raise AssertionError("drawn by LiveAlignment")

    def target(self, purpose: str, count: int) -> Sequence[Piece]:
        raise AssertionError("drawn by LiveAlignment")


def _groups(optimiser: Any) -> list[dict[str, Any]]:
    return [group for group in optimiser.param_groups if "betas" in group]


def _shifts(trainer: Trainer) -> bool:
    try:
        return shifts_labels(trainer)
    except ConfigError as error:
        raise ConfigError(
            error.what, fix="train a causal language model or a classifier of transformers"
        ) from error


def _content(example: Any) -> int | None:
    """What tells an example from others; None where that is not known."""
    if not isinstance(example, Mapping) or "input_ids" not in example:
        return None
    ids = np.asarray(cast(Any, example)["input_ids"], dtype=np.int64)
    return xxhash.xxh3_64_intdigest(ids.tobytes())
