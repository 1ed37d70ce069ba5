"""One step of the proxy's loop as a rule sees it: its pieces, its passes, its sums over ranks.

Shapes: K domains, B sequences, n counted tokens.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from curate.errors import InputError
from curate.models.epochs import random_seed
from curate.models.optimiser import Optimiser, seed_draws
from curate.models.sequences import Sequences
from curate.models.tasks.protocol import Batch, Task
from curate.models.tasks.windows import IGNORED
from mixers.proxy_draws import Draw, Integers
from mixers.ranks import num_ranks, over_ranks, own_rank
from mixers.rules import Piece, Tokens

Reference = Callable[[Integers], npt.NDArray[np.float32]]
"""Numbers (B,) of sequences -> (n,) their cached losses, one after the other."""


class Data(NamedTuple):
    """What a proxy is trained and tested on."""

    sequences: Sequences
    """Of the K training domains, none of them empty."""
    held_out: Sequences | None
    """Of the same domains; some may have none."""
    target: Sequences | None = None
    """Of the target, one domain."""
    reference: Reference | None = None
    """Of `sequences`."""


class Feed:
    """Draws sequences and makes them pieces on the model's device, this rank's share of them.

    Args:
        task: makes batches.
        data: what is drawn from.
        seed: of all draws.
        device: where pieces go.
        piece_tokens: most tokens of a piece; None for no limit.
    """

    def __init__(
        self, task: Task, data: Data, *, seed: int, device: torch.device, piece_tokens: int | None
    ) -> None:
        self._task, self._data, self._seed, self._device = task, data, seed, device
        self._piece_tokens = piece_tokens
        self._draws: dict[str, Draw] = {}
        self._rank = own_rank()

    def batch(self, counts: Integers, step: int, *, by_domain: bool) -> list[Piece]:
        """The batch of a step: so many sequences (K,) of each domain."""
        return self._pieces(self._data.sequences, "batch", counts, step, by_domain=by_domain)

    def more(self, purpose: str, each: int | Tensor, step: int) -> list[Piece]:
        """Sequences of every domain, one piece each."""
        sequences = self._data.sequences
        counts = np.broadcast_to(np.asarray(each, dtype=np.int64), len(sequences.domains))
        return self._pieces(sequences, f"more:{purpose}", counts, step, by_domain=True)

    def target(self, purpose: str, count: int, step: int) -> list[Piece]:
        """Sequences of the target."""
        if self._data.target is None:
            raise InputError("there is no target", fix="set target, such as target.path")
        counts = np.array([count], dtype=np.int64)
        return self._pieces(self._data.target, f"target:{purpose}", counts, step, by_domain=False)

    @property
    def epochs(self) -> npt.NDArray[np.float64]:
        """(K,) how often the batches so far went through each domain."""
        return self._draw(self._data.sequences, "batch").epochs

    def state(self) -> dict[str, Tensor]:
        """How many of each domain were drawn, by purpose."""
        return {purpose: torch.from_numpy(draw.drawn) for purpose, draw in self._draws.items()}

    def load(self, saved: dict[str, Tensor]) -> None:
        """Go back to what `state` gave."""
        for purpose, drawn in saved.items():
            is_target = purpose.startswith("target:")
            source = self._data.target if is_target else self._data.sequences
            assert source is not None
            self._draw(source, purpose).drawn = drawn.numpy().copy()

    def _draw(self, source: Sequences, purpose: str) -> Draw:
        if purpose not in self._draws:
            self._draws[purpose] = Draw(
                source.domains, source.sizes, seed=self._seed, purpose=purpose
            )
        return self._draws[purpose]

    def _pieces(
        self, source: Sequences, purpose: str, counts: Integers, step: int, *, by_domain: bool
    ) -> list[Piece]:
        domains, places = self._draw(source, purpose).take(counts)
        own = np.arange(self._rank, len(domains), num_ranks())
        domains, places = domains[own], places[own]
        found: list[Piece] = []
        borders = np.flatnonzero(np.diff(domains)) + 1 if by_domain else []
        for chosen in np.split(np.arange(len(domains)), borders):
            if len(chosen):
                seed = random_seed(self._seed, "proxy", step, purpose, len(found), self._rank)
                found += self._of(source, domains[chosen], places[chosen], seed % 2**63)
        return found

    def _of(self, source: Sequences, domains: Integers, places: Integers, seed: int) -> list[Piece]:
        taken = source.take(domains, places)
        most = len(domains)
        if self._piece_tokens is not None:
            most = max(1, self._piece_tokens // int(taken.encoded.lengths.max()))
        is_cached = self._data.reference is not None and source is self._data.sequences
        found: list[Piece] = []
        for first in range(0, len(domains), most):
            chosen = np.arange(first, min(first + most, len(domains)))
            batch = self._task.collate(taken.encoded, chosen)
            reference = None
            if is_cached:
                assert self._data.reference is not None
                reference = torch.from_numpy(self._data.reference(taken.numbers[chosen]))
                reference = reference.to(self._device, non_blocking=True)
            found.append(
                Piece(
                    {k: v.to(self._device, non_blocking=True) for k, v in batch.items()},
                    torch.from_numpy(domains[chosen]).to(self._device),
                    counted(batch, len(chosen)).to(self._device),
                    reference,
                    seed + first,
                )
            )
        return found


class LoopStep:
    """A step in progress; see `mixers.rules.Step`."""

    def __init__(
        self,
        optimiser: Optimiser,
        task: Task,
        feed: Feed,
        *,
        pieces: Sequence[Piece],
        lr: float,
        num_domains: int,
    ) -> None:
        self.number = optimiser.step_number + 1
        self.total_steps = optimiser.total_steps
        self.lr, self.num_domains, self.pieces = lr, num_domains, pieces
        self.num_ranks = num_ranks()
        self.model: nn.Module = optimiser.model
        self._optimiser, self._task, self._feed = optimiser, task, feed

    @property
    def parameters(self) -> list[nn.Parameter]:
        return self._optimiser.trained

    def tokens(self, piece: Piece, model: nn.Module | None = None) -> Tokens:
        seed_draws(piece.seed, self._optimiser.device)
        with self._optimiser.precision():
            flat = self._task.logits_and_targets(model or self.model, piece.batch)
        losses = functional.cross_entropy(flat.logits.float(), flat.targets, reduction="none")
        return Tokens(losses, flat.owner, piece.domains[flat.owner])

    def second_moments(self) -> list[Tensor] | None:
        return self._optimiser.second_moments()

    def backward(self, loss: Tensor) -> None:
        self._optimiser.backward(loss)

    def total(self, values: Tensor) -> Tensor:
        return over_ranks(values, dist.ReduceOp.SUM, None)

    def more(self, purpose: str, each: int | Tensor) -> list[Piece]:
        return self._feed.more(purpose, each, self.number)

    def target(self, purpose: str, count: int) -> list[Piece]:
        return self._feed.target(purpose, count, self.number)


def counted(batch: Batch, size: int) -> Tensor:
    """(B,) counted positions of each sequence of a batch."""
    if "targets" in batch:
        return (batch["targets"] != IGNORED).sum(dim=1)
    return torch.ones(size, dtype=torch.int64)


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Add up `.grad` over the ranks; where only some ranks have one, the others count as 0.

    What no rank has a gradient of keeps none: AdamW lets it be, as in a single process.
    """
    if num_ranks() == 1 or not parameters:
        return
    here = [parameter.grad is not None for parameter in parameters]
    present = torch.tensor(here, dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(present, op=dist.ReduceOp.MAX)
    waiting: list[dist.Work | None] = []
    for parameter, is_there in zip(parameters, present.tolist(), strict=True):
        if not is_there:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        waiting.append(dist.all_reduce(parameter.grad, async_op=True))
    for work in waiting:
        if work is not None:
            work.wait()
