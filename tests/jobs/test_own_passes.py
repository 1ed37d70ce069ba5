"""Phases of scorers that measure by passes of their own."""

from pathlib import Path
from typing import Any

from curate.data.partitions import Output
from curate.errors import CurateError
from jobs.cluster import Cluster, open_pool
from jobs.own_passes import OwnPasses, Phase, run_phases
from jobs.run import Task, ignore


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
