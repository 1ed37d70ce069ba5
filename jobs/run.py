"""The loop every stage uses: skip what is done, keep a few tasks in flight, outlive failures."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curate.data.partitions import Output
from curate.errors import CurateError, InputError, OutputError, TryAgainError, counted
from jobs.cluster import Pool, is_cluster_lost, is_worker_lost
from jobs.watching import watching

log = logging.getLogger(__name__)

_ATTEMPTS = 3
_WAKE_SECONDS = 1.0
_SHOWN_FAILURES = 20

Receipt = dict[str, Any]
"""What a task returns: a few small JSON values (`rows`, counts), under a kilobyte."""


@dataclass(frozen=True, slots=True)
class Task:
    """One output file to make."""

    name: str
    """Named in messages: a partition, a shard, a seed."""
    payload: dict[str, Any]
    """All that the worker gets: settings, paths and names, never tensors or tables."""
    output: Output
    """The file; its mark says whether the task is done."""
    fingerprint: str
    """Of everything the output depends on."""

    def is_done(self) -> bool:
        return self.output.is_done(self.fingerprint)


@dataclass(slots=True)
class Outcome:
    """What came of the tasks of one stage."""

    done: list[str] = field(default_factory=list[str])
    """Names of the tasks that ran now."""
    skipped: list[str] = field(default_factory=list[str])
    """Names of the tasks whose output was there already."""
    receipts: dict[str, Receipt] = field(default_factory=dict[str, Receipt])
    """Task name -> receipt, of those that ran now."""
    failures: dict[str, BaseException] = field(default_factory=dict[str, BaseException])
    """Task name -> error."""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Progress:
    """Sent to the caller after each task, and once a second while a task says how far it is."""

    stage: str
    done: int
    total: int
    name: str
    detail: str = ""
    """What the task called `name` says while it runs; empty when it has finished."""
    part: float = 0.0
    """Tasks' worth of work that is done by those that run."""


@dataclass(frozen=True, slots=True)
class StageState:
    """What `--dry-run` says of a stage; found without writing anything."""

    stage: str
    total: int
    """Number of outputs the stage will have, as far as it is known now."""
    done: int
    """How many of them are there already, made from the same inputs and settings."""
    why: tuple[str, ...] = ()
    """One sentence for each kind of reason that something is due."""


Listener = Callable[[Progress], None]


def ignore(_: Progress) -> None:
    """A listener for callers that show no progress."""


def run_tasks(
    stage: str,
    tasks: Iterable[Task],
    work: Callable[[dict[str, Any]], Receipt],
    *,
    pool: Pool,
    listener: Listener = ignore,
) -> Outcome:
    """Run the tasks that are not done; a failed one does not stop the others.

    Args:
        stage: name for messages and progress.
        tasks: in the order in which they start.
        work: a module-level function; it writes `task.output` and returns a receipt.
        pool: where it runs.
        listener: told after each task, and while a task runs that says how far it is.

    Returns:
        The outcome, failures included: see `raise_failures`.

    Raises:
        OutputError: a task could not write, as on a full disk; the rest would fail the same way.
        TryAgainError: the cluster went away.
    """
    started = time.monotonic()
    outcome = Outcome()
    due: list[Task] = []
    for task in tasks:
        (outcome.skipped.append(task.name) if task.is_done() else due.append(task))
    total = len(due) + len(outcome.skipped)
    if due and outcome.skipped:
        log.info("%s: %d of %d done already", stage, len(outcome.skipped), total)
    queue = list(reversed(due))
    attempts: dict[str, int] = {}
    alone: list[Task] = []  # were running when a worker died: each is tried again by itself
    running: dict[Future[Receipt], Task] = {}
    watch = ExitStack()
    watch.enter_context(watching_tasks(stage, due, outcome, total, listener))
    try:
        while queue or alone or running:
            while queue and len(running) < pool.window:
                _start(queue.pop(), work, pool, running)
            if not running and alone:
                _start(alone.pop(), work, pool, running)
            # A signal may reach another thread; this one sees it when it wakes.
            ready = wait(running, timeout=_WAKE_SECONDS, return_when=FIRST_COMPLETED).done
            for future in [future for future in running if future in ready]:
                task = running.pop(future)
                error = _error_of(future)
                if error is None:
                    outcome.done.append(task.name)
                    outcome.receipts[task.name] = future.result()
                    finished = len(outcome.done) + len(outcome.skipped)
                    listener(Progress(stage, finished, total, task.name))
                    continue
                attempts[task.name] = attempts.get(task.name, 0) + 1
                if is_worker_lost(error) and attempts[task.name] < _ATTEMPTS:
                    log.warning("%s: %s lost its worker, trying again", stage, task.name)
                    alone.append(task)
                    continue
                if isinstance(error, OutputError):
                    raise error
                if is_cluster_lost(error):
                    reason = str(error) or type(error).__name__
                    raise TryAgainError(
                        f"{stage}: the Dask cluster went away ({reason})",
                        fix="run the same command again; finished partitions are kept",
                    ) from error
                # What is wrong is said once, by `raise_failures`.
                others = "; the others go on" if queue or alone or running else ""
                log.warning("%s: %s failed%s", stage, task.name, others)
                log.debug("%s: %s failed: %s", stage, task.name, error)
                outcome.failures[task.name] = error
    finally:
        watch.close()
        for future in running:
            future.cancel()
    outcome.seconds = time.monotonic() - started
    return outcome


def watching_tasks(
    stage: str, due: Sequence[Task], outcome: Outcome, total: int, listener: Listener
) -> AbstractContextManager[None]:
    """Inside, the listener hears how far the tasks are that say so."""

    def tell(name: str, detail: str, part: float) -> None:
        finished = len(outcome.done) + len(outcome.skipped)
        listener(Progress(stage, finished, total, name, detail, part))

    return watching([(task.name, task.payload) for task in due], tell)


def raise_failures(stage: str, outcome: Outcome) -> None:
    """Raise what went wrong, once all other tasks have finished; the log has all but the first.

    Raises:
        CurateError: of the first failure's kind; counts the failures and names the first.
        BaseException: a bug's own error, with its traceback.
    """
    raise_all({stage: outcome})


def raise_all(outcomes: Mapping[str, Outcome]) -> None:
    """Raise what went wrong in groups of tasks that do not wait for each other.

    Args:
        outcomes: name for messages -> outcome. The first with failures is raised as by
            `raise_failures`; the log has the failures of the others.

    Raises:
        CurateError: of the first failure's kind; its `others` are the other failures.
        BaseException: a bug's own error, with its traceback.
    """
    failed = [(stage, outcome) for stage, outcome in outcomes.items() if outcome.failures]
    if not failed:
        return
    stage, outcome = failed[0]
    failures = sorted(outcome.failures.items())
    name, error = failures[0]
    bugs = [e for _, e in failures if not isinstance(e, CurateError)]
    bug = bugs[0] if bugs and not is_worker_lost(bugs[0]) else None
    others = _sentences(stage, [(n, e) for n, e in failures if e is not (bug or error)])
    for other, its in failed[1:]:
        others += _sentences(other, sorted(its.failures.items()))
    for sentence in others:
        log.error("%s", sentence)
    if bug is not None:
        raise bug
    total = len(outcome.failures) + len(outcome.done) + len(outcome.skipped)
    what = f"{stage}: {len(outcome.failures)} of {counted(total, 'task')} failed; {name}: "
    if isinstance(error, CurateError):
        summary = type(error)(what + error.what, fix=error.fix)
    else:
        summary = CurateError(
            f"{what}the worker died {_ATTEMPTS} times, most likely for lack of memory",
            fix="lower score.batch_tokens or index.partition_rows, or give the workers more memory",
        )
    summary.tasks = [task for _, its in failed for task in sorted(its.failures)]
    summary.others = others
    raise summary from error


def _sentences(stage: str, failures: Sequence[tuple[str, BaseException]]) -> list[str]:
    """What is said of each, of the first twenty."""
    found: list[str] = []
    for name, reason in failures[:_SHOWN_FAILURES]:
        what = reason.what if isinstance(reason, CurateError) else repr(reason)
        found.append(f"{stage}: {name} failed: {what}")
    if len(failures) > _SHOWN_FAILURES:
        found.append(f"{stage}: {len(failures) - _SHOWN_FAILURES} more failed")
    return found


def _start(
    task: Task,
    work: Callable[[dict[str, Any]], Receipt],
    pool: Pool,
    running: dict[Future[Receipt], Task],
) -> None:
    log.debug("start %s", task.name)
    future = pool.executor.submit(
        _attempt, task.payload, work, str(task.output.path), task.fingerprint
    )
    running[future] = task


def _attempt(
    payload: dict[str, Any],
    work: Callable[[dict[str, Any]], Receipt],
    path: str,
    fingerprint: str,
) -> Receipt:
    """On the worker: a task whose last worker died after the work and before the word is done."""
    return {} if Output(Path(path)).is_done(fingerprint) else work(payload)


def _error_of(future: Future[Receipt]) -> BaseException | None:
    """What a finished task ended with; a scheduler that dies cancels the tasks that it held."""
    try:
        return future.exception()
    except CancelledError as error:
        return error


def require(tables: Sequence[object], *, stage: str, command: str) -> None:
    """Refuse to go on where an earlier stage has left nothing.

    Raises:
        InputError: names the command to run first.
    """
    if not tables:
        raise InputError(f"{stage} has not run yet", fix=f"run `{command}` first")
