"""Principal axes as the sides of a projection: what most of a sample's gradients lie along.

    left  = top p eigenvectors of E[g g^T]        right = top p eigenvectors of E[x x^T]

over the positions that have a part in the loss. Convolutions see patches.

Source: Choe et al., "What is your data worth to GPT?", 2024, arXiv:2405.13954, section 3.
Departures: what has no pair of sides for each position (embeddings, vectors, grouped convolutions,
fused experts, a head whose logits are not kept, sides beyond 16,384) keeps its random sides.
Cost: one pass over the sample and T (P^2 + Q^2) more products for each example of it; P^3 + Q^3 at
the end.

Shapes: P rows and Q columns of a parameter, p and q of its projection.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from curate.data.files import misshapen
from curate.models.batches import for_each_batch
from curate.models.example_losses import ExampleLosses, Reduction
from curate.models.gradients import Engine, Seen, Sides, Wanted
from curate.models.gradients.forms import Outer, raised
from curate.models.quantities import to_device
from curate.models.tasks import Encoded, Task

log = logging.getLogger(__name__)

_LONGEST = 16_384


class Moments:
    """Sums of g g^T and x x^T over the positions of a sample.

    Args:
        model: in eval mode.
        task: that makes the batches.
        drawn: random sides of the parameters, on the model's device.
        reduction: of an example's loss over its counted positions.
    """

    def __init__(
        self, model: nn.Module, task: Task, drawn: Mapping[str, Sides], *, reduction: Reduction
    ) -> None:
        self._engine = Engine(model, only=drawn.__contains__)
        self._task = task
        self._drawn = drawn
        self._losses = ExampleLosses(task, reduction=reduction)
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._batch: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, encoded: Encoded, *, batch_tokens: int, device: torch.device) -> None:
        """Add the examples of a partition.

        Args:
            encoded: the partition.
            batch_tokens: budget of a batch, padding included; a quarter of it is taken.
            device: where the model is.
        """
        scored = np.flatnonzero(encoded.num_scored > 0)

        def work(members: np.ndarray) -> None:
            batch = to_device(self._task.collate(encoded, scored[members]), device)
            # A batch that does not fit leaves no trace.
            self._batch = {}
            wanted = Wanted(squares=False, tell=self._see)
            self._engine.measure(self._losses, batch, num_examples=len(members), wanted=wanted)
            for name, pair in self._batch.items():
                self._sums[name] = _added(self._sums.get(name), pair)
            self._batch = {}

        with torch.no_grad():
            for_each_batch(encoded.lengths[scored], work, batch_tokens=max(1, batch_tokens // 4))

    def _see(self, seen: Seen) -> None:
        if not isinstance(seen.form, Outer) or seen.form.groups > 1:
            return
        left, right = (raised(side).flatten(0, 1) for side in seen.form[:2])
        if max(left.shape[1], right.shape[1]) > _LONGEST:
            return
        counted = (left != 0).any(1)  # padding has no gradient, but an input
        left, right = left[counted], right[counted]
        pair = (left.T @ left).double(), (right.T @ right).double()
        self._batch[seen.name] = _added(self._batch.get(seen.name), pair)

    def sides(self) -> dict[str, Sides]:
        """The sides, as wide as those that were drawn."""
        found: dict[str, Sides] = {}
        for name, drawn in self._drawn.items():
            found[name] = drawn
            if name in self._sums:
                axes = zip(self._sums[name], drawn, strict=True)
                found[name] = Sides(*(_top(moment, like) for moment, like in axes))
        kept = [name for name in self._drawn if name not in self._sums]
        if kept:
            log.info("%d of %d parameters have random sides, not principal axes: %s",
                     len(kept), len(found), ", ".join(kept[:3]))  # fmt: skip
        return found


def save_sides(sides: Mapping[str, Sides], path: Path) -> None:
    """As safetensors."""
    tensors = {
        f"{name}/{side}": value.contiguous().cpu()
        for name, pair in sides.items()
        for side, value in pair._asdict().items()
    }
    save_file(tensors, path)


def load_sides(path: Path, names: Sequence[str], like: Mapping[str, Sides]) -> dict[str, Sides]:
    """What `save_sides` wrote.

    Args:
        path: of the file.
        names: parameters, in the order that is wanted.
        like: sides whose devices and types are wanted.

    Raises:
        InputError: the file is missing or damaged, or holds other parameters.
    """
    try:
        tensors = load_file(path)
        return {
            name: Sides(*(
                tensors[f"{name}/{side}"].to(value.device, value.dtype)
                for side, value in like[name]._asdict().items()
            ))
            for name in names
        }  # fmt: skip
    except (OSError, SafetensorError, KeyError) as error:
        raise misshapen(path, str(error)) from error


def _added(
    before: tuple[Tensor, Tensor] | None, pair: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    return pair if before is None else (before[0] + pair[0], before[1] + pair[1])


def _top(moment: Tensor, like: Tensor) -> Tensor:
    """(D, p) eigenvectors of the largest eigenvalues; a side that is kept whole stays so."""
    if len(moment) == like.shape[1]:
        return like
    _, vectors = torch.linalg.eigh(moment)
    top = vectors[:, -like.shape[1] :].flip(1)
    # The sign of an eigenvector is arbitrary: its largest entry is made positive.
    largest = top.gather(0, top.abs().argmax(0, keepdim=True))
    return (top * largest.sign()).to(like.dtype)
