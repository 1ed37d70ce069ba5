"""What a cluster adds: two workers against one, and the cost of many tasks and many workers.

    CURATE_BENCH_SCALE=full python -m pytest tests/benchmarks/test_cluster_scale.py -s -o addopts=

Without `CURATE_BENCH_SCALE=full` everything is a tenth as large, for a look. `CURATE_BENCH_FIGURE`
names the SVG that is drawn. The scheduler, each worker and the client are processes of their own;
what they cost is their CPU time, which other work on the machine hardly changes.

Simulated tasks sleep, then write a file and its mark as real ones do, through the real
`jobs.run.run_tasks`. Sleeping takes no CPU, so that eight workers can be tried on two cores, as
long as the tasks are not so short that their writing fills both.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import pytest

from curate.data.layout import RunFolder
from jobs.cluster import Cluster, InlineExecutor, Pool, open_pool
from jobs.index import index_run
from jobs.measurers import measurers
from jobs.measuring import measure_work, measuring_tasks
from jobs.run import run_tasks
from jobs.settings import Settings, parse_settings

IS_FULL = os.environ.get("CURATE_BENCH_SCALE") == "full"
FIGURE = os.environ.get("CURATE_BENCH_FIGURE", "")
ROUNDS = 3 if IS_FULL else 1
GOAL_TWO = 1.9
GOAL_SHARE = 0.01
LENGTHS = (10.0, 30.0)
"""Seconds of work in a realistic task."""

HERE = Path(__file__).parents[1]


# Two workers against one


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Texts of 80 to 120 bytes with classes, and a classifier of 0.8 M parameters."""
    from tiny_models import save_classifier

    root = tmp_path_factory.mktemp("texts")
    rows, part = (6_000, 400) if IS_FULL else (800, 50)
    draws = np.random.default_rng(0)
    words = np.array(["the", "market", "rose", "in", "a", "game", "of", "two", "halves", "today"])
    lines = [" ".join(draws.choice(words, 22)) for _ in range(rows)]
    frame = pl.DataFrame({"text": lines, "label": draws.integers(0, 4, rows)})
    frame.write_parquet(root / "data.parquet")
    model = save_classifier(
        root / "model", num_labels=4, hidden_size=128, intermediate_size=512, num_hidden_layers=4,
        max_position_embeddings=128,
    )  # fmt: skip
    settings = parse_settings(
        {
            "run": str(root / "run"),
            "sources": {
                "a": {"path": str(root / "data.parquet"), "text": "text", "label": "label"}
            },
            "task": {"kind": "text-classification", "num_classes": 4, "max_tokens": 128},
            "index": {"partition_rows": part, "held_out": 0},
            "model": {"name": str(model)},
            "score": {"scorers": ["el2n"]},
        }
    )
    index_run(settings, pool=Pool(InlineExecutor(), 1))
    return settings


def test_two_workers_score_almost_twice_as_fast(texts: Settings):
    """Rows per second once each worker has its model, one thread each."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(ROUNDS):
        for workers in rates:
            rates[workers].append(scored_per_second(texts, workers))
    one, two = (statistics.median(rates[workers]) for workers in (1, 2))
    print("\n| workers | rows/s (median) | of all rounds | beside one worker |")
    print("| ---: | ---: | --- | ---: |")
    for workers, rate in ((1, one), (2, two)):
        every = ", ".join(f"{each:.0f}" for each in rates[workers])
        print(f"| {workers} | {rate:.1f} | {every} | {rate / one:.2f} |")
    print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    if IS_FULL:
        assert two / one >= GOAL_TWO


def scored_per_second(settings: Settings, workers: int) -> float:
    """Rows of el2n's pass per second of wall time; start and loading of the model left out."""
    run = RunFolder(Path(settings.run))
    shutil.rmtree(run.root / "quantities", ignore_errors=True)
    tasks = measuring_tasks(settings, measurers(settings))
    sizes = {part.name: part.num_rows for part in run.partitions()}
    with open_pool(Cluster(kind="local", workers=workers)) as pool:
        first = 1
        # On each of them, so that none loads torch while the clock runs.
        pool.client.run(measure_work, tasks[0].payload)
        start = time.monotonic()
        outcome = run_tasks("score", tasks[first:], measure_work, pool=pool)
        wall = time.monotonic() - start
    assert not outcome.failures
    return sum(sizes[task.payload["partition"]["name"]] for task in tasks[first:]) / wall


# Simulated tasks


@dataclass
class Machines:
    """A scheduler, by its file and its process."""

    file: Path
    scheduler: psutil.Process

    def mb(self) -> float:
        return self.scheduler.memory_info().rss / 1e6


@contextmanager
def cluster(folder: Path, workers: int) -> Generator[Machines]:
    """Processes of their own, as a cluster has them."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "scheduler.json"
    paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        # As our own schedulers have it; Dask keeps a thousand messages to each worker, and wakes
        # fifty times a second.
        "DASK_DISTRIBUTED__ADMIN__LOW_LEVEL_LOG_LENGTH": "100",
        "DASK_DISTRIBUTED__ADMIN__TICK__INTERVAL": "500ms",
        "DASK_DISTRIBUTED__ADMIN__SYSTEM_MONITOR__INTERVAL": "5s",
    }
    quiet: dict[str, Any] = {"env": environment, "stdout": subprocess.DEVNULL,
                             "stderr": subprocess.DEVNULL}  # fmt: skip
    module = "distributed.cli.dask_scheduler"
    command = [sys.executable, "-m", module, "--port", "0", "--no-dashboard", "--host", "127.0.0.1"]
    started = [subprocess.Popen([*command, "--scheduler-file", str(file)], **quiet)]
    try:
        limit = time.monotonic() + 60
        while not file.exists():
            assert time.monotonic() < limit
            time.sleep(0.1)
        command = [sys.executable, "-m", "distributed.cli.dask_worker", "--nthreads", "1",
                   "--no-dashboard", "--no-nanny", "--scheduler-file", str(file),
                   "--local-directory", str(folder)]  # fmt: skip
        started += [subprocess.Popen(command, **quiet) for _ in range(workers)]
        wait_for(file, workers)
        yield Machines(file, psutil.Process(started[0].pid))
    finally:
        for process in started[::-1]:
            process.terminate()
        for process in started:
            process.wait()


def wait_for(file: Path, workers: int) -> None:
    from distributed import Client

    with Client(scheduler_file=str(file)) as client:
        client.wait_for_workers(workers, timeout=120)


@dataclass(frozen=True)
class Cost:
    """One run of the client."""

    workers: int
    tasks: int
    length: float
    wall: float
    client_cpu: float
    scheduler_cpu: float
    client_mb: float
    client_grew_mb: float
    scheduler_mb: float

    @property
    def share(self) -> float:
        """Of the time that the workers were kept busy."""
        return (self.client_cpu + self.scheduler_cpu) / (self.tasks * self.length)

    @property
    def speed(self) -> float:
        """Tasks per second times their length: workers' worth of work."""
        return self.tasks * self.length / self.wall


def run_client(machines: Machines, folder: Path, workers: int, tasks: int, length: float) -> Cost:
    """Tasks through `run_tasks`, in a client of its own."""
    folder.mkdir(parents=True)
    facts = (machines.file, machines.scheduler.pid, folder, tasks, length)
    command = [sys.executable, "-m", "scale_tasks", *map(str, facts)]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found = json.loads(told.stdout)
    shutil.rmtree(folder)
    return Cost(workers, tasks, length, found["wall"], found["cpu"], found["scheduler_cpu"],
                found["peak_mb"], found["peak_mb"] - found["before_mb"], machines.mb())  # fmt: skip


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> list[Cost]:
    """Workers times lengths of tasks, a quarter of a minute each, or a few seconds."""
    root = tmp_path_factory.mktemp("costs")
    seconds = 15.0 if IS_FULL else 4.0
    lengths = (0.1, 0.5, 2.0, 10.0) if IS_FULL else (0.2, 1.0)
    found: list[Cost] = []
    for workers in (1, 2, 4, 8) if IS_FULL else (1, 4):
        with cluster(root / f"{workers}", workers) as machines:
            for length in lengths:
                count = max(workers, round(workers * seconds / length))
                folder = root / f"{workers}-{length}"
                found.append(run_client(machines, folder, workers, count, length))
    return found


def per_task_and_second(costs: Sequence[Cost]) -> tuple[float, float]:
    """CPU seconds of scheduler and client per task, and per second of wall time; least squares.

    Each run counts by its own size, or the longest ones alone would decide.
    """
    cpu = np.array([cost.client_cpu + cost.scheduler_cpu for cost in costs])
    facts = np.array([[cost.tasks, cost.wall] for cost in costs])
    weights = 1 / cpu[:, None]
    solved = np.linalg.lstsq(facts * weights, cpu * weights[:, 0], rcond=None)[0]
    return float(solved[0]), float(solved[1])


def test_the_scheduler_and_the_client_cost_less_than_a_hundredth_of_the_work(costs: list[Cost]):
    print("\n| workers | tasks | seconds each | workers' worth | scheduler ms a task"
          " | client ms a task | of the work |")  # fmt: skip
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for cost in costs:
        print(
            f"| {cost.workers} | {cost.tasks} | {cost.length:g} | {cost.speed:.2f}"
            f" | {1e3 * cost.scheduler_cpu / cost.tasks:.1f}"
            f" | {1e3 * cost.client_cpu / cost.tasks:.1f} | {100 * cost.share:.2f} % |"
        )
    task, second = per_task_and_second(costs)
    print(f"\nscheduler and client: {1e3 * task:.1f} ms of CPU a task and {1e3 * second:.1f} ms a"
          " second")  # fmt: skip
    for length in LENGTHS:
        for workers in (1, 8):
            share = task / length + second / workers
            print(f"tasks of {length:g} s on {workers} workers: {100 * share:.2f} % of the work")
    if FIGURE:
        draw(costs, Path(FIGURE))
    if IS_FULL:
        assert task / LENGTHS[0] + second / 8 < GOAL_SHARE


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> list[Cost]:
    """Tasks without any sleep: as many as the machine can take."""
    root = tmp_path_factory.mktemp("counts")
    with cluster(root / "cluster", 2) as machines:
        numbers = (100, 1_000, 10_000) if IS_FULL else (100, 1_000)
        return [run_client(machines, root / f"{n}", 2, n, 0.0) for n in numbers]


def test_memory_is_flat_in_the_number_of_partitions(counts: list[Cost]):
    print("\n| partitions | client peak MB | of that during the tasks | scheduler MB |"
          " CPU ms a task, client | scheduler | tasks/s |")  # fmt: skip
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for cost in counts:
        print(
            f"| {cost.tasks:,} | {cost.client_mb:.0f} | {cost.client_grew_mb:.0f}"
            f" | {cost.scheduler_mb:.0f} | {1e3 * cost.client_cpu / cost.tasks:.2f}"
            f" | {1e3 * cost.scheduler_cpu / cost.tasks:.2f} | {cost.tasks / cost.wall:.0f} |"
        )
    first, last = counts[0], counts[-1]
    assert last.client_mb < 1.25 * first.client_mb
    assert last.scheduler_mb < 1.25 * first.scheduler_mb
    # Nothing quadratic: a task costs the same among many.
    middle = counts[1]
    assert last.client_cpu / last.tasks < 2 * middle.client_cpu / middle.tasks
    assert last.scheduler_cpu / last.tasks < 2 * middle.scheduler_cpu / middle.tasks


def draw(costs: Sequence[Cost], path: Path) -> None:
    """Left, how many workers' worth of work is done; right, what scheduler and client take."""
    import altair as alt

    values = [
        {
            "workers": cost.workers,
            "length": f"{cost.length:g} s",
            "worth": round(cost.speed, 3),
            "share": round(100 * cost.share, 4),
        }
        for cost in costs
    ]
    order = list(dict.fromkeys(f"{cost.length:g} s" for cost in costs))
    data = alt.Chart(alt.Data(values=values))
    most = max(cost.workers for cost in costs)
    ideal = (
        alt.Chart(alt.Data(values=[{"workers": 1, "worth": 1}, {"workers": most, "worth": most}]))
        .mark_line(strokeDash=[4, 4], color="gray")
        .encode(x="workers:Q", y="worth:Q")
    )
    colour = alt.Color("length:N", sort=order, title="a task takes")
    ticks = alt.Axis(values=sorted({cost.workers for cost in costs}))
    speed = data.mark_line(point=True).encode(
        x=alt.X("workers:Q", axis=ticks, title="workers"),
        y=alt.Y("worth:Q", title="workers' worth of work done"),
        color=colour,
    )
    load = data.mark_line(point=True).encode(
        x=alt.X("workers:Q", axis=ticks, title="workers"),
        y=alt.Y(
            "share:Q", scale=alt.Scale(type="log"), title="scheduler and client, % of the work"
        ),
        color=colour,
    )
    goal = (
        alt.Chart(alt.Data(values=[{"share": 100 * GOAL_SHARE}]))
        .mark_rule(strokeDash=[4, 4], color="gray")
        .encode(y="share:Q")
    )
    size = {"width": 280, "height": 240}
    chart: Any = (ideal + speed).properties(**size) | (goal + load).properties(**size)
    path.parent.mkdir(parents=True, exist_ok=True)
    chart.save(str(path))
