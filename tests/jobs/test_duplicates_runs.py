"""`duplicates` as a run: restarts, kills, workers, the command line and the shards."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from killed import is_killed, run_to_end

from curate.config import plain, to_yaml
from curate.data.example import KEY
from curate.data.layout import RunFolder
from curate.errors import InputError
from jobs.cluster import Cluster, open_pool
from jobs.index import index_run
from jobs.plan import plan_run
from jobs.score import score_run
from tests.jobs.duplicates_pool import (
    COLUMN,
    INLINE,
    by_content,
    bytes_below,
    scored,
    sentence,
    settings_of,
    write,
    write_clouds,
    write_copies,
)


@pytest.fixture
def copies(tmp_path: Path) -> list[str]:
    return write_copies(tmp_path)


@pytest.fixture
def clouds(tmp_path: Path) -> np.ndarray:
    return write_clouds(tmp_path)


def test_a_run_goes_on_where_it_stopped_and_redoes_what_changed(
    tmp_path: Path, copies: list[str], monkeypatch: pytest.MonkeyPatch
):
    settings = settings_of(tmp_path, method="near")
    whole = scored(settings_of(tmp_path, "whole", method="near"))
    index_run(settings, pool=INLINE)
    from jobs import duplicates_groups

    def broken(_: Any) -> Any:
        raise InputError("the power fails", fix="wait")

    monkeypatch.setattr(duplicates_groups, "groups_work", broken)
    with pytest.raises(InputError, match="power fails"):
        score_run(settings, pool=INLINE)
    assert not list(Path(settings.run).glob("scores/duplicates/*.parquet"))
    monkeypatch.undo()
    times = {p: p.stat().st_mtime_ns for p in Path(settings.run).glob("duplicates/*/*")}
    assert scored(settings).equals(whole)
    assert all(path.stat().st_mtime_ns == when for path, when in times.items())
    assert bytes_below(Path(settings.run)) == bytes_below(tmp_path / "whole")
    # A new file: texts of the others are not read again.
    write(tmp_path / "b" / "two.parquet", [copies[0], sentence(999)])
    found = scored(settings)
    assert found["duplicate_keep"].to_list() == [*whole["duplicate_keep"], 0, 1]
    kept = [p for p in times if "texts/part" in p.as_posix()]
    assert kept
    assert all(path.stat().st_mtime_ns == times[path] for path in kept)
    for folder in ("duplicates/texts", "duplicates"):  # may be removed once the scores are there
        shutil.rmtree(Path(settings.run) / folder)
        assert score_run(settings, pool=INLINE)["done"] == 0


def test_soft_weights_count_a_group_as_one_example(tmp_path: Path, copies: list[str]):
    plan = {"weights": {"score": "duplicate_weight"}}
    settings = settings_of(tmp_path, more={"plan": plan})
    scored(settings)
    plan_run(settings, pool=INLINE)
    run = RunFolder(Path(settings.run))
    table = pl.concat([pl.read_parquet(run.planned(p).path) for p in run.partitions()]).sort(KEY)
    assert table["keep"].all()
    totals = {text: sum(table["weight"][row] for row in own)
              for text, own in by_content(copies).items()}  # fmt: skip
    assert len(totals) == 54
    assert list(totals.values()) == pytest.approx([60 / 54] * 54, rel=1e-5)


def command_of(root: Path, settings: dict[str, Any], *, name: str = "run") -> list[str]:
    config = root / "c.yaml"
    config.write_text(to_yaml(settings))
    return [sys.executable, "-m", "curate", name, str(config)]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def shard_texts(run: Path) -> list[str]:
    return sorted(t for p in run.glob("shards/**/*.parquet") for t in pl.read_parquet(p)["text"])


@pytest.mark.slow
def test_the_command_line_leaves_planted_copies_out(tmp_path: Path, copies: list[str]):
    values = {
        "run": str(tmp_path / "run"),
        "sources": {n: {"path": str(tmp_path / n), "text": "text"} for n in ("a", "b")},
        "index": {"held_out": 0.0, "partition_rows": 8},
        "score": {"scorers": ["duplicates"]},
        "plan": {"drop": "duplicate_keep == 0"},
    }
    done = subprocess.run(
        command_of(tmp_path, values), check=True, capture_output=True, text=True, env=ENVIRONMENT
    )
    assert "6 of 60 training examples repeat another one, in 4 groups" in done.stdout + done.stderr
    assert "6 were dropped first" in done.stdout
    assert shard_texts(tmp_path / "run") == sorted(set(copies))
    summary = json.loads((tmp_path / "run" / "plan" / "summary.json").read_text())
    assert summary["dropped"]["rows"] == summary["reasons"]["dropped"] == 6


@pytest.mark.slow
def test_a_table_of_another_tool_drops_its_duplicates(tmp_path: Path, copies: list[str]):
    """A tool that names only what it would remove, by the user's own ids."""
    for name, start, end in (("a/one", 0, 25), ("a/two", 25, 40), ("b/one", 40, 60)):
        write(
            tmp_path / f"{name}.parquet", copies[start:end], n=[str(n) for n in range(start, end)]
        )
    places = by_content(copies)
    removed = [str(row) for own in places.values() for row in own[1:]]
    table = pl.DataFrame({"id": removed, "is_duplicate": [True] * len(removed)})
    table.write_parquet(tmp_path / "theirs.parquet")
    values = {
        "run": str(tmp_path / "run"),
        "sources": {n: {"path": str(tmp_path / n), "text": "text", "id": "n"} for n in ("a", "b")},
        "index": {"held_out": 0.0},
        "score": {"scorers": [{"external": {"theirs": str(tmp_path / "theirs.parquet")}}]},
        "plan": {"drop": "is_duplicate"},
    }
    subprocess.run(command_of(tmp_path, values), check=True, capture_output=True, env=ENVIRONMENT)
    assert shard_texts(tmp_path / "run") == sorted(set(copies))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["near", "semantic"])
def test_two_workers_write_the_bytes_of_one_process(
    tmp_path: Path, clouds: np.ndarray, method: str
):
    options: dict[str, Any] = {"method": method, "cells": 4}
    scored(settings_of(tmp_path, more=COLUMN, **options))
    settings = settings_of(tmp_path, "dask", more=COLUMN, **options)
    with open_pool(Cluster(kind="local", workers=2)) as workers:
        scored(settings, workers)
    assert bytes_below(tmp_path / "dask") == bytes_below(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["texts", "pairs"])
def test_a_run_that_is_killed_and_started_again_gives_the_same_bytes(
    tmp_path: Path, copies: list[str], moment: str
):
    settings = settings_of(tmp_path, "whole", method="near")
    scored(settings)
    killed = tmp_path / "killed"
    values = plain(replace(settings, run=str(killed)))
    command = command_of(tmp_path, values, name="score")
    assert is_killed(command, (killed / "duplicates" / moment).exists)
    assert not list(killed.glob("scores/duplicates/*.parquet"))
    run_to_end(command)
    assert bytes_below(killed) == bytes_below(tmp_path / "whole")
