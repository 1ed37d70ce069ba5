"""What a command tells while it runs and at its end: logs, progress, events, results."""

import contextlib
import json
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Generator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from curate.cli.text import duration_text, rate_text
from curate.errors import OutputError, on_one_line

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from jobs.run import Progress

SCHEMA_VERSION = 1
"""Of the JSON that commands print."""

_OURS = ("curate", "jobs", "scorers", "mixers")
_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_DETAILS = 20.0
_SECONDS_BETWEEN_MARKS = 1.0
_MARKS = 120


class _Stderr(logging.Handler):
    """Looks `sys.stderr` up each time: a progress bar puts itself in between."""

    def emit(self, record: logging.LogRecord) -> None:
        # Some libraries, distributed for one, lower their own levels when they are imported.
        if record.levelno < logging.WARNING and record.name.split(".")[0] not in _OURS:
            return
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        # A message may have lines of its own, as a warning of a library; a name in it may not.
        lines = (on_one_line(line) for line in record.getMessage().splitlines() or [""])
        print(level + "\n".join(lines), file=sys.stderr)


def start_logging(*, quiet: bool, verbose: bool) -> None:
    """Our own messages go to stderr; of other libraries, warnings only."""
    root = logging.getLogger()
    root.handlers[:] = [_Stderr()]
    root.setLevel(logging.WARNING)
    level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
    for name in _OURS:
        logging.getLogger(name).setLevel(level)


class _Mark(NamedTuple):
    """The sums of a stage at some moment."""

    seconds: float
    ended: float
    """Tasks that ran now, those at work in part."""
    rows: int
    num_tokens: int


class Pace:
    """How fast a stage goes, over its last minutes, so that a slow start is forgotten."""

    def __init__(self) -> None:
        self._marks = deque([_Mark(0.0, 0.0, 0, 0)], maxlen=_MARKS)
        self._now = self._marks[0]
        self._remaining = 0.0
        self._at = time.monotonic()

    def add(self, progress: "Progress") -> None:
        """Take in what the loop tells."""
        if progress.seconds < self._now.seconds:  # tasks of the same name once more
            self.__init__()
        ended = progress.done - progress.skipped + progress.part
        self._now = _Mark(progress.seconds, ended, progress.rows, progress.num_tokens)
        self._remaining = progress.total - progress.done - progress.failed - progress.part
        self._at = time.monotonic()
        if progress.seconds > self._marks[-1].seconds + _SECONDS_BETWEEN_MARKS:
            self._marks.append(self._now)

    def rates(self) -> list[str]:
        """Rows and tokens per second, where the tasks of the stage know them."""
        then, now = self._marks[0], self._now
        if now.seconds <= then.seconds:
            return []
        counts = {"rows/s": now.rows - then.rows, "tokens/s": now.num_tokens - then.num_tokens}
        return [
            f"{rate_text(count / (now.seconds - then.seconds))} {unit}"
            for unit, count in counts.items()
            if count > 0
        ]

    def seconds_left(self) -> float | None:
        """At this pace; None before a task has moved."""
        then, now = self._marks[0], self._now
        ended = now.ended - then.ended
        if ended <= 0 or now.seconds <= then.seconds:
            return None
        whole = self._remaining * (now.seconds - then.seconds) / ended
        return max(0.0, whole - (time.monotonic() - self._at))

    def words(self) -> str:
        """Rates, and the time left or, at the end, taken."""
        left = self.seconds_left()
        ending = [f"in {duration_text(self._now.seconds)}"]
        if self._remaining > 0:
            ending = [] if left is None else [f"{duration_text(left)} left"]
        return ", ".join([*self.rates(), *ending])


class Reporter:
    """Listens to the job loop; shows bars on a terminal, plain lines elsewhere, events on demand.

    Args:
        events: where events go as JSON lines, if anywhere.
        quiet: no progress.
    """

    def __init__(self, *, events: TextIO | None, quiet: bool, bars: "Bars | None") -> None:
        self._events = events
        self._quiet = quiet
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._paces: dict[str, Pace] = {}
        self._last_line = self._last_detail = time.monotonic()

    def __call__(self, progress: "Progress") -> None:
        """One task of a stage has finished, or says how far it is."""
        self.event("progress", **asdict(progress))
        pace = self._paces.setdefault(progress.stage, Pace())
        pace.add(progress)
        if self._bars is not None:
            self._advance(self._bars, progress)
        elif self._quiet:
            return
        elif progress.detail:
            now = time.monotonic()
            if now > self._last_detail + _SECONDS_BETWEEN_DETAILS:
                self._last_detail = now
                said = ", ".join(part for part in (progress.detail, pace.words()) if part)
                text = f"{progress.stage}: {progress.name}: {said}"
                print(on_one_line(text), file=sys.stderr)
        else:
            now = time.monotonic()
            if progress.done == progress.total or now > self._last_line + _SECONDS_BETWEEN_LINES:
                self._last_line = now
                text = f"{progress.stage}: {progress.done} of {progress.total}"
                text += f", {progress.failed} failed" if progress.failed else ""
                words = pace.words()
                print(f"{text}; {words}" if words else text, file=sys.stderr)

    def event(self, event: str, **values: Any) -> None:
        """Write one event."""
        if self._events is not None:
            line = {"event": event, "time": round(time.time(), 3), **values}
            self._events.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._events.flush()

    def _advance(self, bars: "Bars", progress: "Progress") -> None:
        if progress.stage not in self._tasks:
            self._tasks[progress.stage] = bars.add_task(
                progress.stage, total=progress.total, detail="", pace=self._paces[progress.stage]
            )
        bars.update(
            self._tasks[progress.stage],
            completed=progress.done + progress.part,
            total=progress.total,
            detail=on_one_line(progress.detail),
        )


@contextlib.contextmanager
def reporting(*, events: str | None, quiet: bool) -> Generator[Reporter]:
    """A reporter whose bars and event file are closed at the end."""
    with contextlib.ExitStack() as stack:
        stream = _open_events(events, stack)
        bars = None
        if not quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            bars = stack.enter_context(make_bars(sys.stderr))
        yield Reporter(events=stream, quiet=quiet, bars=bars)


def print_json(command: str, values: Mapping[str, Any]) -> None:
    """The result of a command as one JSON document on stdout."""
    document = {"schema_version": SCHEMA_VERSION, "command": command, **values}
    print(json.dumps(document, indent=1, ensure_ascii=False, default=str))


def print_error(command: str, error: Mapping[str, Any], *, as_event: bool) -> None:
    """How a command failed, on one line of stdout, for who reads its results there.

    Args:
        command: its name.
        error: `what`, `fix` and `exit_code`.
        as_event: the lines before were events, of which this is the last.
    """
    event = {"event": "error", "time": round(time.time(), 3)} if as_event else {}
    document = {**event, "schema_version": SCHEMA_VERSION, "command": command, "error": error}
    print(json.dumps(document, ensure_ascii=False), flush=True)


def _open_events(events: str | None, stack: contextlib.ExitStack) -> TextIO | None:
    if events is None or events == "-":
        return sys.stdout if events else None
    try:
        return stack.enter_context(Path(events).open("a", encoding="utf-8"))
    except OSError as error:
        raise OutputError(
            f"--events {events} cannot be written: {error.strerror}", fix="choose another file"
        ) from error


def make_bars(stream: TextIO) -> "Bars":
    """A bar for each stage, its pace, and what its running task says of itself."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn
    from rich.progress import Task as Bar
    from rich.table import Column
    from rich.text import Text

    class Words(ProgressColumn):
        """Rates and time left; drawn anew while nothing is told, as the time runs on."""

        max_refresh = 0.5

        def render(self, task: Bar) -> Text:
            return Text(task.fields["pace"].words())

    return Progress(
        TextColumn("{task.description:<10}", markup=False),
        BarColumn(bar_width=None, table_column=Column(min_width=10, max_width=40, ratio=1)),
        MofNCompleteColumn(),
        Words(table_column=Column(no_wrap=True)),
        TextColumn(
            "{task.fields[detail]}", markup=False, table_column=Column(no_wrap=True, ratio=1)
        ),
        expand=True,
        console=Console(file=stream),
    )
