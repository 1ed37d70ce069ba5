"""`curate status`: what of a run is done, and what it is doing now."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from curate.cli.colour import Paint, painter, plain, show, width_of
from curate.cli.reporter import SCHEMA_VERSION, print_json
from curate.cli.text import cut_end, duration_text, place_text, rate_text, table
from curate.errors import ConfigError, on_one_line

if TYPE_CHECKING:
    from jobs.live import Live, WorkerLive
    from jobs.status import Status

_SECONDS_DRAWN = 1.0
_SECONDS_PLAIN = 10.0
_SECONDS_LOOKED = 30.0
_MOST_WORKERS = 64
_BAR = 30
_FAILURES = 5
_ROOM_FOR_THE_REST = 12


def print_status(folder: Path, *, as_json: bool, watch: bool, every: float | None) -> None:
    """`curate status`, once or until the run ends.

    Args:
        folder: the run.
        as_json: one document; with `watch` one line for each look.
        watch: look again and again.
        every: seconds between two looks.

    Raises:
        ConfigError: there are no two looks.
    """
    if every is not None and not watch:
        raise ConfigError("--every belongs to --watch", fix="add --watch")
    from jobs.status import run_status

    status = run_status(folder)
    if watch:
        _watch(folder, status, as_json=as_json, every=every)
    elif as_json:
        print_json("status", asdict(status))
    else:
        show(lambda paint, width: status_lines(status, paint=paint, width=width))


def status_lines(
    status: "Status", *, paint: Paint = plain, width: int | None = None, most: int = _MOST_WORKERS
) -> Iterator[str]:
    """The whole page.

    Args:
        status: what was found.
        paint: colours.
        width: of the terminal.
        most: workers that are shown.
    """
    by = f", in use by {on_one_line(status.in_use_by)}" if status.in_use_by else ""
    yield f"run {place_text(status.run)}{by}"
    rows = [["stage", "done", "failed", "remaining", "last finished"]]
    rows += [
        [s.stage, str(s.done), str(s.failed), str(s.remaining), s.finished or "never"]
        for s in status.stages
    ]
    yield from table(
        rows,
        right=frozenset({1, 2, 3}),
        width=width,
        paint=paint,
        style=lambda i, cell: "red" if i == 2 and cell != "0" else "dim" if i == 4 else "",
    )
    for stage in status.stages:
        for why in stage.why:
            told = on_one_line(why)
            yield told if told.startswith(f"{stage.stage}: ") else f"{stage.stage}: {told}"
    for reason, rows_aside in status.set_aside.items():
        yield f"set aside: {rows_aside} {on_one_line(reason)}"
    for live in status.now:
        yield ""
        yield from _live_lines(live, paint, width, most)


def _live_lines(live: "Live", paint: Paint, width: int | None, most: int) -> Iterator[str]:
    """What one group of tasks is doing."""
    yield f"{'ended' if live.ended else 'now'}: {_sentence(live, paint)}"
    if width is not None and not live.ended:
        share = (live.done + live.failed) / max(1, live.total)
        full = int(share * _BAR)
        yield f"{paint('━' * full, 'green')}{paint('━' * (_BAR - full), 'dim')} {100 * share:.0f} %"
    if live.detail:
        detail = on_one_line(live.detail)
        yield f"  {detail if width is None else cut_end(detail, width - 2)}"
    if live.workers and not live.ended:
        yield from _workers(live.workers, paint, width, most)
    for failure in live.failures[-_FAILURES:]:
        text = on_one_line(f"{failure['name']} on {failure['worker']}: {failure['error']}")
        yield f"{paint('failed', 'red')}: {text}"


def _sentence(live: "Live", paint: Paint) -> str:
    """Counts, rates and times of a group of tasks."""
    parts = [f"{live.done:,} of {live.total:,} done"]
    if not live.ended:
        parts.append(f"{live.running:,} running")
    if live.failed:
        parts.append(paint(f"{live.failed:,} failed", "red"))
    said = f"{paint(on_one_line(live.stage), 'bold')}, {', '.join(parts)}"
    rates = [(live.rows_per_second, "rows/s"), (live.tokens_per_second, "tokens/s")]
    told = [f"{rate_text(rate)} {unit}" for rate, unit in rates if rate is not None]
    if live.seconds_left is not None and not live.ended:
        told.append(f"{duration_text(live.seconds_left)} left")
    told.append(f"running for {duration_text(live.seconds)}" if not live.ended else "")
    return "; ".join(part for part in (said, ", ".join(t for t in told if t)) if part)


def _workers(
    workers: Sequence["WorkerLive"], paint: Paint, width: int | None, most: int
) -> Iterator[str]:
    """A line for each, those at work first where there are too many."""
    ordered = sorted(workers, key=lambda worker: (not worker.running, worker.name))
    shown = sorted(ordered[:most], key=lambda worker: worker.name)
    head = ["worker", "done", "failed", "running now", "since", "rows/s", "tokens/s"]
    rows = [
        [
            worker.name,
            f"{worker.done:,}",
            f"{worker.failed:,}",
            ", ".join(worker.running),
            "" if worker.running_seconds is None else duration_text(worker.running_seconds),
            rate_text(worker.rows_per_second),
            rate_text(worker.tokens_per_second),
        ]
        for worker in shown
    ]
    # A column that is empty throughout, as rows of trainings are, is left out.
    kept = [i for i in range(len(head)) if i < 4 or any(row[i] for row in rows)]
    yield from table(
        [[row[i] for i in kept] for row in [head, *rows]],
        right=frozenset(range(len(kept))) - {0, 3},
        width=width,
        paint=paint,
        style=lambda i, cell: "red" if kept[i] == 2 and cell != "0" else "",
    )
    if len(workers) > most:
        yield f"and {len(workers) - most:,} more workers (--json has them all)"


def _watch(folder: Path, status: "Status", *, as_json: bool, every: float | None) -> None:
    """Look again until nobody works in the folder; the last look is complete."""
    from jobs.status import run_status

    drawn = sys.stdout.isatty() and not as_json
    pause = every or (_SECONDS_DRAWN if drawn or as_json else _SECONDS_PLAIN)
    if status.in_use_by is None:
        _tell(status, as_json=as_json)
        if not as_json:
            print("nobody works in it now")
        return
    if drawn:
        _draw(folder, status, pause)
    else:
        for seen in _looks(folder, status, pause):
            _tell(seen, as_json=as_json)
            if not as_json:
                print(flush=True)
    _tell(run_status(folder), as_json=as_json)
    if not as_json:
        print("the run has ended")


def _looks(folder: Path, status: "Status", pause: float) -> Iterator["Status"]:
    """The state again and again until the run ends.

    What is done is counted from files, which takes a while on a large run: anew only when the
    stage changes, and now and then. What runs is read each time.
    """
    from dataclasses import replace

    from jobs.status import at_work, run_status

    looked = time.monotonic()
    stages = [live.stage for live in status.now]
    while True:
        yield status
        time.sleep(pause)
        owner, now = at_work(folder)
        if owner is None:
            return
        its = [live.stage for live in now]
        if its != stages or time.monotonic() > looked + _SECONDS_LOOKED:
            stages, status, looked = its, run_status(folder), time.monotonic()
            if status.in_use_by is None:
                return
        else:
            status = replace(status, in_use_by=owner, now=now)


def _draw(folder: Path, status: "Status", pause: float) -> None:
    """On a terminal the page stands still, and its numbers change."""
    from rich.console import Console
    from rich.live import Live as Drawn
    from rich.text import Text

    console = Console(file=sys.stdout)
    paint = painter()

    def page(seen: "Status") -> Text:
        room = max(3, console.height - _ROOM_FOR_THE_REST - len(seen.stages))
        lines = status_lines(seen, paint=paint, width=width_of(), most=room)
        return Text.from_ansi("\n".join(lines))

    with Drawn(console=console, auto_refresh=False, transient=True) as drawn:
        for seen in _looks(folder, status, pause):
            drawn.update(page(seen), refresh=True)


def _tell(status: "Status", *, as_json: bool) -> None:
    """One look."""
    if as_json:
        line = {"schema_version": SCHEMA_VERSION, "command": "status", **asdict(status)}
        print(json.dumps(line, ensure_ascii=False, default=str), flush=True)
    else:
        show(lambda paint, width: status_lines(status, paint=paint, width=width))
