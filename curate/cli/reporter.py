"""What a command tells while it runs and at its end: logs, progress, events, results."""

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Generator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from curate.errors import OutputError

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from jobs.run import Progress

SCHEMA_VERSION = 1
"""Of the JSON that commands print."""

_OURS = ("curate", "jobs", "scorers", "mixers")
_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_DETAILS = 20.0


class _Stderr(logging.Handler):
    """Looks `sys.stderr` up each time: a progress bar puts itself in between."""

    def emit(self, record: logging.LogRecord) -> None:
        # Some libraries, distributed for one, lower their own levels when they are imported.
        if record.levelno < logging.WARNING and record.name.split(".")[0] not in _OURS:
            return
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        print(f"{level}{record.getMessage()}", file=sys.stderr)


def start_logging(*, quiet: bool, verbose: bool) -> None:
    """Our own messages go to stderr; of other libraries, warnings only."""
    root = logging.getLogger()
    root.handlers[:] = [_Stderr()]
    root.setLevel(logging.WARNING)
    level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
    for name in _OURS:
        logging.getLogger(name).setLevel(level)


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
        self._last_line = self._last_detail = time.monotonic()

    def __call__(self, progress: "Progress") -> None:
        """One task of a stage has finished, or says how far it is."""
        self.event("progress", **asdict(progress))
        if self._bars is not None:
            self._advance(self._bars, progress)
        elif self._quiet:
            return
        elif progress.detail:
            now = time.monotonic()
            if now > self._last_detail + _SECONDS_BETWEEN_DETAILS:
                self._last_detail = now
                text = f"{progress.stage}: {progress.name}: {progress.detail}"
                print(text, file=sys.stderr)
        else:
            now = time.monotonic()
            if progress.done == progress.total or now > self._last_line + _SECONDS_BETWEEN_LINES:
                self._last_line = now
                print(f"{progress.stage}: {progress.done} of {progress.total}", file=sys.stderr)

    def event(self, event: str, **values: Any) -> None:
        """Write one event."""
        if self._events is not None:
            line = {"event": event, "time": round(time.time(), 3), **values}
            self._events.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._events.flush()

    def _advance(self, bars: "Bars", progress: "Progress") -> None:
        if progress.stage not in self._tasks:
            self._tasks[progress.stage] = bars.add_task(
                progress.stage, total=progress.total, detail=""
            )
        bars.update(
            self._tasks[progress.stage],
            completed=progress.done + progress.part,
            total=progress.total,
            detail=progress.detail,
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
    """A bar for each stage, and behind it what its running task says of itself."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining
    from rich.table import Column

    return Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        Remaining(),
        TextColumn("{task.fields[detail]}", table_column=Column(no_wrap=True, ratio=1)),
        expand=True,
        console=Console(file=stream),
    )
