"""Tasks that sleep and write, and a client of a Dask cluster that runs many of them.

Both run in processes of their own, for the benchmarks of clusters:

    python -m scale_tasks SCHEDULER_FILE SCHEDULER_PID FOLDER COUNT SECONDS
"""

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from curate.data.partitions import Output
from jobs.cluster import Cluster, open_pool
from jobs.run import Task, run_tasks
from jobs.run_place import Place, at_work

SETTINGS = {f"section_{i}": {f"setting_{j}": j for j in range(12)} for i in range(12)}
"""As large as those that every real task carries."""


def sleep_and_write(payload: dict[str, Any]) -> dict[str, Any]:
    """Takes its time, writes a small file and its mark, as every task does."""
    time.sleep(payload["seconds"])
    output = Output(Path(payload["path"]))
    output.write(lambda path: path.write_text(payload["name"]), payload["fingerprint"], rows=1_000)
    return {"rows": 1_000, "num_tokens": 128_000}


def sleeping_tasks(folder: Path, count: int, seconds: float) -> list[Task]:
    """Tasks of equal length, a file each, a thousand to a folder."""
    found: list[Task] = []
    for number in range(count):
        name = f"part-{number:07d}"
        output = Output(folder / f"{number // 1_000:04d}" / f"{name}.txt")
        payload = {
            "settings": SETTINGS,
            "name": name,
            "path": str(output.path),
            "fingerprint": "f",
            "seconds": seconds,
        }
        found.append(Task(name, payload, output, "f"))
    return found


class Peak:
    """The largest resident memory of this process, looked at ten times a second."""

    def __init__(self) -> None:
        self.mb = 0.0
        self._process = psutil.Process()
        threading.Thread(target=self._look, daemon=True).start()

    def now(self) -> float:
        self.mb = max(self.mb, mb := self._process.memory_info().rss / 1e6)
        return mb

    def _look(self) -> None:
        while True:
            self.now()
            time.sleep(0.1)


def cpu_seconds(pid: int) -> float:
    """Of all threads of a process."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def run_client(
    scheduler_file: Path, pid: int, folder: Path, count: int, seconds: float
) -> dict[str, float]:
    """Run the tasks; CPU seconds of this process and the scheduler's while they run, and memory."""
    settings = Cluster(kind="scheduler-file", scheduler_file=str(scheduler_file))
    with open_pool(settings) as pool:
        # What is loaded with the first task is not a cost of each.
        run_tasks("warm", sleeping_tasks(folder / "warm", 16, 0.0), sleep_and_write, pool=pool)
        peak = Peak()
        before, wall = peak.now(), time.monotonic()
        cpu, scheduler_cpu = time.process_time(), cpu_seconds(pid)
        with at_work(Place(root=folder, stage="score", command="none")):
            tasks = sleeping_tasks(folder / "out", count, seconds)
            outcome = run_tasks("score", tasks, sleep_and_write, pool=pool)
        assert len(outcome.done) == count, outcome.failures
        return {
            "wall": time.monotonic() - wall,
            "cpu": time.process_time() - cpu,
            "scheduler_cpu": cpu_seconds(pid) - scheduler_cpu,
            "before_mb": before,
            "peak_mb": peak.mb,
        }


if __name__ == "__main__":
    from scale_tasks import run_client  # workers find the task by the module's own name

    scheduler, process, place, number, length = sys.argv[1:]
    facts = run_client(Path(scheduler), int(process), Path(place), int(number), float(length))
    print(json.dumps(facts))
