"""Signals, a full disk, a closed pipe: one message, the right exit code, and nothing lost."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import polars as pl
import pytest

from curate.cli import main
from curate.errors import Interrupted

Config = Callable[..., Path]
"""Writes settings."""

SLOW = """
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

@dataclass(frozen=True)
class Slow:
    needs: ClassVar = frozenset({"uniform"})
    columns: ClassVar = {"slow": "a number that takes its time"}

    def score(self, quantities):
        time.sleep(0.2)
        return {"slow": quantities["uniform"]}
"""


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "curate", *map(str, arguments)]


@pytest.fixture
def slow_config(
    config: Config, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Settings with twenty partitions and a scorer that waits a little in each."""
    (tmp_path / "slow_scorers.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return config(
        index={"partition_rows": 2, "held_out": 0},
        score={"scorers": ["slow_scorers:Slow"]},
        plan={"keep": 0.5},
    )


def start_and_wait(config: Path, tmp_path: Path, *options: str) -> subprocess.Popen[str]:
    """A run that has scored at least one partition."""
    events = tmp_path / "events.jsonl"
    process = subprocess.Popen(
        command("run", config, "--events", events, *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    limit = time.monotonic() + 120
    while time.monotonic() < limit and process.poll() is None:
        if events.exists() and '"columns"' in events.read_text():
            return process
        time.sleep(0.05)
    process.kill()
    raise AssertionError(process.communicate())


def wait_for(condition: Callable[[], bool], *, seconds: float = 20) -> bool:
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.1)
    return condition()


def is_alive(group: int) -> bool:
    """Whether any process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "stopped by SIGTERM"),
        (signal.SIGUSR1, 75, "stopped by SIGUSR1"),
    ],
)
def test_a_signal_stops_with_its_code_and_a_rerun_goes_on(
    slow_config: Path, tmp_path: Path, number: signal.Signals, code: int, word: str
):
    process = start_and_wait(slow_config, tmp_path)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert out == ""
    assert err.endswith(
        f"error: {word}\n  fix: run the same command again to go on; what was finished is kept\n"
    )
    assert "Traceback" not in err
    finished = {
        path.name: path.stat().st_mtime_ns
        for path in (tmp_path / "run" / "scores").glob("*/part-*.parquet")
    }
    assert 0 < len(finished) < 20
    again = subprocess.run(command("run", slow_config, "--json"), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["stages"]["write"]["rows"] == 20
    for path in (tmp_path / "run" / "scores").glob("*/part-*.parquet"):
        assert path.stat().st_mtime_ns == finished.get(path.name, path.stat().st_mtime_ns)
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_ctrl_c_on_a_terminal_reaches_the_workers_too_and_stops_them_all(
    slow_config: Path, tmp_path: Path
):
    process = start_and_wait(slow_config, tmp_path, "--workers", "2")
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.endswith("error: interrupted\n  fix: run the same command again to go on;"
                        " what was finished is kept\n")  # fmt: skip
    assert "Traceback" not in err
    assert wait_for(lambda: not is_alive(process.pid)), "a worker was left behind"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["doctor", "--influence", "200"], "it keeps nothing"),
        (["train", "x"], "what was finished is kept"),
    ],
)
def test_a_command_that_keeps_nothing_does_not_claim_otherwise(
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def stopped(_: object) -> int:
        raise Interrupted(143)

    monkeypatch.setattr("curate.cli.signal.signal", lambda *_: None)
    monkeypatch.setattr("curate.cli._run", stopped)
    assert main(arguments) == 143
    assert capsys.readouterr().err.endswith(words + "\n")


def test_a_run_in_progress_is_named_to_others(slow_config: Path, tmp_path: Path):
    process = start_and_wait(slow_config, tmp_path)
    try:
        other = subprocess.run(command("index", slow_config), capture_output=True, text=True)
        assert other.returncode == 5
        assert f"{tmp_path / 'run'} is in use by another process (pid {process.pid} on" in (
            other.stderr
        )
        status = subprocess.run(command("status", tmp_path / "run"), capture_output=True, text=True)
        assert status.returncode == 0
        assert f"in use by pid {process.pid} on" in status.stdout
    finally:
        process.kill()
        process.communicate()


def run_with(arguments: Sequence[str], limit_bytes: int | None) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    return subprocess.run(arguments, capture_output=True, text=True, preexec_fn=limit)


@contextlib.contextmanager
def tiny_disk(folder: Path, kilobytes: int) -> Generator[None]:
    """A file system of its own; skips where it may not be made."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("a tiny file system can be mounted by root only")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def wide_config(config: Config, data: Path) -> Path:
    """Data whose shards are larger than the limits below; the texts do not compress."""
    texts = [os.urandom(20_000).hex() for _ in range(40)]
    pl.DataFrame({"text": texts}).write_parquet(data)
    return config(index={"held_out": 0})


def test_a_full_disk_is_told_and_nothing_is_lost(wide_config: Path, tmp_path: Path):
    disk = tmp_path / "disk"
    with tiny_disk(disk, 300):
        full = run_with(command("run", wide_config, "--out", disk / "run"), None)
        assert full.returncode == 1
        assert full.stdout == ""
        assert "No space left on device" in full.stderr
        assert str(disk / "run" / "shards") in full.stderr
        assert "fix: free some space" in full.stderr
        assert "Traceback" not in full.stderr
        subprocess.run(["mount", "-o", "remount,size=9000k", str(disk)], check=True)
        again = run_with(command("run", wide_config, "--out", disk / "run", "--json"), None)
        assert again.returncode == 0, again.stderr
        document = json.loads(again.stdout)
        assert document["stages"]["plan"]["done"] == 0, "the plan was kept"
        assert document["stages"]["write"]["rows"] == 20


def test_a_file_that_may_not_grow_is_told_in_the_same_way(wide_config: Path, tmp_path: Path):
    full = run_with(command("run", wide_config), 200_000)
    assert full.returncode == 1
    assert "shards" in full.stderr
    assert "File too large" in full.stderr
    assert "Traceback" not in full.stderr
    again = run_with(command("run", wide_config, "--json"), None)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["stages"]["plan"]["done"] == 0


def test_a_reader_that_goes_away_is_no_error(config: Config, tmp_path: Path):
    path = config()
    assert subprocess.run(command("run", path, "-q"), capture_output=True).returncode == 0
    # The pipe is closed before anything is written.
    read, write = os.pipe()
    os.close(read)
    try:
        shown = subprocess.run(
            command("show", tmp_path / "run"), stdout=write, stderr=subprocess.PIPE, text=True
        )
    finally:
        os.close(write)
    assert shown.returncode == 141
    assert shown.stderr == ""
