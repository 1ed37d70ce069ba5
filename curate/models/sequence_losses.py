"""Losses of a model at every counted token of some sequences, kept in files beside them.

Half precision is enough: a loss of 4 nats is kept to 0.002. There is one file of losses for each
file of sequences, and beside it one that says where those of each sequence begin.

Shapes: S sequences of a file, B that are asked for, n counted tokens.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from curate.data.files import replace
from curate.data.partitions import Output
from curate.errors import InputError
from curate.models.sequences import Sequences
from curate.models.tasks.protocol import Task

Integers = npt.NDArray[np.int64]


_OPEN = 128
"""Files that are mapped at a time."""


class SequenceLosses:
    """Cached losses of several files, mapped into memory.

    Args:
        paths: in the order of the files of sequences.

    Raises:
        InputError: a file is missing or damaged.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        tables = [_read(_places_of(path)) for path in paths]
        self._paths = tuple(paths)
        # Each map takes a file handle, and there may be thousands of files.
        self._losses = lru_cache(maxsize=_OPEN)(self._open)
        for file in range(len(paths)):  # what is damaged is found before anything is trained
            self._losses(file)
        self._numbers = np.concatenate([np.zeros(0, np.int64), *(table[0] for table in tables)])
        self._starts = np.concatenate([np.zeros(0, np.int64), *(table[1] for table in tables)])
        self._sizes = np.concatenate([np.zeros(0, np.int64), *(table[2] for table in tables)])
        counts = [table.shape[1] for table in tables]
        self._files = np.repeat(np.arange(len(paths)), counts)

    def __call__(self, numbers: Integers) -> npt.NDArray[np.float32]:
        """(n,) the losses of sequences (B,), one after the other, nats.

        Raises:
            InputError: the losses of one of them were not computed.
        """
        places = np.searchsorted(self._numbers, numbers)
        inside = places < len(self._numbers)
        if not inside.all() or (self._numbers[places] != numbers).any():
            raise InputError(
                "the reference has not seen a sequence that the proxy draws",
                fix="remove the run's proxies folder and run `curate mix` again",
            )
        pieces = [  # copies: a view would keep its file open
            np.array(self._losses(file)[start : start + size], dtype=np.float32)
            for file, start, size in zip(
                self._files[places], self._starts[places], self._sizes[places], strict=True
            )
        ]
        return np.concatenate([np.zeros(0, np.float32), *pieces])

    def _open(self, file: int) -> npt.NDArray[np.float16]:
        return _read(self._paths[file], is_mapped=True)


class Computed(NamedTuple):
    """Losses of some sequences."""

    places: npt.NDArray[np.int64]
    """(3, S) number, start among the losses, number of losses of each sequence."""
    losses: npt.NDArray[np.float16]
    """(n,) nats."""


@torch.no_grad()
def compute_losses(
    model: nn.Module, task: Task, sequences: Sequences, numbers: Integers, *, batch_tokens: int
) -> Computed:
    """Losses at every counted token of some sequences.

    Args:
        model: in evaluation mode.
        task: of the model.
        sequences: the store.
        numbers: (S,) ascending.
        batch_tokens: tokens that go through the model together.
    """
    device = next(model.parameters()).device
    sizes: list[npt.NDArray[np.int64]] = []
    losses: list[npt.NDArray[np.float16]] = []
    first = 0
    lengths = sequences.lengths(numbers)
    while first < len(numbers):
        # What a batch costs with padding, had it so many sequences more.
        costs = np.maximum.accumulate(lengths[first : first + batch_tokens])
        costs *= np.arange(1, len(costs) + 1)
        chosen = numbers[first : first + max(1, int((costs <= batch_tokens).sum()))]
        encoded = sequences.read(chosen)
        batch = task.collate(encoded, np.arange(len(chosen)))
        flat = task.logits_and_targets(model, {k: v.to(device) for k, v in batch.items()})
        found = functional.cross_entropy(flat.logits.float(), flat.targets, reduction="none")
        losses.append(found.cpu().numpy().astype(np.float16))
        sizes.append(np.bincount(flat.owner.cpu().numpy(), minlength=len(chosen)))
        first += len(chosen)
    joined = np.concatenate([np.zeros(0, np.float16), *losses])
    counts = np.concatenate([np.zeros(0, np.int64), *sizes])
    return Computed(np.stack([numbers, np.cumsum(counts) - counts, counts]), joined)


def write_losses(output: Output, computed: Computed, fingerprint: str) -> None:
    """Write the losses, and first, beside them, where those of each sequence begin."""
    replace(_places_of(output.path), lambda target: _save(target, computed.places))
    output.write(
        lambda target: _save(target, computed.losses), fingerprint, rows=computed.places.shape[1]
    )


def _read(path: Path, *, is_mapped: bool = False) -> npt.NDArray[Any]:
    try:
        return np.load(path, mmap_mode="r" if is_mapped else None, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the losses of the reference are missing or damaged: {error}",
            fix="remove what is left of them and run `curate mix` on the run again",
        ) from error


def _places_of(path: Path) -> Path:
    return path.with_suffix(".places.npy")


def _save(path: Path, values: npt.NDArray[np.generic]) -> None:
    with path.open("wb") as file:
        np.save(file, values)
