"""Losses of a task's examples, with their own labels or with labels that the model draws.

    sum     loss_b = sum_t loss_bt                 mean    loss_b = 1/n_b sum_t loss_bt

over the n_b counted positions. With drawn labels the gradients g of all positions are independent
and have the mean zero, so that E[G_b G_b^T] is the sum of the positions' Fisher matrices, which is
the Gauss-Newton matrix of the sum. That of the mean is 1/n_b times as large, not 1/n_b^2: drawn
labels are therefore weighted by 1/sqrt(n_b) where the reduction is the mean.

A label is drawn by the example's own random numbers, so that neither its batch nor its neighbours
matter.

Shapes: B examples of a batch, M counted positions, V classes or tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from curate.models.gradients import first_sweep, softmax_losses
from curate.models.gradients.softmax import logits_of
from curate.models.tasks import Batch, Task, Unheaded
from curate.models.terms import exact_losses

Reduction = Literal["sum", "mean"]
Labels = Literal["sampled", "dataset"]

DRAWS = "label_draws"
"""Entry of a batch: (B, 2) int64, the random numbers' key of each example."""

_PIECE_NUMBERS = 1 << 21
"""Probabilities that exist at a time."""


class ExampleLosses:
    """Gives (B,) losses of a batch.

    Args:
        task: that makes the batches.
        reduction: over the counted positions of an example.
        labels: sampled: drawn from the model, by the keys in the batch.
        keeps_logits: of a large head, whose own gradients are looked at.
    """

    def __init__(
        self,
        task: Task,
        *,
        reduction: Reduction = "sum",
        labels: Labels = "dataset",
        keeps_logits: bool = False,
    ) -> None:
        self._task = task
        self._reduction = reduction
        self._labels = labels
        self.totals = self.counts = torch.zeros(0)
        """(B,) summed losses and counted positions of the last call."""
        self._before: Any = None if keeps_logits else getattr(task, "before_head", None)

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        given = {key: value for key, value in batch.items() if key != DRAWS}
        size = len(next(iter(given.values())))
        each, owner = self._positions(model, given, batch.get(DRAWS))
        total = each.new_zeros(size).index_add(0, owner, each)
        counts = each.new_zeros(size).index_add(0, owner, torch.ones_like(each))
        self.totals, self.counts = total.detach(), counts
        if self._reduction == "sum":
            return total
        counts = counts.clamp(min=1)
        return total / (counts if self._labels == "dataset" else counts.sqrt())

    def _positions(
        self, model: nn.Module, batch: Batch, draws: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        rows: Unheaded | None = None if self._before is None else self._before(model, batch)
        if rows is None:
            flat = self._task.logits_and_targets(model, batch)
            targets = flat.targets
            if self._labels == "sampled":
                assert draws is not None
                chosen = uniforms(draws, flat.owner)
                targets = drawn_labels(flat.logits.detach(), chosen)
            return exact_losses(flat.logits, targets), flat.owner
        targets = rows.targets
        if self._labels == "sampled":
            assert draws is not None
            targets = _from_head(rows, uniforms(draws, rows.owner))
        sweep = first_sweep(rows.head, rows.states, targets, rows.owner)
        return softmax_losses(rows.head, sweep), rows.owner


def draw_keys(names: Sequence[str], *, seed: int) -> np.ndarray:
    """(N, 2) int64 keys of the random numbers that labels are drawn with.

    Args:
        names: one for each example, stable from run to run.
        seed: another one draws other labels.
    """
    found = [xxhash.xxh3_128_digest(f"labels\0{seed}\0{name}".encode()) for name in names]
    return np.frombuffer(b"".join(found), dtype="<i8").reshape(-1, 2).copy()


def uniforms(draws: Tensor, owner: Tensor) -> Tensor:
    """(M,) float64 in [0, 1): one for each position, by the example's own generator.

    Args:
        draws: (B, 2) int64 keys.
        owner: (M,) example of each position, ascending.
    """
    counts = owner.bincount(minlength=len(draws)).tolist()
    parts = [
        np.random.Generator(np.random.Philox(key=key.view(np.uint64))).random(count)
        for key, count in zip(draws.cpu().numpy(), counts, strict=True)
    ]
    found = np.concatenate(parts) if parts else np.empty(0)
    return torch.from_numpy(found).to(owner.device)


def drawn_labels(logits: Tensor, chosen: Tensor) -> Tensor:
    """(M,) labels of the softmax distribution: the inverse of its cumulative sum.

    Args:
        logits: (M, V)
        chosen: (M,) float64 in [0, 1).
    """
    size = max(1, _PIECE_NUMBERS // logits.shape[1])
    parts = [
        _drawn(logits[start : start + size], chosen[start : start + size])
        for start in range(0, max(1, len(logits)), size)
    ]
    return torch.cat(parts)


def _from_head(rows: Unheaded, chosen: Tensor) -> Tensor:
    states = rows.states.detach()
    size = max(1, _PIECE_NUMBERS // rows.head.out_features)
    with torch.no_grad():
        parts = [
            _drawn(logits_of(rows.head, states[start : start + size]), chosen[start : start + size])
            for start in range(0, max(1, len(states)), size)
        ]
    return torch.cat(parts)


def _drawn(logits: Tensor, chosen: Tensor) -> Tensor:
    sums = logits.double().softmax(1).cumsum(1)
    found = torch.searchsorted(sums, chosen[:, None] * sums[:, -1:], right=True)[:, 0]
    return found.clamp(max=logits.shape[1] - 1)
