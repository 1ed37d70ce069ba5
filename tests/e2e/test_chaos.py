"""Workers are killed every few seconds and the scheduler twice: the same bytes, nothing twice."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import pytest
from e2e.small_run import ROOT, bytes_of, command, environment, finished, write_config

PARTITIONS = 300
WORKERS = 4
SECONDS_BETWEEN_KILLS = 4.0
SCHEDULER_DIES_AT = (50, 170)
"""Score tables that are there when it does."""
HERE = Path(__file__).parent


def surroundings(notes: Path) -> dict[str, str]:
    paths = os.pathsep.join([str(HERE), str(ROOT)])
    return {
        **environment(),
        "PYTHONPATH": paths,
        "CHAOS_NOTES": str(notes),
        # Every death is told to us; Dask tries nothing again by itself.
        "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0",
    }


def write_settings(folder: Path, data: Path, name: str, **cluster: Any) -> Path:
    values = {
        "run": str(folder / name),
        "seed": 5,
        "sources": {"files": {"path": str(data), "text": "text"}},
        "index": {"held_out": 0.0},
        "score": {"scorers": ["chaos_scorer:Noted"]},
        "cluster": cluster,
    }
    return write_config(folder / f"{name}.yaml", values)


@dataclass
class Chaos:
    """A scheduler and its workers, and what was done to them."""

    port: int
    notes: Path
    log: Path
    draw: random.Random = field(default_factory=lambda: random.Random(3))
    scheduler: subprocess.Popen[bytes] | None = None
    workers: subprocess.Popen[bytes] | None = None
    worker_kills: int = 0
    scheduler_kills: int = 0

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *arguments],
                stdout=log,
                stderr=log,
                env=surroundings(self.notes),
                start_new_session=True,
            )

    def start_scheduler(self) -> None:
        self.scheduler = self.start(
            "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port",
            str(self.port), "--no-dashboard",
        )  # fmt: skip

    def start_workers(self) -> None:
        self.workers = self.start(str(HERE / "chaos_workers.py"), self.address, str(WORKERS))

    def kill_a_worker(self) -> None:
        assert self.workers is not None
        alive = psutil.Process(self.workers.pid).children()
        if len(alive) == WORKERS:
            with suppress(psutil.NoSuchProcess):
                self.draw.choice(alive).kill()
                self.worker_kills += 1

    def kill_the_scheduler(self) -> None:
        assert self.scheduler is not None
        os.killpg(self.scheduler.pid, signal.SIGKILL)
        self.scheduler.wait()
        self.scheduler_kills += 1
        self.start_scheduler()

    def end(self) -> None:
        for process in (self.workers, self.scheduler):
            if process is not None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture
def chaos(tmp_path: Path) -> Generator[Chaos]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = Chaos(port, tmp_path / "notes", tmp_path / "cluster.log")
    yield found
    found.end()


def scored(run: Path) -> int:
    return sum(1 for _ in (run / "scores" / "Noted").glob("*.parquet"))


def tables(run: Path) -> dict[Path, tuple[int, int]]:
    """Every finished table -> what changes when it is made again."""
    folders = (run / name for name in ("examples", "scores"))
    return {path: facts for folder in folders for path, facts in finished(folder).items()}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_same_bytes_though_workers_and_scheduler_are_killed(tmp_path: Path, chaos: Chaos):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(PARTITIONS):
        texts = ["x" * (100 + number), *(f"text {number} {row} " * (row + 1) for row in range(4))]
        pl.DataFrame({"text": texts}).write_parquet(data / f"{number:03d}.parquet")
    chaos.start_scheduler()
    chaos.start_workers()
    run = tmp_path / "chaos"
    config = write_settings(tmp_path, data, "chaos", kind="address", address=chaos.address)
    codes: list[int] = []
    kept: list[dict[Path, tuple[int, int]]] = []
    client_log = tmp_path / "client.log"
    while not codes or codes[-1] == 75:
        assert len(codes) < 10, client_log.read_text()
        with client_log.open("ab") as log:
            client = subprocess.Popen(
                command("score", config), stdout=log, stderr=log, env=surroundings(chaos.notes)
            )
        last = time.monotonic()
        while client.poll() is None:
            time.sleep(0.1)
            if time.monotonic() > last + SECONDS_BETWEEN_KILLS and run.is_dir():
                last = time.monotonic()
                kept.append(tables(run))
                chaos.kill_a_worker()
            done = chaos.scheduler_kills
            if done < len(SCHEDULER_DIES_AT) and scored(run) >= SCHEDULER_DIES_AT[done]:
                chaos.kill_the_scheduler()
        codes.append(client.returncode)
    assert codes == [75, 75, 0], client_log.read_text()
    assert chaos.scheduler_kills == 2
    assert chaos.worker_kills >= 3

    # What was finished at any time was never made again.
    end = tables(run)
    for before in kept:
        assert all(end.get(path) == facts for path, facts in before.items())
    counts = Counter(chaos.notes.read_text().split())
    assert set(counts) == {str(100 + number) for number in range(PARTITIONS)}
    again = sum(counts.values()) - PARTITIONS
    assert again <= chaos.worker_kills + WORKERS * chaos.scheduler_kills

    inline = write_settings(tmp_path, data, "inline", kind="inline")
    environment_of = surroundings(tmp_path / "other-notes")
    done = subprocess.run(
        command("score", inline), capture_output=True, text=True, env=environment_of
    )
    assert done.returncode == 0, done.stderr
    folders = ("examples", "scores")
    assert bytes_of(run, *folders) == bytes_of(tmp_path / "inline", *folders)
    assert not (run / "failures").exists()
    print(f"{chaos.worker_kills} workers and 2 schedulers killed, {again} partitions scored again")
