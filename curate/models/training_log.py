"""What training leaves behind beside checkpoints: each example's record and the learning curve.

The record of an example is what its own training forward showed, so it costs no extra pass. It is
gathered for one window of partitions at a time and written when the window is behind; tables of
an epoch have the rows of the index in their order, with nulls where an example was not trained on.

Shapes: N examples of a window, B of a batch, M counted positions, V classes or tokens.
"""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor
from torch.nn import functional

from curate.data.files import replace
from curate.data.tables import write_table
from curate.models.tasks.protocol import Flat

COLUMNS = {
    "loss": "mean cross-entropy over the counted positions, nats",
    "correct": "share of the counted positions whose best guess was right, 0 to 1",
    "margin": "mean lead of the right logit over the best other one; negative where it was beaten",
}

_PIECE_NUMBERS = 1 << 20
"""Logits that are looked at together."""

_CURVE = {
    "step": pl.Int64,
    "epoch": pl.Float64,
    "tokens": pl.Int64,
    "lr": pl.Float64,
    "loss": pl.Float64,
    "held_out_loss": pl.Float64,
}


class Losses(NamedTuple):
    """The loss of a batch and of its examples."""

    mean: Tensor
    """() mean over the counted positions, nats; has the graph."""
    num_counted: int
    """M."""
    examples: Tensor
    """(3, B) float32 loss, correct and margin of each example; no graph."""


class Pending(NamedTuple):
    """One step's numbers, still on the device."""

    step: int
    indices: npt.NDArray[np.int64]
    losses: Losses


@dataclass(slots=True)
class Sums:
    """Running totals of training; small JSON values."""

    tokens: int = 0
    """Tokens trained on so far, padding left out."""
    loss: float = 0.0
    """Sum over the counted positions since the last point of the curve."""
    counted: int = 0
    """Their number."""
    points: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """The learning curve so far."""

    def add(self, loss: float, counted: int) -> None:
        """One step; strictly one after the other, since the order decides the last digits."""
        self.loss += loss * counted
        self.counted += counted

    def point(self, *, step: int, epoch: float, lr: float, held_out_loss: float | None) -> None:
        """Put a point on the curve and begin the next stretch."""
        loss = self.loss / self.counted if self.counted else math.nan
        self.points.append(
            {
                "step": step,
                "epoch": epoch,
                "tokens": self.tokens,
                "lr": lr,
                "loss": loss,
                "held_out_loss": held_out_loss,
            }
        )
        self.loss, self.counted = 0.0, 0

    def facts(self) -> dict[str, Any]:
        """As JSON values; `Sums(**facts)` gives them back."""
        return asdict(self)


def batch_losses(flat: Flat, num_examples: int, weights: Tensor | None = None) -> Losses:
    """Loss of a batch, and what it shows of each example.

    Args:
        flat: the counted positions of the batch.
        num_examples: B.
        weights: (B,) loss weights, with mean 1 over all examples; the records stay unweighted.
    """
    logits = flat.logits.float()  # under mixed precision they come in half
    each = functional.cross_entropy(logits, flat.targets, reduction="none")  # (M,)
    with torch.no_grad():
        margin = _margins(logits, flat.targets)
        rows = torch.stack([each.detach(), (margin > 0).float(), margin])  # (3, M)
        totals = rows.new_zeros((3, num_examples)).index_add_(1, flat.owner, rows)
        counts = rows.new_zeros(num_examples).index_add_(0, flat.owner, torch.ones_like(margin))
        examples = totals / counts.clamp(min=1)
    mean = each.mean() if weights is None else (each * weights[flat.owner]).mean()
    return Losses(mean, len(flat.targets), examples)


def _margins(logits: Tensor, targets: Tensor) -> Tensor:
    """(M,) logit of the target minus the largest other one."""
    index = targets[:, None]
    size = max(1, _PIECE_NUMBERS // logits.shape[1])
    # In pieces, so that no second copy of all logits exists.
    others = [
        piece.scatter(1, places, -torch.inf).amax(1)
        for piece, places in zip(logits.split(size), index.split(size), strict=True)
    ]
    return logits.gather(1, index).squeeze(1) - torch.cat(others)


def write_curve(path: Path, sums: Sums) -> None:
    """The learning curve as a table: one row per point."""
    frame = pl.DataFrame(sums.points, schema=_CURVE)
    replace(path, lambda target: write_table(frame, target))


def log_table(keys: pl.DataFrame, values: npt.NDArray[np.float32] | None) -> pl.DataFrame:
    """The records of one partition in one epoch.

    Args:
        keys: source, file, row of its examples.
        values: (3, N) loss, correct, margin; NaN where the example was not trained on. None where
            training stopped before it reached the partition.
    """
    if values is None:
        values = np.full((3, keys.height), np.nan, dtype=np.float32)
    return keys.with_columns(
        pl.Series(name, column).fill_nan(None) for name, column in zip(COLUMNS, values, strict=True)
    )
