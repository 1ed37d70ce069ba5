"""Rows of different length in one flat array, and a batch of them padded on the right."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Ragged:
    """N rows of numbers, one behind the other."""

    values: np.ndarray
    """(sum of lengths,) int32 or bool."""
    starts: np.ndarray
    """(N + 1,) int64 where each row begins; the last entry is the end."""

    @classmethod
    def of(cls, rows: Sequence[np.ndarray], dtype: type = np.int32) -> "Ragged":
        starts = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=starts[1:])
        return cls(np.concatenate([np.zeros(0, dtype), *rows]).astype(dtype, copy=False), starts)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int64."""
        return np.diff(self.starts)

    def sums(self) -> np.ndarray:
        """(N,) int64 sum of each row."""
        running = np.zeros(len(self.values) + 1, dtype=np.int64)
        np.cumsum(self.values, out=running[1:])
        return np.diff(running[self.starts])

    def rectangle(self, indices: Sequence[int] | np.ndarray, fill: int) -> np.ndarray:
        """(B, longest) the named rows, filled up on the right."""
        chosen = np.asarray(indices)
        lengths = self.lengths[chosen]
        width = int(lengths.max(initial=1))
        table = np.full((len(chosen), width), fill, dtype=self.values.dtype)
        for row, (start, length) in enumerate(zip(self.starts[chosen], lengths, strict=True)):
            table[row, :length] = self.values[start : start + length]
        return table


def pad(tokens: Ragged, indices: Sequence[int] | np.ndarray, fill: int) -> dict[str, Tensor]:
    """`input_ids` (B, T) and, where rows differ in length, their `attention_mask` (B, T).

    Without padding there is no mask, which lets attention take its faster path.
    """
    batch = {"input_ids": torch.from_numpy(tokens.rectangle(indices, fill)).long()}
    lengths = torch.from_numpy(tokens.lengths[np.asarray(indices)])
    width = batch["input_ids"].shape[1]
    if int(lengths.min()) < width:
        batch["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
    return batch
