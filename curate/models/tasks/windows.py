"""Examples of several rows: long ones in overlapping windows, every token counted once.

A window reads `size` tokens, of which the first `overlap` are the last of the window before: they
are context and count there only. The last window is as short as its tokens. Windows in which
nothing counts, as those of a long prompt, are left out.

A batch of such examples has the axes (example, row, position), so that the first axis is the
example as in every other batch; the model sees (example x row, position). Examples with fewer rows
than the longest are filled up with rows in which nothing counts.

Shapes: B examples of a batch, W rows of an example, R = B * W, T positions.
"""

import inspect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from curate.models.tasks.protocol import Batch

IGNORED = -100
"""In place of the target of a position that does not count."""

_GROUP_TOKENS = {"cpu": 16_384, "cuda": 65_536}
"""Tokens of the rows that are read together where an example has many."""


def window_bounds(counted: np.ndarray, size: int, overlap: int) -> list[tuple[int, int, int]]:
    """(start, first that counts, end) of each window of one example in which something counts.

    Args:
        counted: (L,) bool, which of its tokens count.
        size: tokens of a window.
        overlap: of them repeated from the window before, at least 1 and less than `size`.
    """
    found: list[tuple[int, int, int]] = []
    first = 0
    while first < len(counted):
        start = max(0, first - overlap)
        end = min(start + size, len(counted))
        if counted[first:end].any():
            found.append((start, first, end))
        first = end
    return found


def row_batch(
    rows: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], padding: int
) -> dict[str, Tensor]:
    """`input_ids` (B, W, T), `targets` (B, W, T - 1) and, where needed, `attention_mask`.

    Args:
        rows: of each example, its rows: tokens, and bool which of them count.
        padding: token that fills rows up.
    """
    num_rows = max(1, *map(len, rows))
    width = max(1, max(len(tokens) for own in rows for tokens, _ in own))
    ids = torch.full((len(rows), num_rows, width), padding, dtype=torch.int64)
    targets = torch.full_like(ids, IGNORED)
    mask = torch.ones_like(ids)
    for example, own in enumerate(rows):
        for row, (tokens, counted) in enumerate(own):
            length = len(tokens)
            ids[example, row, :length] = torch.from_numpy(tokens.astype(np.int64))
            chosen = np.flatnonzero(counted)
            targets[example, row, chosen] = ids[example, row, chosen]
            # A row without a token would have nothing to attend to: its padding is seen instead.
            mask[example, row, length or width :] = 0
    batch = {"input_ids": ids, "targets": targets[:, :, 1:]}
    if not bool(mask.all()):
        batch["attention_mask"] = mask
    return batch


class Rows(NamedTuple):
    """A batch as the model sees it."""

    inputs: dict[str, Tensor]
    """What its forward takes, (R, T) each."""
    targets: Tensor
    """(R, T - 1)"""
    owner: Tensor
    """(R,) the example of each row."""

    def counted(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each counted position, in order: row, column, target, example; each (M,)."""
        rows, columns = torch.nonzero(self.targets != IGNORED, as_tuple=True)
        return rows, columns, self.targets[rows, columns], self.owner[rows]


def rows_of(model: nn.Module, batch: Batch) -> Rows:
    """The rows of all examples of a batch, below each other."""
    names = ("input_ids", "attention_mask", "position_ids")
    inputs = {key: batch[key] for key in names if key in batch}
    ids, targets = batch["input_ids"], batch["targets"]
    examples = torch.arange(len(ids), device=ids.device)
    if ids.dim() == 2:
        return Rows(inputs, targets, examples)
    inputs = {key: value.flatten(0, 1) for key, value in inputs.items()}
    if "position_ids" in inspect.signature(model.forward).parameters:
        # Else positions are looked up once for all rows, and gradients could not tell the examples.
        positions = torch.arange(ids.shape[2], device=ids.device)
        inputs["position_ids"] = positions.expand(len(inputs["input_ids"]), -1)
    return Rows(inputs, targets.flatten(0, 1), examples.repeat_interleave(ids.shape[1]))


def row_groups(rows: Rows) -> Iterator[Rows]:
    """The rows in which something counts, so many at a time that a long example needs no more
    memory than a short one."""
    chosen = torch.nonzero((rows.targets != IGNORED).any(1))[:, 0]
    limit = _GROUP_TOKENS["cuda" if chosen.is_cuda else "cpu"]
    for part in chosen.split(max(1, limit // (rows.targets.shape[1] + 1))):
        inputs = {key: value[part] for key, value in rows.inputs.items()}
        yield Rows(inputs, rows.targets[part], rows.owner[part])
