"""What is tried on another worker and what is not, on workers that are real processes."""

import errno
import os
import signal
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from curate.data.partitions import Output
from curate.data.pulse import beat
from curate.errors import CurateError, InputError, OutputError
from jobs.cluster import Cluster, Pool, open_pool
from jobs.run import Outcome, Task, run_tasks
from jobs.run_failures import failures_folder
from jobs.run_place import Place, at_work

STALL = 3.0


def work(payload: dict[str, Any]) -> dict[str, Any]:
    """Does what its payload says, notes who tried it, and writes its name."""
    path = Path(payload["path"])
    tried = path.with_suffix(".tried")
    before = tried.read_text().split() if tried.exists() else []
    with tried.open("a") as file:
        file.write(f"{os.getpid()}\n")
    match payload.get("does"), len(before):
        case "bad", _:
            raise InputError("row 3 is bad", fix="mend it")
        case "bug", _:
            raise LockedError("a bug", 7)
        case "once", 0:
            raise ValueError("what now")
        case "mount", _ if not before or str(os.getpid()) in before:
            raise FileNotFoundError(errno.ENOENT, "no such mount", "/mnt/data/x.parquet")
        case "scratch", 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/elsewhere/scratch.bin")
        case "full", _:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        case "die", _:
            time.sleep(0.7)  # it is known by then that the worker is at work on it
            os._exit(1)
        case "stop", 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        case "sleep", 0:
            time.sleep(600)
        case "slow", _:
            for _ in range(14):
                time.sleep(STALL / 7)
                beat()
        case _:
            pass
    Output(path).write(lambda to: to.write_text(payload["name"]), "f", rows=1)
    return {"rows": 1}


class LockedError(Exception):
    """One that does not survive pickling, as many do not."""

    def __init__(self, what: str, number: int) -> None:
        super().__init__(what)
        self.number = number


@pytest.fixture(scope="module")
def pool() -> Generator[Pool]:
    with open_pool(Cluster(kind="local", workers=2)) as pool:
        yield pool


def run(folder: Path, pool: Pool, stall: float = 0.0, **does: str) -> Outcome:
    tasks: list[Task] = []
    for name in "abcdef":
        path = folder / "out" / f"{name}.txt"
        path.parent.mkdir(exist_ok=True)
        payload = {"name": name, "path": str(path), "does": does.get(name)}
        tasks.append(Task(name, payload, Output(path), "f"))
    place = Place(root=folder, stage="score", command="curate score R", stall_seconds=stall)
    with at_work(place):
        return run_tasks("s", tasks, work, pool=pool)


def tries(folder: Path, name: str) -> list[str]:
    """Processes that tried a task."""
    return (folder / "out" / f"{name}.tried").read_text().split()


def test_a_fault_of_one_worker_is_tried_on_the_other(tmp_path: Path, pool: Pool):
    outcome = run(tmp_path, pool, b="mount", d="once", e="scratch")
    assert sorted(outcome.done) == list("abcdef")
    assert len(tries(tmp_path, "b")) >= 2
    assert len(set(tries(tmp_path, "b"))) == 2, "by two processes"
    assert len(tries(tmp_path, "d")) == 2
    assert len(tries(tmp_path, "e")) == 2
    assert not (tmp_path / "failures").exists()


def test_the_worker_on_which_a_task_failed_does_not_get_it_again(tmp_path: Path, pool: Pool):
    outcome = run(tmp_path, pool, 0.0, **dict.fromkeys("abcdef", "mount"))
    assert sorted(outcome.done) == list("abcdef")
    # Dask may still move one that waits; by chance alone half of the tries would fail again.
    assert sum(len(tries(tmp_path, name)) for name in "abcdef") <= 13


def test_bad_data_is_tried_once_and_what_is_unknown_twice(tmp_path: Path, pool: Pool):
    outcome = run(tmp_path, pool, b="bad", d="bug")
    assert sorted(outcome.done) == list("acef")
    assert len(tries(tmp_path, "b")) == 1
    assert len(set(tries(tmp_path, "d"))) == 2
    assert isinstance(outcome.failures["b"], InputError)
    assert "LockedError: a bug" in str(outcome.failures["d"])
    text = (failures_folder(tmp_path, "s") / "d.txt").read_text()
    assert "attempts: 2, the last on worker-" in text
    assert 'raise LockedError("a bug", 7)' in text, "the traceback of the worker"


def test_what_only_waited_at_a_worker_that_died_is_not_held_responsible(
    tmp_path: Path, pool: Pool, caplog: pytest.LogCaptureFixture
):
    outcome = run(tmp_path, pool, b="die")
    assert sorted(outcome.done) == list("acdef")
    assert len(tries(tmp_path, "b")) == 3
    lost = [text for text in caplog.messages if "lost its worker" in text]
    assert lost == ["s: b lost its worker, trying again"] * 2
    pool.client.wait_for_workers(2, timeout=30)


def test_a_full_disk_of_the_run_stops_the_stage(tmp_path: Path, pool: Pool):
    with pytest.raises(OutputError, match="No space left"):
        run(tmp_path, pool, a="full")
    assert len(tries(tmp_path, "a")) == 1


@pytest.mark.parametrize("how", ["stop", "sleep"])
def test_a_worker_that_hangs_is_restarted_and_its_task_tried_elsewhere(
    tmp_path: Path, pool: Pool, how: str, caplog: pytest.LogCaptureFixture
):
    began = time.monotonic()
    outcome = run(tmp_path, pool, STALL, b=how)
    assert time.monotonic() - began > STALL
    assert sorted(outcome.done) == list("abcdef")
    assert len(tries(tmp_path, "b")) == 2
    assert "nothing moved on" in caplog.text
    assert len(pool.client.scheduler_info()["workers"]) >= 1
    pool.client.wait_for_workers(2, timeout=30)


def test_a_slow_task_that_moves_on_is_left_alone(tmp_path: Path, pool: Pool):
    began = time.monotonic()
    outcome = run(tmp_path, pool, STALL, b="slow")
    assert time.monotonic() - began > 2 * STALL * 0.9
    assert sorted(outcome.done) == list("abcdef")
    assert len(tries(tmp_path, "b")) == 1


def test_a_task_that_always_hangs_is_set_aside(tmp_path: Path, pool: Pool):
    (tmp_path / "out").mkdir()
    hang = Task("h", {"name": "h", "path": str(tmp_path / "out" / "h.txt"), "does": None},
                Output(tmp_path / "out" / "h.txt"), "f")  # fmt: skip
    place = Place(root=tmp_path, stage="score", command="curate score R", stall_seconds=1)
    with at_work(place):
        outcome = run_tasks("s", [hang], sleep_always, pool=pool)
    assert isinstance(outcome.failures["h"], CurateError)
    assert "nothing moved on" in str(outcome.failures["h"])
    pool.client.wait_for_workers(2, timeout=30)


def sleep_always(_: dict[str, Any]) -> dict[str, Any]:
    time.sleep(600)
    return {}
