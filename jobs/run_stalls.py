"""Workers on which nothing moves: told by what they say of themselves, not by the clock alone."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from threading import Thread
from typing import Any, NamedTuple

from jobs.run_attempt import PULSE, shown_name

log = logging.getLogger(__name__)

_LOOK_SECONDS = 2.0
_BUSY = 0.1
"""Share of a core above which a worker that says nothing counts as at work."""
_SILENT_TIMES = 8
"""How many times as long a worker may compute without a word: a fit of a large table says nothing,
and neither does a GPU that hangs."""
_RESTART_SECONDS = 30


class Sign(NamedTuple):
    """What a worker has said last."""

    name: str
    beats: float
    cpu: float
    executing: tuple[Any, ...]
    """Keys of the tasks at work."""
    held: tuple[Any, ...]
    """Keys of all its tasks, those that wait for their turn included."""


@dataclass(slots=True)
class _Seen:
    """When a worker has moved last."""

    beats: float
    cpu: float
    keys: tuple[tuple[Any, ...], ...]
    moved: float
    """A beat or another task."""
    busy: float
    """Or at least computed."""


class Watch:
    """Looks at the workers now and then.

    Args:
        client: of Dask.
        stall_seconds: after how long without a move a worker hangs; 0: never.
        clock: seconds.
    """

    def __init__(
        self, client: Any, stall_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._client = client
        self._stall = stall_seconds
        self._clock = clock
        self._seen: dict[str, _Seen] = {}
        self._next = 0.0

    @property
    def is_due(self) -> bool:
        """Whether it is time for another look."""
        return self._clock() >= self._next

    def look(self) -> dict[str, Sign]:
        """Address -> what each worker has said last; empty where the scheduler does not tell."""
        self._next = self._clock() + _LOOK_SECONDS
        try:
            return signs(self._client)
        except Exception as error:  # a scheduler that goes away is told by the tasks
            log.debug("the scheduler does not say what its workers do: %r", error)
            return {}

    def hanging(self, found: Mapping[str, Sign]) -> list[str]:
        """Addresses of the workers that have a task and on which nothing has moved for too long."""
        now = self._clock()
        hang: list[str] = []
        for address, sign in found.items():
            seen = self._seen.get(address)
            keys = (sign.executing, sign.held)
            if seen is None or seen.keys != keys or seen.beats != sign.beats:
                self._seen[address] = _Seen(sign.beats, sign.cpu, keys, now, now)
                continue
            # Over a tenth of the limit, so that a short burst is not taken for work.
            if now - seen.busy >= self._stall / 10 and sign.cpu - seen.cpu >= _BUSY * (
                now - seen.busy
            ):
                seen.busy, seen.cpu = now, sign.cpu
            idle, silent = now - seen.busy, now - seen.moved
            is_over = idle > self._stall or silent > _SILENT_TIMES * self._stall
            if self._stall and sign.held and is_over:
                hang.append(address)
        for gone in self._seen.keys() - found.keys():
            del self._seen[gone]
        return hang

    def restart(self, addresses: Iterable[str]) -> None:
        """End workers that hang; their nannies start them anew, where they have one."""
        gone = list(addresses)
        for address in gone:
            self._seen.pop(address, None)

        def restart() -> None:
            try:
                self._client.restart_workers(gone, timeout=_RESTART_SECONDS, raise_for_error=False)
            except Exception as error:  # it is slow to come back, or the cluster is closed
                log.debug("%s could not be restarted: %r", ", ".join(gone), error)

        # It takes seconds, for which the other workers need not wait.
        Thread(target=restart, name="restart", daemon=True).start()


def signs(client: Any) -> dict[str, Sign]:
    """Address -> what each worker of a cluster has said with its last heartbeat."""
    pulse = PULSE

    # Within a function it travels whole: the scheduler need not have our packages.
    def told(dask_scheduler: Any) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = []
        for address, worker in dask_scheduler.workers.items():
            said = worker.metrics.get(pulse) or {}
            held = [ts.key for ts in worker.processing]
            # The last heartbeat may name tasks that have ended since.
            keys = [ts.key for ts in worker.executing if ts.key in held]
            name = str(worker.name)
            found.append((address, name, said.get("beats", 0), said.get("cpu", 0.0), keys, held))
        return found

    return {
        address: Sign(shown_name(name), beats, cpu, _tuples(keys), _tuples(held))
        for address, name, beats, cpu, keys, held in client.run_on_scheduler(told)
    }


def _tuples(keys: Iterable[Any]) -> tuple[Any, ...]:
    """Keys as they were given: on their way, tuples may become lists."""
    return tuple(tuple(key) if isinstance(key, list) else key for key in keys)
