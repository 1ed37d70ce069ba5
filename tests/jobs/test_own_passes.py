"""Phases of scorers that measure by passes of their own."""

from pathlib import Path
from typing import Any

import pytest

from curate.data.partitions import Output
from curate.errors import CurateError, TryAgainError
from jobs.cluster import Cluster, Pool, open_pool
from jobs.own_passes import DrivenPhase, OwnPasses, Phase, run_phases
from jobs.run import Listener, Progress, Task, ignore, run_tasks


def write(payload: dict[str, Any]) -> dict[str, Any]:
    if payload.get("breaks"):
        raise CurateError("no", fix="none")
    output = Output(Path(payload["path"]))
    output.write(lambda path: path.write_text("x"), payload["fingerprint"])
    return {}


def task(root: Path, name: str, **more: Any) -> Task:
    output = Output(root / name)
    payload = {"path": str(output.path), "fingerprint": "1", **more}
    return Task(name, payload, output, "1")


def test_a_failed_phase_stops_the_later_ones_of_its_scorer_only(tmp_path: Path):
    broken = OwnPasses(
        (
            Phase("one", [task(tmp_path, "a"), task(tmp_path, "b", breaks=True)], write),
            Phase("two", [task(tmp_path, "c")], write),
        ),
        (("one", 0),),
    )
    whole = OwnPasses((Phase("three", [task(tmp_path, "d")], write),), (("three", 0),))
    with open_pool(Cluster()) as pool:
        found = run_phases({"broken": broken, "whole": whole}, pool=pool, listener=ignore)
    assert found.keys() == {"one", "three"}
    assert list(found["one"].failures) == ["b"]
    assert not (tmp_path / "c").exists()
    assert (tmp_path / "a").exists()
    assert (tmp_path / "d").exists()


def test_phases_that_are_done_are_skipped(tmp_path: Path):
    passes = OwnPasses((Phase("one", [task(tmp_path, "a")], write),), ())
    with open_pool(Cluster()) as pool:
        run_phases({"own": passes}, pool=pool, listener=ignore)
        again = run_phases({"own": passes}, pool=pool, listener=ignore)
    assert again["one"].skipped == ["a"]
    assert not again["one"].done


def drive(payload: dict[str, Any], pool: Pool, listener: Listener) -> dict[str, Any]:
    """Hands out a task of its own first."""
    if payload.get("lost"):
        raise TryAgainError("the cluster went away", fix="again")
    inner = task(Path(payload["path"]).parent / "inner", "x")
    run_tasks("inner", [inner], write, pool=pool, listener=listener)
    return write(payload)


def test_a_driven_phase_hands_out_tasks_of_its_own(tmp_path: Path):
    passes = OwnPasses((DrivenPhase("one", [task(tmp_path, "a")], drive),), ())
    told: list[Progress] = []
    with open_pool(Cluster()) as pool:
        found = run_phases({"own": passes}, pool=pool, listener=told.append)
        again = run_phases({"own": passes}, pool=pool, listener=told.append)
    assert found["one"].done == ["a"]
    assert again["one"].skipped == ["a"]
    assert [(one.stage, one.done, one.total) for one in told] == [("inner", 1, 1), ("one", 1, 1)]
    assert (tmp_path / "inner" / "x").exists()


def test_a_driven_phase_that_fails_stops_the_later_ones(tmp_path: Path):
    tasks = [task(tmp_path, "a", breaks=True), task(tmp_path, "b")]
    passes = OwnPasses(
        (DrivenPhase("one", tasks, drive), Phase("two", [task(tmp_path, "c")], write)), ()
    )
    with open_pool(Cluster()) as pool:
        found = run_phases({"own": passes}, pool=pool, listener=ignore)
    assert found.keys() == {"one"}
    assert list(found["one"].failures) == ["a"]
    assert found["one"].done == ["b"]
    assert not (tmp_path / "c").exists()


def test_a_lost_cluster_ends_a_driven_phase_at_once(tmp_path: Path):
    passes = OwnPasses((DrivenPhase("one", [task(tmp_path, "a", lost=True)], drive),), ())
    with open_pool(Cluster()) as pool, pytest.raises(TryAgainError):
        run_phases({"own": passes}, pool=pool, listener=ignore)
