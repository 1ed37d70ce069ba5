"""Which examples make up each batch of each epoch: a pure function of seed, epoch and lengths.

Partitions are shuffled and taken `WINDOW` at a time; the examples of a window are shuffled, cut
into blocks, sorted by length inside a block so that a batch holds little padding, and the batches
of the window are shuffled. Memory is bounded by a window, and the place in an epoch is one number:
how many of its batches are done.

Shapes: N examples of a window, B examples of a batch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

WINDOW = 16
"""Partitions whose examples are shuffled together."""

_BATCHES_PER_BLOCK = 32

Lengths = npt.NDArray[np.int32]
"""Tokens of each example of a partition, in table order; 0 where it is not trained on."""


class Window(NamedTuple):
    """Some partitions that are held in memory together, and the batches made of them."""

    parts: tuple[int, ...]
    """Which of the partitions, ascending."""
    batches: list[npt.NDArray[np.int64]]
    """Each (B,): positions in the examples of `parts`, one after the other."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """When training stops, saves and notes its progress; steps are counted from 1."""

    epoch_steps: tuple[int, ...]
    """Steps taken in each epoch."""
    epoch_batches: tuple[int, ...]
    """Batches that each epoch has; more than its steps where training stops inside it."""
    save_steps: frozenset[int]
    """After these steps a checkpoint is saved; the last step is one of them."""

    @property
    def total_steps(self) -> int:
        return sum(self.epoch_steps)

    def place(self, step: int) -> tuple[int, int]:
        """Epoch and number of its batches that are behind once `step` steps are done."""
        for epoch, steps in enumerate(self.epoch_steps):
            if step < steps:
                return epoch, step
            step -= steps
        return len(self.epoch_steps), 0

    def progress(self, step: int) -> float:
        """Epochs that are behind once `step` steps are done: 1.5 is half of the second."""
        epoch, batch = self.place(step)
        if epoch == len(self.epoch_steps):  # training may stop inside its last epoch
            return epoch - 1 + self.epoch_steps[-1] / self.epoch_batches[-1]
        return epoch + batch / self.epoch_batches[epoch]


def random_seed(*key: object) -> int:
    """A 64-bit seed from the words of `key`: seed, stage, what it is for."""
    return xxhash.xxh3_64_intdigest("/".join(map(str, key)).encode())


def epoch_windows(
    lengths: Sequence[Lengths], *, seed: int, epoch: int, batch_tokens: int
) -> Iterator[Window]:
    """The batches of one epoch, window by window; every example with a length stands in one.

    Args:
        lengths: of each partition.
        seed: of the training run.
        epoch: from 0.
        batch_tokens: longest example times number of examples stays within it; an example that is
            longer by itself makes a batch of its own.
    """
    order = random_permutation(len(lengths), random_seed(seed, "train", epoch, "partitions"))
    for first in range(0, len(order), WINDOW):
        parts = tuple(sorted(int(part) for part in order[first : first + WINDOW]))
        joined = np.concatenate([lengths[part] for part in parts])
        window_seed = random_seed(seed, "train", epoch, "window", first)
        yield Window(parts, _batches(joined, window_seed, batch_tokens))


def plan_epochs(
    lengths: Sequence[Lengths],
    *,
    seed: int,
    batch_tokens: int,
    epochs: float,
    save_every_epochs: float,
    max_steps: int | None = None,
) -> Schedule:
    """Count the steps of a whole training run.

    The number of batches varies a little from epoch to epoch, since it depends on which lengths
    meet; so each epoch is planned, without reading any data.
    """
    counts = list[int]()
    taken = list[int]()
    left = math.inf if max_steps is None else max_steps
    for epoch in range(math.ceil(epochs)):
        windows = epoch_windows(lengths, seed=seed, epoch=epoch, batch_tokens=batch_tokens)
        count = sum(len(window.batches) for window in windows)
        if count == 0 or left <= 0:
            break
        share = min(1.0, epochs - epoch)
        steps = int(min(max(1, round(share * count)), left))
        counts.append(count)
        taken.append(steps)
        left -= steps
    schedule = Schedule(tuple(taken), tuple(counts), frozenset())
    saves = _save_steps(schedule, save_every_epochs)
    return Schedule(schedule.epoch_steps, schedule.epoch_batches, saves)


def _save_steps(schedule: Schedule, every: float) -> frozenset[int]:
    total = schedule.total_steps
    found = {total} if total else set[int]()
    for number in range(1, math.ceil(len(schedule.epoch_batches) / every) + 1):
        # 3 * 0.1 is a little more than 0.3: without rounding a save could slip by a step.
        whole, share = divmod(round(number * every, 9), 1)
        if whole < len(schedule.epoch_batches):
            before = sum(schedule.epoch_steps[: int(whole)])
            step = before + round(share * schedule.epoch_batches[int(whole)])
            found |= {step} if 0 < step < total else set()
    return frozenset(found)


def _batches(lengths: Lengths, seed: int, batch_tokens: int) -> list[npt.NDArray[np.int64]]:
    members = np.flatnonzero(lengths > 0)
    if len(members) == 0:
        return []
    members = members[random_permutation(len(members), seed)]
    mean = float(lengths[members].mean())
    block_size = max(1, int(_BATCHES_PER_BLOCK * batch_tokens / mean))
    batches = list[npt.NDArray[np.int64]]()
    for first in range(0, len(members), block_size):
        block = members[first : first + block_size]
        block = block[np.argsort(-lengths[block], kind="stable")]
        # Longest first: the first example alone decides how many fit.
        start = 0
        while start < len(block):
            count = max(1, batch_tokens // int(lengths[block[start]]))
            batches.append(block[start : start + count])
            start += count
    order = random_permutation(len(batches), random_seed(seed, "batches"))
    return [batches[i] for i in order]


def random_permutation(size: int, seed: int) -> npt.NDArray[np.int64]:
    """A random order of `size` things; numpy promises raw draws, not shuffles, to stay as they
    are from version to version."""
    return np.argsort(np.random.PCG64(seed).random_raw(size), kind="stable")
