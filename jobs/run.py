"""The loop every stage uses: skip what is done, keep a few tasks in flight, outlive failures."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from curate.data.partitions import Output
from curate.errors import CurateError, InputError, TooManyBadError, TryAgainError, counted
from jobs.cluster import Pool, is_worker_lost
from jobs.live import Tracker, live
from jobs.run_failures import failures_folder, forget_failures, kept_names
from jobs.run_loop import ATTEMPTS, Loop
from jobs.run_place import Place, current_place
from jobs.store import on_copies
from jobs.watching import watching

log = logging.getLogger(__name__)

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
    cost: float | None = None
    """How long it takes beside the others of its phase; where it is not given, the rows of the
    partition in the payload count."""

    @property
    def size(self) -> float:
        """What is known of how long it takes, in the phase's own unit; 0: nothing."""
        if self.cost is not None:
            return self.cost
        part: Any = self.payload.get("partition")
        return float(part.get("num_rows", 0)) if isinstance(part, dict) else 0.0

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
    """Task name -> receipt, of those that ran now, where they were asked for."""
    failures: dict[str, BaseException] = field(default_factory=dict[str, BaseException])
    """Task name -> error, of those that were set aside."""
    left_out: int = 0
    """How many are due besides and were not wanted now."""
    place: Place | None = None
    """The stage, if it is known; tracebacks are kept there."""
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
    skipped: int = 0
    """Of those that are done, how many were there before."""
    failed: int = 0
    rows: int = 0
    """Of the tasks that ran now, as far as they say."""
    num_tokens: int = 0
    seconds: float = 0.0
    """Since the tasks began."""


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
    keep_receipts: bool = False,
) -> Outcome:
    """Run the tasks that are not done; a failed one does not stop the others.

    Args:
        stage: name for messages and progress.
        tasks: in the order in which they start, but for large ones near the end.
        work: a module-level function; it writes `task.output` and returns a receipt.
        pool: where it runs; its window is read before each start, as workers come and go.
        listener: told after each task, and while a task runs that says how far it is.
        keep_receipts: whether the outcome has them: those of very many tasks take memory.

    Returns:
        The outcome, failures included: see `raise_failures`.

    Raises:
        OutputError: a task could not write, as on a full disk; the rest would fail the same way.
        TryAgainError: the cluster went away.
    """
    started = time.monotonic()
    outcome, due, noted = begin(stage, tasks)
    total = len(due) + len(outcome.skipped)

    root = outcome.place.root if outcome.place is not None and due else None
    workers = max(1, pool.window // 2)
    with ExitStack() as stack:
        tracker = stack.enter_context(
            live(root, stage, total=total, skipped=len(outcome.skipped), workers=workers)
        )
        tell = telling(tracker, listener)
        stack.enter_context(watching([(task.name, task.payload) for task in due], tell))
        work = stack.enter_context(on_copies(work, due))
        loop = Loop(stage, due, work, pool=pool, outcome=outcome, tracker=tracker, noted=noted,
                    finished=tell, keep_receipts=keep_receipts)  # fmt: skip
        loop.run()
    outcome.seconds = time.monotonic() - started
    return outcome


def begin(stage: str, tasks: Iterable[Task]) -> tuple[Outcome, list[Task], frozenset[str]]:
    """Sort out what is done, and what is not wanted now.

    Returns:
        The outcome so far, the tasks that are due, and the names of those of them that have failed
        before.
    """
    place = current_place()
    outcome = Outcome(place=place)
    due: list[Task] = []
    for task in tasks:
        (outcome.skipped.append(task.name) if task.is_done() else due.append(task))
    noted = frozenset[str]()
    if place is not None:
        noted = kept_names(place.root, stage)
        if noted:
            forget_failures(place.root, stage, but={task.name for task in due})
        if place.only is not None and stage in place.only:
            wanted = [task for task in due if task.name in place.only[stage]]
            outcome.left_out, due = len(due) - len(wanted), wanted
    if due and outcome.skipped:
        done, total = len(outcome.skipped), len(outcome.skipped) + len(due)
        log.info("%s: %d of %d done already", stage, done, total)
    return outcome, due, noted


def telling(tracker: Tracker, listener: Listener) -> Callable[..., None]:
    """`tell(name)` after a task, `tell(name, detail, part)` while it says how far it is."""

    def tell(name: str, detail: str = "", part: float = 0.0) -> None:
        if detail:
            tracker.said(detail, part)
        listener(
            Progress(
                tracker.stage,
                tracker.skipped + tracker.done,
                tracker.total,
                name,
                detail,
                part,
                skipped=tracker.skipped,
                failed=tracker.num_failed,
                rows=tracker.rows,
                num_tokens=tracker.num_tokens,
                seconds=time.time() - tracker.started_at,
            )
        )

    return tell


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
        TooManyBadError: some tasks failed and others did not; `tasks` and `others` say which and
            why, the `fix` has the command that runs just these again.
        CurateError: all failed; of the first failure's kind.
        BaseException: all failed of a bug: its own error, with its traceback.
        TryAgainError: nothing failed, but tasks that were not wanted now are still due.
    """
    failed = [(stage, outcome) for stage, outcome in outcomes.items() if outcome.failures]
    if not failed:
        _raise_left_out(outcomes)
        return
    stage, outcome = failed[0]
    failures = sorted(outcome.failures.items())
    name, error = failures[0]
    others = _sentences(stage, failures[1:])
    for other, its in failed[1:]:
        others += _sentences(other, sorted(its.failures.items()))
    for sentence in others:
        log.error("%s", sentence)
    total = len(outcome.failures) + len(outcome.done) + len(outcome.skipped)
    is_whole = len(outcome.failures) == total
    if is_whole and not isinstance(error, CurateError) and not is_worker_lost(error):
        raise error
    what = f"{stage}: {len(outcome.failures)} of {counted(total, 'task')} failed; {name}: "
    reason = _as_curate_error(error)
    kind = type(reason) if is_whole else TooManyBadError
    summary = kind(what + reason.what, fix=_fix(reason, stage, outcome))
    summary.tasks = [task for _, its in failed for task in sorted(its.failures)]
    summary.others = others
    raise summary from error


def _raise_left_out(outcomes: Mapping[str, Outcome]) -> None:
    for stage, outcome in outcomes.items():
        if outcome.left_out and outcome.place is not None:
            raise TryAgainError(
                f"{stage}: what had failed is done; {counted(outcome.left_out, 'task')} beside"
                " had not run yet",
                fix=f"run `{outcome.place.command}`",
            )


def _as_curate_error(error: BaseException) -> CurateError:
    if isinstance(error, CurateError):
        return error
    if is_worker_lost(error):
        return CurateError(
            f"the worker died {ATTEMPTS} times, most likely for lack of memory",
            fix="lower score.batch_tokens or index.partition_rows, or give the workers more memory",
        )
    return CurateError(
        f"{type(error).__name__}: {error}",
        fix="this is a bug in curate, or in a method of your own, or a fault of the machine",
    )


def _fix(error: CurateError, stage: str, outcome: Outcome) -> str:
    """What to do, and where the tracebacks are."""
    if outcome.place is None:
        return error.fix
    folder = failures_folder(outcome.place.root, stage)
    return (
        f"{error.fix}; then `{outcome.place.command} --retry-failed` runs just what failed. What"
        f" each task was given, and its traceback: {folder}"
    )


def _sentences(stage: str, failures: Sequence[tuple[str, BaseException]]) -> list[str]:
    """What is said of each, of the first twenty."""
    found: list[str] = []
    for name, reason in failures[:_SHOWN_FAILURES]:
        what = reason.what if isinstance(reason, CurateError) else repr(reason)
        found.append(f"{stage}: {name} failed: {what}")
    if len(failures) > _SHOWN_FAILURES:
        found.append(f"{stage}: {len(failures) - _SHOWN_FAILURES} more failed")
    return found


def require(tables: Sequence[object], *, stage: str, command: str) -> None:
    """Refuse to go on where an earlier stage has left nothing.

    Raises:
        InputError: names the command to run first.
    """
    if not tables:
        raise InputError(f"{stage} has not run yet", fix=f"run `{command}` first")
