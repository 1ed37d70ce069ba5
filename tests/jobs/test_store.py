"""Tasks of a run in a store: what they bring to where they run, and what comes back."""

import importlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from curate.data.mirror import attach, copy_for, with_addresses
from curate.data.mirror_copy import Mirror
from curate.data.mirror_lock import holding
from curate.data.partitions import Output
from curate.errors import ConfigError, InputError, RunFolderError
from jobs.live import live
from jobs.nesting import refuse_nesting
from jobs.run import Task
from jobs.settings import parse_settings
from jobs.status import at_work
from jobs.store import OnCopy, at_hand, here, holding_store, is_run_at, on_copies

ONE, TWO = "part-0123456789-00000", "part-0123456789-00001"


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    monkeypatch.setenv("CURATE_SCRATCH", str(tmp_path / "scratch"))
    found = copy_for(f"memory://{uuid.uuid4().hex}/run")
    yield found
    fsspec.filesystem("memory").rm("/", recursive=True)


def write(root: Path, *names: str) -> None:
    for name in names:
        Output(root / name).write(lambda path: path.write_text("x"), "f")


def names(mirror: Mirror) -> set[str]:
    """What of the data the copy has here."""
    files = {p.relative_to(mirror.root).as_posix() for p in mirror.root.rglob("*") if p.is_file()}
    return {name for name in files if ".done/" not in name}


def work(payload: dict[str, Any]) -> dict[str, Any]:
    """Reads what is there, and writes past the primitives too."""
    root = Path(payload["root"])
    seen = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.parquet"))
    write(root, f"scores/{payload['name']}.parquet")
    (root / "plain.txt").write_text("plain")
    return {"seen": seen}


def moved(mirror: Mirror, place: Path, do: Any) -> tuple[OnCopy, Mirror]:
    """The work as it is on another machine, with a working copy of its own."""
    root = place / "elsewhere.copy" / "run"
    there = attach(root, mirror.address)
    return OnCopy(do, str(root), mirror.address, mirror.identity, uuid.uuid4().hex), there


def test_work_on_another_machine_finds_all_tables_and_sends_what_it_writes(
    mirror: Mirror, tmp_path: Path
):
    write(mirror.root, f"examples/{ONE}.parquet", f"quantities/m/{TWO}.parquet", "shards/a.parquet",
          "examples/data/s/b.jsonl.parquet")  # fmt: skip
    do, there = moved(mirror, tmp_path, work)
    receipt = do({"root": str(there.root), "name": ONE})
    assert receipt["seen"] == [f"examples/{ONE}.parquet", f"quantities/m/{TWO}.parquet"]
    mirror.refresh()
    mirror.bring(lambda _: True)
    assert Output(mirror.root / f"scores/{ONE}.parquet").is_done("f")
    assert (mirror.root / "plain.txt").read_text() == "plain"


def test_work_on_partitions_brings_their_tables_and_what_is_of_none(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write(mirror.root, f"examples/{ONE}.parquet", f"examples/{TWO}.parquet",
          "checkpoints/seed-0/model.safetensors")  # fmt: skip
    monkeypatch.setattr("jobs.store._OF_PARTITIONS", {f"{__name__}.work"})
    do, there = moved(mirror, tmp_path, work)
    payload = {"root": str(there.root), "name": "x", "partition": {"name": TWO}}
    assert do(payload)["seen"] == [f"examples/{TWO}.parquet"]
    assert "checkpoints/seed-0/model.safetensors" in names(there)


def test_the_client_gets_what_other_machines_have_made(mirror: Mirror, tmp_path: Path):
    output = Output(mirror.root / f"scores/{ONE}.parquet")
    tasks = [Task(ONE, {}, output, "f")]
    with on_copies(work, tasks) as wrapped:
        assert isinstance(wrapped, OnCopy)
        do, there = moved(mirror, tmp_path, work)
        do({"root": str(there.root), "name": ONE})
        assert not output.is_done("f")
    assert output.is_done("f")
    assert output.path.read_text() == "x"


def test_runs_on_this_machine_are_left_alone(tmp_path: Path):
    with on_copies(work, [Task("a", {}, Output(tmp_path / "a"), "f")]) as same:
        assert same is work
    with holding_store(tmp_path):
        assert list(tmp_path.iterdir()) == []
    assert at_hand(tmp_path) == tmp_path


def test_looking_brings_documents_first_and_shards_only_when_asked(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write(mirror.root, "config.yaml", "plan/a.parquet", "shards/data/a.parquet", "shards/README.md")
    assert is_run_at(mirror.address)
    assert not is_run_at(mirror.address + "x")
    monkeypatch.setenv("CURATE_SCRATCH", str(tmp_path / "fresh"))
    there = copy_for(mirror.address)
    assert at_hand(mirror.address, data=False) == there.root
    assert names(there) == {"config.yaml", "shards/README.md"}
    at_hand(Path(mirror.address))  # a Path has lost a slash
    assert names(there) == {"config.yaml", "shards/README.md", "plan/a.parquet"}
    at_hand(mirror.address, shards=True)
    assert "shards/data/a.parquet" in names(there)
    with pytest.raises(InputError, match="there is nothing at memory://"):
        at_hand("memory://nowhere/run")


def test_a_place_that_holds_something_else_is_refused(mirror: Mirror):
    fsspec.filesystem("memory").pipe(f"{mirror.address}/holiday.jpg", b"x")
    with (
        pytest.raises(RunFolderError, match=r"holds no run of curate \(it has holiday\.jpg\)"),
        holding_store(mirror.root),
    ):
        pass
    assert fsspec.filesystem("memory").cat(f"{mirror.address}/holiday.jpg") == b"x"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("memory://data", "lies in its own data"),
        ("memory://data/**/*.parquet", "lies in its own data"),
        ("memory://data/run/shards", "lies in the run folder memory://data/run"),
        ("memory://data/other", ""),
        ("s3://data", ""),
    ],
)
def test_a_run_must_not_lie_in_its_own_data_in_a_store_either(mirror: Mirror, path: str, said: str):
    values = {"run": "memory://data/run", "sources": {"s": {"path": path}}}
    settings = here(parse_settings(values))
    assert settings.run.endswith(".copy/run")
    if not said:
        refuse_nesting(settings)
        return
    with pytest.raises(ConfigError, match=said):
        refuse_nesting(settings)


def test_a_glance_tells_who_works_and_on_what_on_another_machine(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write(mirror.root, "config.yaml")
    monkeypatch.setattr("curate.data.mirror_lock.BEAT_SECONDS", 0.02)
    with holding(mirror), live(mirror.root, "score", total=3, skipped=1, workers=1) as tracker:
        tracker.started(ONE, "w")
        monkeypatch.setenv("CURATE_SCRATCH", str(tmp_path / "fresh"))
        address, end = Path(mirror.address), time.monotonic() + 10
        owner, now = at_work(address)
        while not now and time.monotonic() < end:
            owner, now = at_work(address)
        assert f"pid {os.getpid()} on " in (owner or "")
        assert [(each.stage, each.total, each.skipped) for each in now] == [("score", 3, 1)]
    assert at_work(address) == (None, [])
    assert not list(copy_for(mirror.address).root.glob(".live/*"))


def test_messages_name_the_address_and_not_the_working_copy(mirror: Mirror):
    said = with_addresses(f"{mirror.root}/plan is missing; run `curate plan {mirror.root}`")
    assert said == f"{mirror.address}/plan is missing; run `curate plan {mirror.address}`"


def test_work_that_reads_its_own_partitions_alone_is_there_by_its_name():
    from jobs.store import _OF_PARTITIONS  # pyright: ignore[reportPrivateUsage]

    for address in _OF_PARTITIONS:
        module, _, name = address.rpartition(".")
        found = getattr(importlib.import_module(module), name)
        assert f"{found.__module__}.{found.__qualname__}" == address
