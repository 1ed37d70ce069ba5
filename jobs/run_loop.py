"""What happens to the tasks of one phase: started, finished, tried elsewhere, set aside."""

import logging
import time
import traceback
import uuid
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from curate.errors import CurateError, OutputError, TryAgainError
from jobs.cluster import Pool, is_cluster_lost, is_worker_lost
from jobs.live import Tracker
from jobs.run_attempt import Attempt, Failed, Kind, attempt, shown_name
from jobs.run_failures import SetAside, forget_failure, keep_failure
from jobs.run_order import Queue
from jobs.run_stalls import Watch

if TYPE_CHECKING:
    from jobs.run import Outcome, Task

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""Of a task whose workers die or hang, or whose disk or memory fails."""
_TRIES: dict[Kind, int] = {"data": 1, "unknown": 2, "io": 3, "memory": 3, "full": 3, "stop": 1}
"""How often a task is tried in all, each time on another worker: bad data is bad everywhere."""
_WAKE_SECONDS = 1.0
_ENDING_SECONDS = 30.0
"""So long after we have ended a worker its death is our doing."""


@dataclass(slots=True)
class _History:
    """What has happened to a task that did not succeed at once."""

    attempts: int = 0
    """Those that count against it."""
    is_suspect: bool = False
    """Its worker died twice while it may have been at work: the next time nothing else runs."""
    avoid: set[str] = field(default_factory=set[str])
    """Addresses of workers on which it failed."""


@dataclass(frozen=True, slots=True)
class _Started:
    task: "Task"
    key: Any


class Loop:
    """Runs the tasks of one phase.

    Args:
        phase: name for messages.
        due: tasks in the order given.
        work: what a task does on its worker.
        pool: where it runs.
        outcome: is filled.
        tracker: is told what runs.
        noted: names of tasks that have a file of an earlier failure.
        finished: called with the name of a task that has succeeded.
        keep_receipts: whether the outcome gets them.
    """

    def __init__(
        self,
        phase: str,
        due: "Iterable[Task]",
        work: Callable[[dict[str, Any]], dict[str, Any]],
        *,
        pool: Pool,
        outcome: "Outcome",
        tracker: Tracker,
        noted: Collection[str],
        finished: Callable[[str], None],
        keep_receipts: bool = False,
    ) -> None:
        self._phase = phase
        self._work = work
        self._pool = pool
        self._outcome = outcome
        self._tracker = tracker
        self._place = place = outcome.place
        self._finished = finished
        self._queue = Queue(due)
        self._alone: list[Task] = []
        self._running: dict[Future[Attempt], _Started] = {}
        self._ready = SimpleQueue[Future[Attempt]]()
        self._histories: dict[str, _History] = {}
        self._lost: dict[Any, tuple[str, Task]] = {}
        self._told: set[Any] = set()
        self._ended: dict[str, float] = {}
        self._run_id = uuid.uuid4().hex[:12]
        self._number = 0
        self._watch: Watch | None = None
        if pool.client is not None:
            self._watch = Watch(pool.client, place.stall_seconds if place else 0.0)
        self._noted = noted
        self._keep_receipts = keep_receipts

    def run(self) -> None:
        """Until all tasks have succeeded or were set aside.

        Raises:
            OutputError: the run folder cannot be written.
            TryAgainError: the cluster went away.
        """
        try:
            while self._queue or self._alone or self._running:
                self._fill()
                for future in self._wait():
                    started = self._running.pop(future, None)
                    if started is not None:  # else it was given up
                        self._told.discard(started.key)
                        self._handle(started, future)
                if self._watch is not None and self._watch.is_due and self._running:
                    self._look(self._watch)
        finally:
            for future in self._running:
                future.cancel()

    def _fill(self) -> None:
        # It follows the workers, and says where there have been none for too long.
        window = max(1, self._pool.window)
        while self._queue and len(self._running) < window:
            self._start(self._queue.pop(window))
        if not self._running and self._alone:
            self._start(self._alone.pop())

    def _wait(self) -> list[Future[Attempt]]:
        """What has ended; a signal may reach another thread, and this one sees it when it wakes."""
        found: list[Future[Attempt]] = []
        try:
            found.append(self._ready.get(timeout=_WAKE_SECONDS))
            while True:
                found.append(self._ready.get_nowait())
        except Empty:
            return found

    def _start(self, task: "Task") -> None:
        log.debug("start %s", task.name)
        self._number += 1
        # In two parts: Dask keeps statistics for each first part, for ever.
        key = (self._phase, f"{self._run_id}-{self._number}")
        more: dict[str, Any] = {}
        if self._watch is None:
            self._tracker.started(task.name, "inline")
        else:
            more = {"key": key, **self._elsewhere(task)}
        root = self._place.root if self._place else task.output.path.parent
        future = self._pool.executor.submit(
            attempt, task.payload, self._work, str(task.output.path), task.fingerprint, str(root),
            **more,
        )  # fmt: skip
        self._running[future] = _Started(task, key)
        future.add_done_callback(self._ready.put)

    def _elsewhere(self, task: "Task") -> dict[str, Any]:
        """Where Dask is to run a task that has failed on some workers: on others, if there are."""
        history = self._histories.get(task.name)
        if history is None or not history.avoid:
            return {}
        addresses = self._pool.client.scheduler_info(n_workers=-1).get("workers", ())
        others = [address for address in addresses if address not in history.avoid]
        return {"workers": others, "allow_other_workers": True} if others else {}

    def _handle(self, started: _Started, future: Future[Attempt]) -> None:
        task = started.task
        try:
            error, result = future.exception(), None
        except CancelledError as cancelled:  # a scheduler that dies cancels what it held
            error, result = cancelled, None
        if error is None:
            result = future.result()
        if result is not None and result.failed is None:
            self._succeeded(task, result)
        elif result is not None and result.failed is not None:
            self._failed(task, result.failed, result)
        elif error is not None and is_worker_lost(error):
            self._worker_lost(started, error)
        elif error is not None and is_cluster_lost(error):
            reason = str(error) or type(error).__name__
            raise TryAgainError(
                f"{self._phase}: the Dask cluster went away ({reason})",
                fix="run the same command again; finished partitions are kept",
            ) from error
        elif error is not None:  # of the way there or back, or of an executor of one's own
            trace = "".join(traceback.format_exception(error))
            if isinstance(error, OutputError):
                raise error
            self._set_aside(task, error, trace, "", 1)

    def _succeeded(self, task: "Task", result: Attempt) -> None:
        self._histories.pop(task.name, None)
        self._outcome.done.append(task.name)
        if self._keep_receipts:
            self._outcome.receipts[task.name] = result.receipt
        self._tracker.finished(task.name, result.worker, result.seconds, result.receipt)
        if self._place is not None and task.name in self._noted:
            forget_failure(self._place.root, self._phase, task.name)
        self._finished(task.name)

    def _failed(self, task: "Task", failed: Failed, result: Attempt) -> None:
        """A task ended with an error of its own."""
        if failed.kind == "stop":
            if isinstance(failed.error, OutputError):
                raise failed.error
            raise OutputError(
                f"{self._phase}: {task.name} could not be written: {failed.error}",
                fix="free some space, then run the same command again; what is finished is kept",
            ) from failed.error
        history = self._histories.setdefault(task.name, _History())
        history.attempts += 1
        history.avoid.add(result.address)
        if self._watch is not None and history.attempts < _TRIES[failed.kind]:
            log.warning("%s: %s failed on %s, trying it elsewhere: %s", self._phase, task.name,
                        result.worker, _first_line(failed.error))  # fmt: skip
            self._again(task, soon=False)
            return
        self._set_aside(task, failed.error, failed.trace, result.worker, history.attempts)

    def _worker_lost(self, started: _Started, error: BaseException) -> None:
        """The worker died; whether of this task, or of one beside it, is often known."""
        task = started.task
        last: Any = getattr(error, "last_worker", None)
        address = str(getattr(last, "address", ""))
        if task.is_done():  # it died before it could say so
            self._succeeded(
                task, Attempt(shown_name(getattr(last, "name", "unknown")), address, 0.0, {})
            )
            return
        if time.monotonic() - self._ended.get(address, -_ENDING_SECONDS) < _ENDING_SECONDS:
            log.debug("%s: %s had come to a worker that was just ended", self._phase, task.name)
            self._histories.setdefault(task.name, _History())
            self._again(task, soon=True)
            return
        self._lost = {key: lost for key, lost in self._lost.items() if lost[0] == address}
        self._lost[started.key] = address, task
        ours = {each.key: each.task for each in self._running.values()}
        ours |= {key: lost for key, (_, lost) in self._lost.items()}
        # As of its last heartbeat: what it has finished since, it did not die of.
        executing = set(getattr(last, "executing", ()) or ())
        at_work = {key for key in executing & ours.keys() if not ours[key].is_done()}
        history = self._histories.setdefault(task.name, _History())
        if at_work and started.key not in at_work:
            log.debug("%s: %s waited at a worker that died", self._phase, task.name)
            self._again(task, soon=True)
            return
        history.attempts += 1
        if history.attempts >= ATTEMPTS:
            self._set_aside(task, error, "", address, history.attempts)
            return
        log.warning("%s: %s lost its worker, trying again", self._phase, task.name)
        # Nobody knows which of a worker's tasks it died of: the next time it is clear.
        history.is_suspect = history.attempts == ATTEMPTS - 1 and not at_work
        self._again(task, soon=False)

    def _again(self, task: "Task", *, soon: bool) -> None:
        self._tracker.dropped(task.name)
        if self._histories[task.name].is_suspect:
            self._alone.append(task)
        else:
            self._queue.put_back(task, soon=soon)

    def _look(self, watch: Watch) -> None:
        """Tell the tracker what runs where, and end workers on which nothing moves."""
        found = watch.look()
        started = {each.key: (future, each.task) for future, each in self._running.items()}
        for sign in found.values():
            for key in sign.executing:
                if key in started and key not in self._told:
                    self._told.add(key)
                    self._tracker.started(started[key][1].name, sign.name)
        hanging = watch.hanging(found)
        if not hanging:
            return
        for address in hanging:
            sign = found[address]
            for key in sign.held:
                if key in started:
                    future, task = started[key]
                    del self._running[future]
                    future.cancel()
                    self._told.discard(key)
                    self._hung(task, sign.name, address, key in (sign.executing or sign.held))
        self._ended |= dict.fromkeys(hanging, time.monotonic())
        watch.restart(hanging)

    def _hung(self, task: "Task", worker: str, address: str, was_at_work: bool) -> None:
        history = self._histories.setdefault(task.name, _History())
        if not was_at_work:
            self._again(task, soon=True)
            return
        minutes = (self._place.stall_seconds if self._place else 0.0) / 60
        what = f"nothing moved on {worker} for {minutes:g} minutes"
        history.attempts += 1
        history.avoid.add(address)
        if history.attempts >= ATTEMPTS:
            fix = "look at the input it names; raise cluster.stall_minutes if it is only slow"
            self._set_aside(task, CurateError(what, fix=fix), "", worker, history.attempts)
            return
        log.warning("%s: %s: %s; it is restarted, and the task tried elsewhere", self._phase,
                    task.name, what)  # fmt: skip
        self._again(task, soon=False)

    def _set_aside(
        self, task: "Task", error: BaseException, trace: str, worker: str, attempts: int
    ) -> None:
        # What is wrong is said once, by `raise_failures`.
        others = "; the others go on" if self._queue or self._alone or self._running else ""
        log.warning("%s: %s failed%s", self._phase, task.name, others)
        log.debug("%s: %s failed: %s\n%s", self._phase, task.name, error, trace)
        self._histories.pop(task.name, None)
        self._outcome.failures[task.name] = error
        if trace and not isinstance(error, CurateError) and error.__traceback__ is None:
            error.add_note(trace)
        self._tracker.failed(task.name, worker or "inline", error)
        if self._place is not None:
            gone = SetAside(self._phase, task.name, task.payload, task.output.path, error, trace,
                            worker, attempts)  # fmt: skip
            keep_failure(self._place.root, gone)


def _first_line(error: BaseException) -> str:
    what = error.what if isinstance(error, CurateError) else f"{type(error).__name__}: {error}"
    return what.partition("\n")[0]
