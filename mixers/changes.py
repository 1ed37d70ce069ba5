"""Which probabilities hold at which position of a stream, seen alike by all processes that draw.

The table lies in shared memory, so that workers of a DataLoader see what is added while they run.
A change is accepted only from a position that no worker has reached: then it does not matter who is
ahead of whom, and the stream is the same with any number of workers.

Shapes: K domains, C changes.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from curate.errors import CurateError

Floats = npt.NDArray[np.float64]

_REMEMBERED = 1024
"""Changes that are kept: more than any worker can be behind."""
_WORKERS = 256
"""Workers of one DataLoader that may draw, at most."""


class Change(NamedTuple):
    """Probabilities that hold from a position on."""

    position: int
    probabilities: Floats
    """(K,) summing to 1."""


class Changes:
    """The changes of a stream.

    Args:
        changes: by position, ascending; at least one.
        reached: how far the stream has been drawn.
    """

    def __init__(self, changes: Sequence[Change], reached: int) -> None:
        num_domains = len(changes[0].probabilities)
        self._positions = torch.zeros(_REMEMBERED, dtype=torch.int64).share_memory_()
        self._rows = torch.zeros(_REMEMBERED, num_domains, dtype=torch.float64).share_memory_()
        self._count = torch.zeros(1, dtype=torch.int64).share_memory_()
        # A place each, the first for the process itself: nobody writes where another does.
        self._reached = torch.full((1 + _WORKERS,), reached).share_memory_()
        self._reached[1:] = -1
        self._latest: tuple[int, Change] | None = None
        """How many changes there were when the last of them was read, and it."""
        for change in changes:
            self._write(change)

    @property
    def furthest(self) -> int:
        """One past the last position that any process has drawn."""
        return int(self._reached.max())

    @property
    def by_workers(self) -> bool:
        """Whether workers of a DataLoader draw."""
        return bool((self._reached[1:] >= 0).any())

    @property
    def last(self) -> Change:
        return self._read(int(self._count[0]) - 1)

    def add(self, change: Change) -> None:
        """Let a change hold from its position on.

        Raises:
            CurateError: some process has drawn beyond it.
        """
        self._check(change)
        # Written before the furthest draw is read again, while a process that draws says so before
        # it reads: one of the two sees the other, and nothing is half followed without an error.
        self._write(change)
        self._check(change)

    def reach(self, position: int, worker: int | None) -> None:
        """Say that a worker, or the process itself, draws up to a position."""
        slot = 0 if worker is None else 1 + worker % _WORKERS
        self._reached[slot] = max(position, int(self._reached[slot]))

    def since(self, position: int) -> list[Change]:
        """The change that holds at a position, and all later ones."""
        count = int(self._count[0])
        if self._latest is not None and self._latest[0] == count:
            change = self._latest[1]
            if change.position <= position:
                return [change]
        found: list[Change] = []
        for number in range(count - 1, max(count - _REMEMBERED, 0) - 1, -1):
            change = self._read(number)
            found.insert(0, change)
            if change.position <= position:
                self._latest = (count, found[-1])
                return found
        raise CurateError(
            f"the mixture at position {position:,} is forgotten: "
            f"{_REMEMBERED:,} changes came since",
            fix="go on from a later state, or change the mixture less often",
        )

    def pieces(self, first: int, last: int) -> Iterator[tuple[int, int, Floats]]:
        """Stretches of one mixture: start, end and probabilities (K,)."""
        changes = self.since(first)
        ends = [change.position for change in changes[1:]] + [last]
        start = first
        for change, end in zip(changes, ends, strict=True):
            if start < min(end, last):
                yield start, min(end, last), change.probabilities
                start = min(end, last)

    def _check(self, change: Change) -> None:
        if self.furthest > change.position:
            raise CurateError(
                f"a change of the mixture from position {change.position:,} comes too late: "
                f"position {self.furthest:,} has been drawn",
                fix="let changes begin later, or lower prefetch_factor of the DataLoader",
            )

    def _write(self, change: Change) -> None:
        count = int(self._count[0])
        self._positions[count % _REMEMBERED] = change.position
        self._rows[count % _REMEMBERED] = torch.from_numpy(change.probabilities)
        self._count[0] = count + 1

    def _read(self, number: int) -> Change:
        slot = number % _REMEMBERED
        return Change(int(self._positions[slot]), self._rows[slot].numpy().copy())
