"""kill -9 at random moments of every stage, then again until done: nothing lost, the same bytes."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from e2e.small_run import (
    bytes_of,
    command,
    curate,
    environment,
    finished,
    settings,
    write_config,
    write_inputs,
)
from killed import found

RESULT = ("plan", "shards")

# What a stage writes into while it runs.
STAGES = {
    "index": ("examples", "quarantine"),
    "tokenizer": ("tokenizer",),
    "train": ("checkpoints",),
    "score": ("quantities", "scores", "lengths"),
    "mix": ("mixtures",),
    "plan": ("plan",),
    "write": ("shards",),
}


def files_in(run: Path, stage: str) -> int:
    return found(run, *(f"{folder}/**/*" for folder in STAGES[stage]))


def start(config: Path) -> subprocess.Popen[bytes]:
    """A whole run in a process group of its own, so that all of it can be killed at once."""
    with config.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            command("run", config),
            stdout=subprocess.DEVNULL,
            stderr=log,
            env=environment(),
            start_new_session=True,
        )


def kill_in_stage(config: Path, run: Path, stage: str, draw: random.Random) -> bool:
    """Start the run and kill it once `stage` has written a random number of files.

    Returns:
        Whether the kill came before the end.
    """
    before = files_in(run, stage)
    wanted = before + draw.randint(1, 6)
    process = start(config)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if files_in(run, stage) >= wanted:
            time.sleep(draw.uniform(0, 0.05))
            break
        time.sleep(0.002)
    if process.poll() is not None:
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True


def kept_as_they_were(before: dict[Path, Any], after: dict[Path, Any]) -> bool:
    return all(after.get(path) == facts for path, facts in before.items())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder / "data")
    return folder / "data"


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    curate("run", write_config(folder / "c.yaml", settings(inputs, folder / "run")))
    return bytes_of(folder / "run", *RESULT)


def kill_and_resume(
    folder: Path, inputs: Path, *, kills: int, seed: int, cluster: dict[str, Any]
) -> tuple[list[str], list[dict[str, str]]]:
    """Kill runs in every stage in turn until enough kills have hit.

    Returns:
        The stages that were hit, and the bytes of each run that came to its end.
    """
    draw = random.Random(seed)
    hit: list[str] = []
    ended: list[dict[str, str]] = []
    attempt = 0
    while len(hit) < kills:
        attempt += 1
        run = folder / f"run-{attempt}"
        config = write_config(folder / f"{attempt}.yaml", settings(inputs, run, cluster=cluster))
        for stage in STAGES:
            before = finished(run)
            if kill_in_stage(config, run, stage, draw):
                hit.append(stage)
            after = finished(run)
            assert kept_as_they_were(before, after), f"redone after a kill in {stage}"
        before = finished(run)
        curate("run", config)
        assert kept_as_they_were(before, finished(run))
        ended.append(bytes_of(run, *RESULT))
        assert not list(run.rglob("*.tmp")), "left behind by a kill"
    return hit, ended


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_in_every_stage_and_resumed_inline(
    inputs: Path, undisturbed: dict[str, str], tmp_path: Path
):
    hit, ended = kill_and_resume(tmp_path, inputs, kills=16, seed=1, cluster={"kind": "inline"})
    assert set(hit) >= {"index", "train", "score", "plan", "write"}
    for seen in ended:
        assert seen == undisturbed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_in_every_stage_and_resumed_on_dask(
    inputs: Path, undisturbed: dict[str, str], tmp_path: Path
):
    hit, ended = kill_and_resume(
        tmp_path, inputs, kills=6, seed=2, cluster={"kind": "local", "workers": 2}
    )
    assert len(hit) >= 6
    for seen in ended:
        assert seen == undisturbed


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_dask_worker_that_dies_in_the_middle_costs_no_more_than_its_partitions(
    inputs: Path, undisturbed: dict[str, str], tmp_path: Path
):
    run = tmp_path / "run"
    config = write_config(
        tmp_path / "c.yaml", settings(inputs, run, cluster={"kind": "local", "workers": 2})
    )
    process = start(config)
    killed: list[int] = []
    for stage in ("index", "score"):
        while process.poll() is None and files_in(run, stage) < 6:
            time.sleep(0.005)
        assert process.poll() is None, config.with_suffix(".log").read_text()
        workers = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if "spawn_main" in " ".join(child.cmdline())
        ]
        before = finished(run)
        workers[0].kill()
        killed.append(workers[0].pid)
        time.sleep(0.3)
        assert kept_as_they_were(before, finished(run))
    assert process.wait(timeout=200) == 0, config.with_suffix(".log").read_text()
    assert len(killed) == 2
    assert bytes_of(run, *RESULT) == undisturbed
