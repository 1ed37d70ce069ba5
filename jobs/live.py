"""What a stage is doing now, kept in a small file that `curate status` reads from elsewhere.

The loop tells a `Tracker` what starts and ends; a thread writes what has changed once a second.
The file holds counts, sums for each worker, what runs now and the last failures: its size does not
grow with the number of tasks. It is a note for people: no stage reads it, and a write that fails
fails nothing.
"""

import os
import re
import time
from collections import deque
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any, NamedTuple

from curate.data.files import read_document, write_json
from curate.errors import CurateError, InputError, OutputError

_FOLDER = ".live"
_SECONDS = 1.0
_SHOWN_FAILURES = 20
_MOST_WORKERS = 512
_EARLIER = "earlier workers"
_MARKS = 60
_SECONDS_BETWEEN_MARKS = 5.0


@dataclass(slots=True)
class WorkerSums:
    """What one worker has done in this stage."""

    done: int = 0
    failed: int = 0
    seconds: float = 0.0
    """At work on what it has finished."""
    rows: int = 0
    num_tokens: int = 0
    last: float = 0.0
    """When it ended a task, or began one, last: seconds since 1970."""


class Running(NamedTuple):
    """One task at work."""

    worker: str
    since: float
    """Seconds since 1970."""


class _Mark(NamedTuple):
    """The sums at some moment; rates are taken from an earlier one."""

    time: float
    done: int
    rows: int
    num_tokens: int


@dataclass(slots=True)
class Tracker:
    """The state of one stage; its methods may be called from any thread."""

    stage: str
    total: int
    """Outputs of the stage, those that were there already included."""
    skipped: int
    """Outputs that were there already."""
    num_workers: int
    started_at: float = field(default_factory=time.time)
    done: int = 0
    num_failed: int = 0
    rows: int = 0
    num_tokens: int = 0
    workers: dict[str, WorkerSums] = field(default_factory=dict[str, WorkerSums])
    running: dict[str, Running] = field(default_factory=dict[str, Running])
    failures: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_SHOWN_FAILURES))
    detail: str = ""
    """What the tasks at work say of themselves."""
    part: float = 0.0
    """Tasks' worth of work that is done by those at work."""
    changed: bool = True
    ended: bool = False
    _marks: deque[_Mark] = field(default_factory=lambda: deque[_Mark](maxlen=_MARKS))
    _lock: Lock = field(default_factory=Lock)

    def started(self, name: str, worker: str) -> None:
        """A task has begun on a worker."""
        now = time.time()
        with self._lock:
            self.running[name] = Running(worker, now)
            self._sums(worker, now)
            self.changed = True

    def finished(
        self, name: str, worker: str, seconds: float, receipt: Mapping[str, Any] | None = None
    ) -> None:
        """A task has ended well.

        Args:
            name: of the task.
            worker: on which it ran.
            seconds: that it took there.
            receipt: its `rows` and `num_tokens` are added up, where it has them.
        """
        now = time.time()
        with self._lock:
            self._end(name)
            sums = self._sums(worker, now)
            rows, tokens = (_count(receipt, key) for key in ("rows", "num_tokens"))
            sums.done += 1
            sums.seconds += seconds
            sums.rows += rows
            sums.num_tokens += tokens
            self.done += 1
            self.rows += rows
            self.num_tokens += tokens
            if not self._marks or now - self._marks[-1].time >= _SECONDS_BETWEEN_MARKS:
                self._marks.append(_Mark(now, self.done, self.rows, self.num_tokens))

    def failed(self, name: str, worker: str, error: BaseException | str) -> None:
        """A task has failed for good."""
        now = time.time()
        with self._lock:
            self._end(name)
            self._sums(worker, now).failed += 1
            self.num_failed += 1
            self.failures.append(
                {"name": name, "worker": worker, "error": _sentence(error), "time": now}
            )

    def dropped(self, name: str) -> None:
        """A task has lost its worker and will be tried again."""
        with self._lock:
            self._end(name)

    def said(self, detail: str, part: float) -> None:
        """What the tasks at work say: a sentence, and how many tasks' worth they have done."""
        with self._lock:
            self.detail, self.part, self.changed = detail, part, True

    def values(self) -> dict[str, Any]:
        """What the file holds."""
        with self._lock:
            first = self._marks[0] if len(self._marks) == _MARKS else None
            since = first or _Mark(self.started_at, 0, 0, 0)
            self.changed = False
            return {
                "schema_version": 1,
                "stage": self.stage,
                "process": os.getpid(),
                "host": os.uname().nodename,
                "started": self.started_at,
                "updated": time.time(),
                "ended": self.ended,
                "total": self.total,
                "skipped": self.skipped,
                "done": self.done,
                "failed": self.num_failed,
                "rows": self.rows,
                "num_tokens": self.num_tokens,
                "num_workers": self.num_workers,
                "detail": self.detail,
                "part": self.part,
                "recent": since._asdict(),
                "workers": {name: asdict(sums) for name, sums in self.workers.items()},
                "running": {name: task._asdict() for name, task in self.running.items()},
                "failures": list(self.failures),
            }

    def _end(self, name: str) -> None:
        self.running.pop(name, None)
        self.detail, self.part, self.changed = "", 0.0, True

    def _sums(self, worker: str, now: float) -> WorkerSums:
        sums = self.workers.get(worker)
        if sums is None:
            if len(self.workers) >= _MOST_WORKERS:
                self._forget()
            sums = self.workers[worker] = WorkerSums()
        sums.last = now
        return sums

    def _forget(self) -> None:
        """Workers come and go for weeks: one that is long gone is kept as part of a sum."""
        busy = {task.worker for task in self.running.values()} | {_EARLIER}
        idle = [name for name in self.workers if name not in busy]
        if not idle:
            return
        gone = self.workers.pop(min(idle, key=lambda name: self.workers[name].last))
        into = self.workers.setdefault(_EARLIER, WorkerSums())
        for name in ("done", "failed", "seconds", "rows", "num_tokens"):
            setattr(into, name, getattr(into, name) + getattr(gone, name))


@contextmanager
def live(
    root: Path | None, stage: str, *, total: int, skipped: int = 0, workers: int = 1
) -> Generator[Tracker]:
    """A tracker whose state stands in `root/.live/<stage>.json` while the stage runs.

    Args:
        root: the run folder; None writes nothing.
        stage: as it is named in messages.
        total: outputs of the stage, those that are there already included.
        skipped: outputs that are there already.
        workers: how many there are.

    Yields:
        The tracker. The file goes when the stage has ended without failures, and stays when it has
        not; whoever reads it looks whether the run is still held by a process.
    """
    tracker = Tracker(stage, total, skipped, workers)
    if root is None:
        yield tracker
        return
    path = _place(root, stage)
    over = Event()

    def write() -> None:
        try:
            write_json(path, tracker.values(), flush=False)
        except (OutputError, OSError):  # of a full disk the tasks themselves will tell
            tracker.changed = True

    def watch() -> None:
        while not over.wait(_SECONDS):
            if tracker.changed:
                write()

    write()
    thread = Thread(target=watch, name="live", daemon=True)
    thread.start()
    went_well = False
    try:
        yield tracker
        went_well = tracker.num_failed == 0
    finally:
        over.set()
        thread.join()
        if went_well:
            with suppress(OSError):
                path.unlink(missing_ok=True)
                path.parent.rmdir()  # refused where another stage's file is there
        else:
            tracker.running.clear()
            tracker.ended = True
            write()


def clear_live(root: Path) -> None:
    """Remove what an earlier process left; call it while holding the run folder."""
    folder = root / _FOLDER
    for path in folder.glob("*.json"):
        path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLive:
    """One worker, as `curate status` shows it."""

    name: str
    done: int
    failed: int
    running: tuple[str, ...]
    """Names of its tasks at work."""
    running_seconds: float | None
    """How long the oldest of them has run."""
    rows_per_second: float | None
    """While it was at work; None where tasks have no rows."""
    tokens_per_second: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """What a stage is doing now."""

    stage: str
    total: int
    done: int
    """Those that were there before included."""
    skipped: int
    running: int
    failed: int
    remaining: int
    """Neither done nor failed; those at work included."""
    seconds: float
    """Since the stage began."""
    rows: int
    num_tokens: int
    tasks_per_second: float | None
    rows_per_second: float | None
    """Of the last minutes; None where tasks have no rows, or none has finished yet."""
    tokens_per_second: float | None
    seconds_left: float | None
    """At the pace of the last minutes; None before there is one."""
    detail: str
    workers: tuple[WorkerLive, ...]
    failures: tuple[dict[str, Any], ...]
    """The last ones: `name`, `worker`, `error`, `time`."""
    process: int
    host: str
    updated: float
    """Seconds since 1970."""
    ended: bool
    """Whether the stage is over, with failures; the process may be at work on another."""


def read_live(root: Path, *, now: float | None = None) -> list[Live]:
    """What the stages of a run say of themselves, the one that began last at the end.

    Whether the process that said it still lives is not looked at: see `jobs.opening.holder`.

    Args:
        root: the run folder.
        now: seconds since 1970.
    """
    found: list[tuple[float, Live]] = []
    for path in sorted((root / _FOLDER).glob("*.json")):
        try:
            values = read_document(path)
            if values is not None:
                found.append((values["started"], _live(values, now or time.time())))
        except (InputError, OSError, KeyError, TypeError, ValueError):
            continue  # of another version, or just being replaced
    return [each for _, each in sorted(found, key=lambda pair: pair[0])]


def _live(values: Mapping[str, Any], now: float) -> Live:
    now = max(now, values["updated"])  # clocks of two machines differ
    recent = values["recent"]
    elapsed = max(now - recent["time"], 1e-9)
    ended = values["done"] - recent["done"] + values["part"]
    pace = ended / elapsed if ended > 0 else None
    remaining = max(0, values["total"] - values["skipped"] - values["done"] - values["failed"])
    at_work: dict[str, dict[str, float]] = {}
    for name, task in values["running"].items():
        at_work.setdefault(task["worker"], {})[name] = task["since"]
    return Live(
        stage=values["stage"],
        total=values["total"],
        done=values["skipped"] + values["done"],
        skipped=values["skipped"],
        running=len(values["running"]),
        failed=values["failed"],
        remaining=remaining,
        seconds=now - values["started"],
        rows=values["rows"],
        num_tokens=values["num_tokens"],
        tasks_per_second=pace,
        rows_per_second=_rate(values["rows"] - recent["rows"], elapsed),
        tokens_per_second=_rate(values["num_tokens"] - recent["num_tokens"], elapsed),
        seconds_left=(remaining - values["part"]) / pace if pace else None,
        detail=values["detail"],
        workers=tuple(
            _worker(name, sums, at_work.get(name, {}), now)
            for name, sums in sorted(values["workers"].items())
        ),
        failures=tuple(values["failures"]),
        process=values["process"],
        host=values["host"],
        updated=values["updated"],
        ended=values["ended"],
    )


def _worker(
    name: str, sums: Mapping[str, Any], at_work: Mapping[str, float], now: float
) -> WorkerLive:
    return WorkerLive(
        name=name,
        done=sums["done"],
        failed=sums["failed"],
        running=tuple(sorted(at_work, key=lambda task: at_work[task])),
        running_seconds=max(0.0, now - min(at_work.values())) if at_work else None,
        rows_per_second=_rate(sums["rows"], sums["seconds"]),
        tokens_per_second=_rate(sums["num_tokens"], sums["seconds"]),
    )


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count > 0 and seconds > 0 else None


def _place(root: Path, stage: str) -> Path:
    return root / _FOLDER / f"{re.sub(r'[^A-Za-z0-9_-]+', '-', stage)[:100]}.json"


def _count(receipt: Mapping[str, Any] | None, key: str) -> int:
    value = (receipt or {}).get(key, 0)
    return value if isinstance(value, int) else 0


def _sentence(error: BaseException | str) -> str:
    if isinstance(error, CurateError):
        return error.what
    return error if isinstance(error, str) else f"{type(error).__name__}: {error}"
