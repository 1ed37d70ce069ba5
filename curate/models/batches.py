"""Batches by token budget inside a partition, halved where memory does not suffice.

Shapes: N examples of a partition, B examples of a batch.
"""

import gc
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch

from curate.data.pulse import beat
from curate.errors import CurateError

log = logging.getLogger(__name__)

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Passed:
    """How a pass over a partition went."""

    num_batches: int
    halved: int
    """How often the budget was halved; above 0 the last digits may differ from another run's."""
    batch_tokens: int
    """The budget at the end."""


def by_length(lengths: np.ndarray) -> np.ndarray:
    """(N,) the examples' order: longest first, so that a lack of memory shows at once; ties by
    position."""
    return np.argsort(-lengths, kind="stable")


def next_batch(lengths: np.ndarray, start: int, budget: int) -> int:
    """Where the batch that begins at `start` ends.

    Args:
        lengths: (N,) descending; the first of a batch is how wide the batch is.
        start: first example of the batch.
        budget: tokens, padding included; one example that is longer goes alone.
    """
    return min(len(lengths), start + max(1, budget // int(lengths[start])))


class Ahead(Generic[Made]):
    """Makes the next batch in a thread while the device works on the current one.

    Args:
        make: the batch of some members.
        is_threaded: off where the CPU does the work itself.
    """

    def __init__(self, make: Callable[[np.ndarray], Made], *, is_threaded: bool) -> None:
        self._make = make
        self._pool = ThreadPoolExecutor(1) if is_threaded else None
        self._begun: list[tuple[np.ndarray, Future[Made]]] = []

    def begin(self, members: np.ndarray) -> None:
        """These are likely to be asked for next."""
        if self._pool is not None:
            self._begun.append((members, self._pool.submit(self._make, members)))

    def take(self, members: np.ndarray) -> Made:
        """The batch of these members, whatever was begun."""
        for index, (begun, future) in enumerate(self._begun):
            if np.array_equal(begun, members):
                del self._begun[: index + 1]  # older ones were begun for a larger budget
                return future.result()
        return self._make(members)

    def close(self) -> None:
        """Wait for what was begun and is not wanted any more."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def for_each_batch(
    lengths: np.ndarray,
    work: Callable[[np.ndarray], None],
    *,
    batch_tokens: int,
    begin: Callable[[np.ndarray], None] | None = None,
) -> Passed:
    """Call `work` with the members of every batch; on lack of memory halve the budget and go on.

    Args:
        lengths: (N,) tokens of each example, at least 1.
        work: called with (B,) positions; called again for the same ones after a lack of memory.
        batch_tokens: budget of a batch, padding included.
        begin: told the next members while `work` has the current batch; see `Ahead`.

    Raises:
        CurateError: not even a single example fits.
    """
    order = by_length(lengths)
    ordered = lengths[order]
    start = num_batches = halved = 0
    budget = batch_tokens
    while start < len(order):
        stop = next_batch(ordered, start, budget)
        if begin is not None and stop < len(order):
            begin(order[stop : next_batch(ordered, stop, budget)])
        if _fits(work, order[start:stop]):
            start = stop
            num_batches += 1
            beat()
            continue
        if stop - start == 1:
            raise CurateError(
                f"memory does not suffice for one example of {ordered[start]} tokens",
                fix="lower task.max_tokens, or use a smaller model or a larger machine",
            )
        # Below twice the longest example halving the budget would change nothing.
        budget = min(budget, int(ordered[start]) * (stop - start)) // 2
        halved += 1
        log.warning("out of memory: batches have at most %d tokens from here on", budget)
        _release()
    return Passed(num_batches, halved, budget)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or in the host's allocator."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = ("can't allocate memory", "not enough memory")  # Linux and macOS, Windows
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def _fits(work: Callable[[np.ndarray], None], members: np.ndarray) -> bool:
    # The error, and with it the frames that hold the batch's tensors, is gone when this returns.
    try:
        work(members)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            return False
        raise
    return True


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
