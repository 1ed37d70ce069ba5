"""Projected gradients of a partition's examples, from one pass, handed on batch by batch.

Shapes: N examples of a partition, B of a batch, M counted positions, k numbers of a row.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from curate.models.adam_pass import AdamProjector
from curate.models.batches import Ahead, Passed, for_each_batch
from curate.models.gradient_similarity import position_losses
from curate.models.gradients import Engine, Sides, Wanted
from curate.models.projection import flat_rows
from curate.models.quantities import pinned, to_device
from curate.models.tasks import Batch, Encoded, Task

Reduction = Literal["sum", "mean"]
Take = Callable[[npt.NDArray[np.int64], Tensor], object]
"""What is told of a batch: (B,) positions of its examples in the partition, (B, k) float32 rows."""


class Indexed(NamedTuple):
    """What one batch gave."""

    rows: Tensor
    """(B, k) float32 projected gradients of the examples' losses, or float64 ones."""
    losses: Tensor
    """(B,) float64 mean loss of the counted positions, nats."""
    num_positions: Tensor
    """(B,) float64 how many they are."""
    squares: Tensor | None
    """(B,) float64 squared norm of the whole gradient of the same parameters, where asked for."""


class IndexPass:
    """Projected gradients of a task's loss.

    Args:
        model: in eval mode; the parameters in `sides` require gradients.
        task: that makes the batches.
        sides: parameter -> what its gradient is projected on; its order is that of a row.
        reduction: over the counted positions of an example.
        with_squares: exact squared norms of the gradients too; they cost a tenth more or so.
        adam: makes the rows of Adam's updates; None: they are those of the gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        sides: Mapping[str, Sides],
        *,
        reduction: Reduction,
        with_squares: bool = False,
        adam: AdamProjector | None = None,
    ) -> None:
        self._engine = Engine(model, only=sides.__contains__)
        self._task = task
        self._sides = sides
        self._reduction = reduction
        self._adam = adam
        self.with_squares = with_squares
        self._seen: tuple[Tensor, Tensor] | None = None

    def measure(self, batch: Batch, num_examples: int) -> Indexed:
        """Rows and losses of a batch."""
        adam = self._adam
        most = None if adam is None else adam.most_examples()
        if most is not None and num_examples > most:
            return self._in_parts(batch, num_examples, most)
        if adam is not None:
            adam.begin(self._divisors)
        found = self._engine.measure(
            self.losses, batch, num_examples=num_examples, wanted=self._wanted()
        )
        projections = found.projections if adam is None else adam.finish(found.whole)
        if projections is None:
            return self.measure(batch, num_examples)
        rows = flat_rows(projections, self._sides)
        squares = found.total() if self.with_squares else None
        if self._reduction == "mean":  # a gradient is linear in its loss
            rows = rows if adam is not None else rows / self._divisors()[:, None].to(rows.dtype)
            squares = None if squares is None else squares / self._divisors().square()
        seen, self._seen = self._seen, None
        assert seen is not None  # the engine's last call of the losses is for the whole batch
        losses, counts = seen
        return Indexed(rows, losses / counts, counts, squares)

    def _in_parts(self, batch: Batch, num_examples: int, most: int) -> Indexed:
        """`measure` of at most so many examples at a time."""
        parts: list[Indexed] = []
        for start in range(0, num_examples, most):
            some = slice(start, min(start + most, num_examples))
            part = {name: value[some] for name, value in batch.items()}
            parts.append(self.measure(part, some.stop - some.start))
        squares = [part.squares for part in parts if part.squares is not None]
        return Indexed(
            torch.cat([part.rows for part in parts]),
            torch.cat([part.losses for part in parts]),
            torch.cat([part.num_positions for part in parts]),
            torch.cat(squares) if squares else None,
        )

    def _wanted(self) -> Wanted:
        if self._adam is None:
            return Wanted(squares=self.with_squares, projections=self._sides)
        return Wanted(squares=self.with_squares, tell=self._adam.see, whole=self._adam.whole)

    def _divisors(self) -> Tensor:
        """(N,) what makes the gradients of sums those of the losses that are asked for."""
        assert self._seen is not None
        counts = self._seen[1]
        return counts if self._reduction == "mean" else torch.ones_like(counts)

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """(B,) losses, summed over the counted positions."""
        each, owner = position_losses(model, self._task, dict(batch))
        size = len(next(iter(batch.values())))
        with torch.no_grad():
            zeros = torch.zeros(size, dtype=torch.float64, device=each.device)
            sums = zeros.index_add(0, owner, each.detach().double())
            counts = zeros.index_add(0, owner, torch.ones_like(each, dtype=torch.float64))
        self._seen = sums, counts
        return each.new_zeros(size).index_add(0, owner, each)


def index_rows(
    index: IndexPass,
    task: Task,
    encoded: Encoded,
    take: Take,
    *,
    batch_tokens: int,
    device: torch.device,
) -> tuple[dict[str, Tensor], Passed]:
    """Hand on the rows of a partition as they are made; of them only a batch is in memory.

    Args:
        index: of the model, which is on `device`.
        task: that encoded the examples.
        encoded: the partition; examples with `num_scored` 0 get no row.
        take: told of every batch; after a lack of memory of the same examples once more.
        batch_tokens: budget of a batch, padding included, as other passes have it: a quarter of it
            is taken, as all activations are kept.
        device: where the model is.

    Returns:
        `loss` (the mean of the counted positions, nats), `squared_norm` of the row,
        `num_positions`, `num_scored` and, where asked for, `grad_sq_norm` of the whole gradient:
        (N,) float64 on the CPU, NaN where there is none; and how the pass went.

    Raises:
        CurateError: memory does not suffice, or a parameter's gradient cannot be measured.
    """
    scored = np.flatnonzero(encoded.num_scored > 0)
    names = ["loss", "squared_norm", "num_positions"]
    names += ["grad_sq_norm"] if index.with_squares else []
    found = {name: torch.full((len(encoded),), torch.nan, dtype=torch.float64) for name in names}

    def collate(members: np.ndarray) -> Batch:
        return pinned(task.collate(encoded, scored[members]), device)

    batches = Ahead(collate, is_threaded=device.type == "cuda")

    def work(members: np.ndarray) -> None:
        chosen = scored[members]
        seen = index.measure(to_device(batches.take(members), device), len(chosen))
        take(chosen, seen.rows)
        columns = {
            "loss": seen.losses,
            "squared_norm": seen.rows.double().square().sum(1),
            "num_positions": seen.num_positions,
            "grad_sq_norm": seen.squares,
        }
        for name, values in columns.items():
            if values is not None:
                found[name][torch.from_numpy(chosen)] = values.cpu()

    try:
        with torch.no_grad():
            passed = for_each_batch(
                encoded.lengths[scored],
                work,
                batch_tokens=max(1, batch_tokens // 4),
                begin=batches.begin,
            )
    finally:
        batches.close()
    counts = torch.from_numpy(encoded.num_scored).double()
    found["num_scored"] = counts.masked_fill(counts == 0, torch.nan)
    if encoded.scored_share is not None:
        share = torch.from_numpy(encoded.scored_share).double()
        found["scored_share"] = share.masked_fill(counts == 0, torch.nan)
    return found, passed
