"""How much the gradient with respect to the input moves from checkpoint to checkpoint.

    mean_deviation(x) = mean over j of sqrt( 1/K sum_k (S_kj - mean of S_j)^2 )

where S_k is the input gradient of the chosen logit at checkpoint k. The gradients of a data set are
never stored: a running mean and sum of squared deviations take them one checkpoint at a time.

Shapes: N examples of a partition, D numbers at a position, K checkpoints, R rows: the positions of
all examples of a block one after the other without padding, or one for each example where the input
has no positions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from curate.models.batches import Passed, by_length, for_each_batch
from curate.models.input_gradients import How, embedding_of, input_gradients
from curate.models.quantities import to_device
from curate.models.tasks import Encoded, Task

_BLOCK_BYTES = 1 << 28
_CUDA_BLOCK_BYTES = 1 << 32
"""Means and squared deviations that exist at a time."""


class Models(Protocol):
    """The checkpoints of one training run."""

    def __len__(self) -> int: ...

    def at(self, index: int) -> nn.Module:
        """One of them, in eval mode; what an earlier call returned may not be used any more."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """What the checkpoints say of a partition."""

    mean_deviation: Tensor
    """(N,) float64: standard deviation over the checkpoints of each number of the gradient, and
    the mean of these; NaN where nothing counts or a gradient is not finite."""
    chosen: Tensor
    """(N,) int64: class or token of the first counted position; -1 where nothing counts."""
    moved: bool | None
    """Whether the token embeddings differ between checkpoints; None without such a table."""
    passed: Passed


class Moments:
    """Running mean and squared deviations (Welford 1962) of numbers that come once a checkpoint.

    Args:
        rows: R.
        width: D.
        like: for type and device.
    """

    def __init__(self, rows: int, width: int, like: Tensor) -> None:
        self._mean = like.new_zeros(rows, width)
        self._squares = like.new_zeros(rows, width)
        self._seen = torch.zeros(rows, dtype=torch.bool, device=like.device)

    def add(self, where: Tensor, values: Tensor, count: int) -> None:
        """Take the `count`-th values (r, D) of the rows `where` (r,), count from 1."""
        mean = self._mean[where]
        delta = values - mean
        mean += delta / count
        squares = torch.addcmul(self._squares[where], delta, values - mean)
        self._mean[where], self._squares[where] = mean, squares
        self._seen[where] = True

    def mean_deviation(self, owner: Tensor, num_examples: int, count: int) -> Tensor:
        """(num_examples,) float64: the mean over an example's numbers of their population standard
        deviations; `owner` (R,) says whose a row is. The moments are used up."""
        each = self._squares.div_(count).sqrt_().mean(1, dtype=torch.float64)  # (R,)
        total = torch.zeros(2, num_examples, dtype=torch.float64, device=each.device)
        each[~self._seen] = 0
        total.index_add_(1, owner, torch.stack([each, self._seen.double()]))
        return total[0] / total[1]


def gradient_spread(
    models: Models,
    task: Task,
    encoded: Encoded,
    *,
    how: How,
    batch_tokens: int,
    device: torch.device,
    block_bytes: int | None = None,
) -> Spread:
    """How much each example's input gradient moves from checkpoint to checkpoint.

    Examples are taken in blocks whose moments fit into `block_bytes`; each block sees every
    checkpoint once, so that memory is bounded and checkpoints change rarely.

    Args:
        models: K checkpoints, in order.
        task: that encoded the examples.
        encoded: the partition; examples with `num_scored` 0 are not shown.
        how: which gradient. A predicted class is that of the last checkpoint, for all of them.
        batch_tokens: budget of a batch, padding included; a quarter of it is used, as activations
            are kept for the way back.
        device: where the models are.
        block_bytes: None takes 256 MB, or 4 GB on a GPU.

    Raises:
        ConfigError: see `input_gradients`.
        CurateError: memory does not suffice.
    """
    result = torch.full((len(encoded),), torch.nan, dtype=torch.float64, device=device)
    chosen = torch.full((len(encoded),), -1, dtype=torch.int64, device=device)
    scored = np.flatnonzero(encoded.num_scored > 0)
    order = scored[by_length(encoded.lengths[scored])]
    budget = max(1, batch_tokens // 4)
    if not len(order):
        return Spread(
            mean_deviation=result.cpu(),
            chosen=chosen.cpu(),
            moved=None,
            passed=Passed(0, 0, budget),
        )
    # The last one first: with `target: predicted` it says which class the others are asked about.
    visits = [len(models) - 1, *range(len(models) - 1)]
    first = to_device(task.collate(encoded, order[:1]), device)
    like = input_gradients(models.at(visits[0]), task, first, num_examples=1, how=how).values
    rows = encoded.lengths[order] if "input_ids" in first else np.ones(len(order), dtype=np.int64)
    row_bytes = 2 * like.shape[1] * like.element_size()
    usual = _CUDA_BLOCK_BYTES if device.type == "cuda" else _BLOCK_BYTES
    limit = max(1, (block_bytes or usual) // row_bytes)
    sums: set[tuple[float, float] | None] = set()
    batches = halved = 0
    for start, stop in _blocks(rows, limit):
        members = order[start:stop]
        block = _Block(task, encoded, members, rows[start:stop], how, like)
        for count, index in enumerate(visits, start=1):
            model = models.at(index)
            if start == 0:
                sums.add(_table_sum(model))
            passed = block.visit(model, count, chosen, budget)
            batches, halved = batches + passed.num_batches, halved + passed.halved
            budget = passed.batch_tokens
            del model  # before the next is loaded: two may not fit
        result[torch.from_numpy(members).to(device)] = block.mean_deviation(len(visits))
    return Spread(
        mean_deviation=result.cpu(),
        chosen=chosen.cpu(),
        moved=None if None in sums else len(sums) > 1,
        passed=Passed(batches, halved, budget),
    )


class _Block:
    """Some examples of a partition while the checkpoints pass by."""

    def __init__(
        self,
        task: Task,
        encoded: Encoded,
        members: np.ndarray,
        rows: np.ndarray,
        how: How,
        like: Tensor,
    ) -> None:
        self._task, self._encoded, self._members, self._how = task, encoded, members, how
        self._device = like.device
        self._starts = torch.from_numpy(np.cumsum(rows) - rows).to(like.device)  # (n,)
        whose = np.repeat(np.arange(len(members)), rows)
        self._owner = torch.from_numpy(whose).to(like.device)  # (R,)
        self._moments = Moments(len(whose), like.shape[1], like)

    def visit(self, model: nn.Module, count: int, chosen: Tensor, budget: int) -> Passed:
        """Show all of them to the `count`-th checkpoint; the first one fills in `chosen` (N,)."""

        def work(positions: np.ndarray) -> None:
            examples = self._members[positions]
            where = torch.from_numpy(examples).to(self._device, non_blocking=True)
            batch = to_device(self._task.collate(self._encoded, examples), self._device)
            fixed = self._how.target == "predicted" and count > 1
            found = input_gradients(
                model,
                self._task,
                batch,
                num_examples=len(examples),
                how=self._how,
                chosen=chosen[where] if fixed else None,
            )
            begins = self._starts[torch.from_numpy(positions).to(self._device)]
            self._moments.add(begins[found.owner] + _ranks(found.owner), found.values, count)
            if count == 1 and len(found.chosen) == len(examples):
                chosen[where] = found.chosen

        return for_each_batch(self._encoded.lengths[self._members], work, batch_tokens=budget)

    def mean_deviation(self, count: int) -> Tensor:
        return self._moments.mean_deviation(self._owner, len(self._members), count)


def _ranks(owner: Tensor) -> Tensor:
    """(R,) number of each row within its example."""
    starts = torch.searchsorted(owner, owner)
    return torch.arange(len(owner), device=owner.device) - starts


def _blocks(rows: np.ndarray, limit: int) -> Iterator[tuple[int, int]]:
    """Consecutive examples of at most `limit` rows, or a single one that has more."""
    start = total = 0
    for index, count in enumerate(rows):
        if index > start and total + count > limit:
            yield start, index
            start, total = index, 0
        total += int(count)
    yield start, len(rows)


def _table_sum(model: nn.Module) -> tuple[float, float] | None:
    """Two sums over the embedding's weights that tell tables apart."""
    weight = getattr(embedding_of(model), "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return None
    values = weight.detach()
    return float(values.sum(dtype=torch.float64)), float(values.abs().sum(dtype=torch.float64))
