"""Inner products of examples' gradients with a given one, and squared norms, from the same pass.

Shapes: N examples of a partition, n of them evaluated, B of a batch.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curate.models.batches import Passed, for_each_batch
from curate.models.gradients import Engine, Wanted, first_sweep, softmax_losses
from curate.models.quantities import to_device
from curate.models.tasks import Batch, Encoded, Task, Unheaded
from curate.models.terms import exact_losses

_DIRECTION = "target"


class SimilarityPass:
    """The gradients of a task's loss, the mean over the counted positions of each example.

    Args:
        model: in eval mode, on `device`; its weights may change between passes.
        task: that encodes the examples.
        batch_tokens: budget of a batch, padding included.
        device: where the model is.
        only: parameters to measure, by name.

    Raises:
        ConfigError: no parameter is left to measure.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        batch_tokens: int,
        device: torch.device,
        only: Callable[[str], bool] | None = None,
    ) -> None:
        self._engine = Engine(model, only=only)
        self._task = task
        self._budget = batch_tokens
        self._device = device

    def measure(
        self, encoded: Encoded, chosen: np.ndarray, gradient: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Passed]:
        """Inner products with a gradient, and squared norms.

        Args:
            encoded: a partition.
            chosen: (n,) positions of examples that have something to score.
            gradient: parameter -> a tensor of its shape.

        Returns:
            (n,) and (n,) float64 on the CPU, and how the pass went.

        Raises:
            CurateError: memory does not suffice, or a parameter's gradient cannot be measured.
        """
        where = {name: value.to(self._device) for name, value in gradient.items()}
        wanted = Wanted(squares=True, directions={_DIRECTION: where})
        dots = torch.zeros(len(chosen), dtype=torch.float64, device=self._device)
        squares = torch.zeros_like(dots)

        def work(members: np.ndarray) -> None:
            batch = to_device(self._task.collate(encoded, chosen[members]), self._device)
            found = self._engine.measure(
                self._losses, batch, num_examples=len(members), wanted=wanted
            )
            rows = torch.from_numpy(members).to(self._device)
            dots[rows] = found.inner[_DIRECTION]
            squares[rows] = found.total()

        with torch.no_grad():
            passed = for_each_batch(encoded.lengths[chosen], work, batch_tokens=self._budget)
        self._budget = passed.batch_tokens  # what did not fit once need not be tried again
        return dots.cpu(), squares.cpu(), passed

    def _losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """(B,) mean loss of each example."""
        each, owner = position_losses(model, self._task, dict(batch))
        zeros = each.new_zeros(len(next(iter(batch.values()))))
        totals = zeros.index_add(0, owner, each)
        counts = zeros.index_add(0, owner, torch.ones_like(each))
        return totals / counts.clamp(min=1)


def position_losses(model: nn.Module, task: Task, batch: Batch) -> tuple[Tensor, Tensor]:
    """(M,) losses of the counted positions, whose gradients are exact, and (M,) their examples.

    Args:
        model: in any mode.
        task: that made the batch.
        batch: on the model's device.
    """
    before: Any = getattr(task, "before_head", None)
    rows: Unheaded | None = None if before is None else before(model, batch)
    if rows is None:
        flat = task.logits_and_targets(model, batch)
        return exact_losses(flat.logits, flat.targets), flat.owner
    sweep = first_sweep(rows.head, rows.states, rows.targets, rows.owner)
    return softmax_losses(rows.head, sweep), rows.owner
