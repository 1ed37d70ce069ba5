"""The order in which tasks start: as given, but nothing large is left for the end."""

from collections import deque
from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """What has a size: a task."""

    @property
    def size(self) -> float: ...


Item = TypeVar("Item", bound=Sized)


class Queue(Generic[Item]):
    """Tasks that have not started.

    They start in the order given, in which a worker keeps its model. A task starts before its turn
    when the work that is left would keep all workers busy for no longer than it takes alone: begun
    later it would run while the others wait. Without sizes the order is the one given.

    Args:
        tasks: in their order.
    """

    def __init__(self, tasks: Iterable[Item]) -> None:
        self._tasks: list[Item | None] = list(tasks)
        self._next = 0
        sizes = [task.size if task is not None else 0.0 for task in self._tasks]
        self._left = sum(sizes)
        self._unstarted = len(sizes)
        # The largest stands last, and of equals the first.
        sized = [index for index, size in enumerate(sizes) if size > 0]
        self._by_size = sorted(sized, key=lambda index: (sizes[index], -index))
        self._soon: deque[Item] = deque()
        self._late: deque[Item] = deque()

    def __len__(self) -> int:
        return self._unstarted + len(self._soon) + len(self._late)

    def put_back(self, task: Item, *, soon: bool) -> None:
        """A task that must run again: next, or after all others."""
        (self._soon if soon else self._late).append(task)

    def pop(self, window: int) -> Item:
        """The task that starts now.

        Args:
            window: how many run at a time, those that wait at a worker included; twice the number
                of workers, so that a task starts twice as early as it must.
        """
        if self._soon:
            return self._soon.popleft()
        if not self._unstarted:
            return self._late.popleft()
        index = self._largest() if window > 1 else None
        if index is None or self._size(index) * window < self._left:
            index = self._in_turn()
        task = self._tasks[index]
        assert task is not None
        self._tasks[index] = None  # its payload may go when it has run
        self._unstarted -= 1
        self._left -= task.size
        return task

    def _largest(self) -> int | None:
        while self._by_size and self._tasks[self._by_size[-1]] is None:
            self._by_size.pop()
        return self._by_size[-1] if self._by_size else None

    def _in_turn(self) -> int:
        while self._tasks[self._next] is None:
            self._next += 1
        return self._next

    def _size(self, index: int) -> float:
        task = self._tasks[index]
        return 0.0 if task is None else task.size
