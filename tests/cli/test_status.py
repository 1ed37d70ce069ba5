"""What a run says of itself while it runs, from another terminal."""

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

import jobs.status
from curate.cli.colour import plain
from curate.cli.status import status_lines
from curate.cli.text import duration_text, rate_text
from jobs.live import Live, live, read_live
from jobs.locking import locked
from jobs.status import StageStatus, Status, run_status

Curate = Callable[..., Any]
Config = Callable[..., Path]

SLOW = """
import os
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import ClassVar

calls = 0

@dataclass(frozen=True)
class Slow:
    needs: ClassVar = frozenset({"uniform"})
    columns: ClassVar = {"slow": "a number that takes its time"}

    def score(self, quantities):
        global calls
        calls += 1
        time.sleep(0.3)
        while calls > 5 and not Path(os.environ["GATE"]).exists():
            time.sleep(0.05)
        return {"slow": quantities["uniform"]}
"""


@pytest.fixture
def running(
    config: Config, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Generator[subprocess.Popen[bytes]]:
    """A run of twenty partitions that scores five, and the others when there is a file `gate`."""
    (tmp_path / "slow_scorers.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("GATE", str(tmp_path / "gate"))
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = config(
        index={"partition_rows": 2, "held_out": 0},
        score={"scorers": ["slow_scorers:Slow"]},
        plan={"keep": 0.5},
    )
    log = tmp_path / "log.txt"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "curate", "run", str(settings)],
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
    limit = time.monotonic() + 120
    while not any(one.stage == "columns" and one.done == 5 for one in read_live(tmp_path / "run")):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < limit
        time.sleep(0.05)
    yield process
    process.kill()
    process.wait()


def test_status_counts_what_runs_now_and_forgets_it_when_the_process_has_died(
    running: subprocess.Popen[bytes], curate: Curate, tmp_path: Path
):
    run = tmp_path / "run"
    found = json.loads(curate("status", run, "--json").out)
    assert f"pid {running.pid} " in found["in_use_by"]
    [now] = found["now"]
    assert (now["stage"], now["total"], now["failed"]) == ("columns", 20, 0)
    assert now["process"] == running.pid
    assert (now["done"], now["running"], now["remaining"]) == (5, 1, 15)
    # Each partition has two rows and takes at least 0.3 s.
    assert 0 < now["rows_per_second"] < 7
    assert now["seconds_left"] > 15 * 0.3
    [worker] = now["workers"]
    assert (worker["name"], worker["done"]) == ("inline", 5)
    assert len(worker["running"]) == 1
    text = curate("status", run).out
    assert re.search(r"now: columns, 5 of 20 done, 1 running; .* rows/s, .* left, running", text)
    assert re.search(r"^inline +5 +0 +slow_scorers:Slow, part-\w+-00005 ", text, re.MULTILINE)

    running.kill()
    running.wait()
    assert read_live(run), "its file is still there"
    result = curate("status", run)
    assert result.code == 0
    assert "now:" not in result.out
    assert "in use by" not in result.out
    assert json.loads(curate("status", run, "--json").out)["now"] == []


@pytest.fixture
def idle(curate: Curate, config: Config, tmp_path: Path) -> Path:
    """A run that needs no model, at which nobody works."""
    path = config(score={"scorers": []}, plan={"keep": 0.5, "order": "easiest"})
    assert curate("index", path).code == 0
    return tmp_path / "run"


@contextlib.contextmanager
def working(run: Path) -> Generator[Event]:
    """Somebody works there, in a thread that stands for another process, until the event is set."""
    begun, over = Event(), Event()

    def work() -> None:
        with locked(run, "run"), live(run, "columns", total=10_000) as tracker:
            while not over.wait(0.1):
                tracker.finished("part-1", "w", 0.1, {"rows": 10})
                begun.set()

    thread = Thread(target=work)
    thread.start()
    try:
        assert begun.wait(60)
        yield over
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def looked_at(run: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """Somebody works there until three looks have shown that more is done."""
    real, told = jobs.status.at_work, set[int]()

    def at_work(root: Path) -> tuple[str | None, list[Live]]:
        owner, now = real(root)
        told.update(one.done for one in now)
        if len(told) > 2:
            over.set()
        return owner, now

    monkeypatch.setattr(jobs.status, "at_work", at_work)
    with working(run) as over:
        yield


def test_watching_tells_the_state_again_and_again_until_the_run_ends(
    curate: Curate, idle: Path, monkeypatch: pytest.MonkeyPatch
):
    with looked_at(idle, monkeypatch):
        result = curate("status", idle, "--watch", "--every", 0.3)
    assert result.code == 0
    assert "\x1b" not in result.out
    counts = [int(n.replace(",", "")) for n in re.findall(r"columns, ([\d,]+) of 1", result.out)]
    assert len(counts) >= 3
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]
    last = result.out.split("\n\n")[-1]
    assert "now:" not in last
    assert last.endswith("the run has ended\n")


def test_watching_as_json_is_one_document_a_line(
    curate: Curate, idle: Path, monkeypatch: pytest.MonkeyPatch
):
    with looked_at(idle, monkeypatch):
        result = curate("status", idle, "--watch", "--json", "--every", 0.3)
    looks = [json.loads(line) for line in result.out.splitlines()]
    assert len(looks) >= 3
    assert all((look["schema_version"], look["command"]) == (1, "status") for look in looks)
    assert looks[0]["now"][0]["stage"] == "columns"
    assert (looks[-1]["in_use_by"], looks[-1]["now"]) == (None, [])


def test_on_a_terminal_the_page_is_drawn_anew_and_the_last_one_stays(idle: Path):
    with working(idle) as over:
        command = [sys.executable, "-m", "curate", "status", str(idle), "--watch", "--every", "0.5"]

        def look(seen: bytes) -> None:
            if seen.count(b"of 10,000 done") > 2:
                over.set()

        seen, code = on_a_terminal(command, columns=100, look=look)
    assert code == 0
    assert "━" in seen
    assert len(re.findall("of 10,000 done", seen)) >= 2
    assert "\x1b[1A" in seen, "the cursor goes up"
    assert "the run has ended" in seen.split("\x1b[2K")[-1]


def test_ctrl_c_ends_watching_with_130(idle: Path):
    command = [sys.executable, "-m", "curate", "status", str(idle), "--watch"]
    with locked(idle, "run"):
        watcher = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert watcher.stdout is not None
        assert watcher.stdout.readline().startswith("run ")
        watcher.send_signal(signal.SIGINT)
        assert watcher.wait() == 130
        assert watcher.communicate()[1].startswith("error: interrupted")


def on_a_terminal(
    command: list[str], *, columns: int, look: Callable[[bytes], None], **more: str
) -> tuple[str, int]:
    """What a command shows on a terminal of its own, and its exit code; `look` sees it grow."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", **more}
    for name in ("NO_COLOR", "COLUMNS", "LINES"):
        environment.pop(name, None)
    process = subprocess.Popen(command, stdout=follower, stderr=follower, env=environment | more)
    os.close(follower)
    seen = bytearray()
    with contextlib.suppress(OSError):  # how a terminal ends on Linux
        while chunk := os.read(leader, 4096):
            seen += chunk
            look(bytes(seen))
    os.close(leader)
    return seen.decode(), process.wait()


def test_watching_a_run_that_nobody_runs_ends_at_once(curate: Curate, idle: Path):
    result = curate("status", idle, "--watch")
    assert result.code == 0
    assert result.out.endswith("nobody works in it now\n")
    assert json.loads(curate("status", idle, "--watch", "--json").out)["now"] == []


@pytest.fixture
def seen(tmp_path: Path) -> Status:
    """A stage of 1,000 partitions on two workers, half of it done."""
    with live(tmp_path, "score", total=1_001, skipped=100, workers=2) as tracker:
        for i in range(400):
            tracker.finished(f"part-{i}", f"tcp://10.0.0.1:{i % 2}", 3.0, {"rows": 5_000})
        tracker.started("part-\x1b[31mred", "tcp://10.0.0.1:0")
        tracker.failed("part-7", "tcp://10.0.0.1:1", "its line\nbreaks")
        values = tracker.values()
        values["recent"]["time"] = values["started"] = time.time() - 600
        (tmp_path / ".live" / "score.json").write_text(json.dumps(values))
        now = read_live(tmp_path)
    stage = StageStatus(stage="score", done=500, failed=0, remaining=500, finished=None, why=())
    return Status(run="run", in_use_by="pid 1 on here", now=now, stages=[stage], set_aside={})


def test_the_page_tells_rates_times_and_workers_in_words(seen: Status):
    text = "\n".join(status_lines(seen))
    assert (
        "now: score, 500 of 1,001 done, 1 running, 1 failed; 3,333 rows/s, 12 min 30 s left,"
        " running for 10 min" in text.replace("12 min 31 s", "12 min 30 s")
    )
    assert "tcp://10.0.0.1:0   200       0  part-\\x1b[31mred    0 s   1,667" in text
    assert "failed: part-7 on tcp://10.0.0.1:1: its line\\nbreaks" in text
    assert "\x1b" not in text


def test_a_stage_without_rows_has_no_rates(seen: Status):
    tasks = [replace(w, rows_per_second=None, tokens_per_second=None) for w in seen.now[0].workers]
    bare = replace(seen.now[0], rows_per_second=None, workers=tuple(tasks), detail="step 3 of 9")
    text = "\n".join(status_lines(replace(seen, now=[bare])))
    assert "rows/s" not in text
    assert "tokens/s" not in text
    assert re.search("12 min 3[01] s left", text)
    assert "\n  step 3 of 9\n" in text


def test_a_thousand_workers_do_not_fill_the_page(seen: Status):
    idle = replace(seen.now[0].workers[0], running=(), running_seconds=None)
    workers = [replace(idle, name=f"w{i:04d}") for i in range(1_000)] + [seen.now[0].workers[0]]
    crowd = replace(seen, now=[replace(seen.now[0], workers=tuple(workers))])
    lines = list(status_lines(crowd, paint=plain, most=10))
    assert len(lines) < 25
    assert any(line.startswith("tcp://10.0.0.1:0") for line in lines), "those at work come first"
    assert "and 991 more workers (--json has them all)" in lines


def test_of_another_process_nothing_is_told(idle: Path):
    """A file that a process left which died is not of the one that holds the folder now."""
    with live(idle, "score", total=2) as tracker:
        (idle / ".live" / "old.json").write_text(json.dumps({**tracker.values(), "process": -1}))
        with locked(idle, "run"):
            assert [one.process for one in run_status(idle).now] == [os.getpid()]
    assert read_live(idle)[0].process == -1
    assert run_status(idle).now == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.7, "1 min"), (61, "1 min 1 s"), (3_600, "1 h"), (7_500, "2 h 5 min"),
     (200_000, "2 d 7 h"), (-3, "0 s")],
)  # fmt: skip
def test_times_are_told_in_their_two_largest_units(seconds: float, text: str):
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (12_340.4, "12,340"),
        (99.96, "100"),
        (23.4, "23"),
        (9.54, "9.5"),
        (0.0214, "0.021"),
        (None, ""),
    ],
)
def test_rates_have_two_digits_or_more(rate: float | None, text: str):
    assert rate_text(rate) == text
