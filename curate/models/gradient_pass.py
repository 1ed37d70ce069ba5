"""Squared gradient norms of a batch, and its logits, from the same forward pass.

Shapes: N examples of a batch, M counted positions, V classes or tokens.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from curate.models.gradients import Engine
from curate.models.tasks import Batch, Flat, Task


class GradientPass:
    """The gradients of a task's loss, summed over the counted positions of each example.

    Args:
        model: in eval mode; all parameters that require a gradient are measured.
        task: that makes the batches.
    """

    def __init__(self, model: nn.Module, task: Task) -> None:
        self._engine = Engine(model)
        self._task = task
        self._seen: Flat | None = None

    def measure(self, batch: Batch, num_examples: int) -> tuple[Flat, Tensor]:
        """The counted positions of a batch, without a graph, and (N,) float64 squared norms."""
        found = self._engine.measure(self._losses, batch, num_examples=num_examples)
        flat, self._seen = self._seen, None
        assert flat is not None  # the engine's last call of the losses is for the whole batch
        return flat, found.total()

    def _losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        flat = self._task.logits_and_targets(model, dict(batch))
        self._seen = Flat(flat.logits.detach(), flat.targets, flat.owner)
        each = functional.cross_entropy(flat.logits, flat.targets, reduction="none")  # (M,)
        num_examples = len(next(iter(batch.values())))
        return torch.zeros(num_examples, dtype=each.dtype, device=each.device).index_add(
            0, flat.owner, each
        )
