"""`curate diff`: two runs, or two folders of shards, and what is different about them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import curate as package

Curate = Callable[..., Any]
"""Runs a command: code, out, err."""
Config = Callable[..., Path]
"""Writes settings."""


def plan_of(run: Path) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(path) for path in sorted((run / "plan").glob("*.parquet"))])


@pytest.fixture
def first(curate: Curate, config: Config, tmp_path: Path) -> Path:
    assert curate("run", config(), "-q").code == 0
    return tmp_path / "run"


@pytest.fixture
def second(curate: Curate, config: Config, data: Path, tmp_path: Path, first: Path) -> Path:
    """The same settings but for `keep`, on data with a row before all others, an edit and a file
    of its own, cut into other partitions."""
    folder = tmp_path / "more"
    folder.mkdir()
    frame = pl.read_parquet(data)
    texts = ["a new first row", *frame["text"].to_list()]
    texts[-1] = "edited \x1b[31m text"
    shutil.copy(data, folder / "data.parquet")
    pl.DataFrame({"text": texts, "label": [0] * 41}).write_parquet(folder / "data.parquet")
    pl.DataFrame({"text": ["another file"], "label": [0]}).write_parquet(folder / "new.parquet")
    settings = config(
        "second.yaml",
        run=str(tmp_path / "second"),
        sources={"a": {"path": str(folder), "text": "text"}},
        plan={"score": "random", "keep": 0.25},
        index={"partition_rows": 9},
    )
    assert curate("run", settings, "-q").code == 0
    return tmp_path / "second"


def test_a_run_and_its_copy_are_the_same_in_one_line(curate: Curate, first: Path, tmp_path: Path):
    shutil.copytree(first, tmp_path / "copy")
    result = curate("diff", first, tmp_path / "copy")
    kept = plan_of(first)["keep"].sum()
    assert (result.code, result.err) == (0, "")
    assert result.out == f"the same: both plans keep the same {kept} examples in the same way\n"
    shards = curate("diff", first / "shards", tmp_path / "copy")
    assert shards.out == f"the same: both shards hold the same {kept} examples in the same way\n"


def test_two_runs_differ_by_inputs_settings_and_plan(curate: Curate, first: Path, second: Path):
    result = curate("diff", first, second, "--json")
    found = json.loads(result.out)
    assert (result.code, found["command"], found["kind"], found["same"]) == (
        0, "diff", "plans", False,
    )  # fmt: skip
    # The edited row has moved too, so that nothing tells whose edition it is.
    assert found["examples"] == {"same": 0, "moved": 39, "changed": 0, "added": 3, "removed": 1}
    files = {entry["file"]: (entry["a"], entry["b"], entry["same"]) for entry in found["files"]}
    assert files == {"data.parquet": (40, 41, 0), "new.parquet": (0, 1, 0)}
    assert {"key": "plan.keep", "a": 0.5, "b": 0.25} in found["settings"]
    assert not any(entry["key"] == "run" for entry in found["settings"])
    before, after = plan_of(first), plan_of(second)
    assert found["totals"]["a"]["kept"] == before["keep"].sum()
    assert found["totals"]["b"]["kept"] == after["keep"].sum()
    assert found["kept"]["both"] + found["kept"]["only_a"] == before["keep"].sum()
    assert sum(entry["rows"] for entry in found["reasons"]) == 39 + 3 + 1


def test_kept_in_both_is_told_by_the_contents(
    curate: Curate, first: Path, second: Path, tmp_path: Path
):
    def kept_texts(run: Path, data: Path) -> set[str]:
        kept = plan_of(run).filter("keep")
        texts = {file.name: pl.read_parquet(file)["text"] for file in data.glob("*.parquet")}
        return {texts[row["file"]][row["row"]] for row in kept.to_dicts()}

    a = kept_texts(first, tmp_path)
    b = kept_texts(second, tmp_path / "more")
    found = json.loads(curate("diff", first, second, "--json").out)
    assert found["kept"] == {
        "both": len(a & b),
        "only_a": len(a - b),
        "only_b": len(b - a),
    }
    assert 0 < len(a & b) < len(a)


def test_examples_are_shown_on_one_line_without_control_characters(
    curate: Curate, first: Path, second: Path
):
    result = curate("diff", first, second, "--examples", 50)
    assert result.code == 0
    assert "\x1b" not in result.out
    assert "another file" in result.out
    assert "moved: 39" in result.out
    assert "from data.parquet:0" in result.out
    assert len(result.out.splitlines()) < 250
    few = curate("diff", first, second, "--examples", 0).out
    assert "another file" not in few
    assert "plan.keep" in few


def test_shards_without_runs_are_compared_by_files_and_rows(
    curate: Curate, first: Path, second: Path, tmp_path: Path
):
    for name, run in (("one", first), ("two", second)):
        shutil.copytree(run / "shards", tmp_path / "alone" / name)
    result = curate("diff", tmp_path / "alone/one", tmp_path / "alone/two", "--json")
    found = json.loads(result.out)
    keys = [
        {tuple(row) for row in plan_of(run).filter("keep").select("source", "file", "row").rows()}
        for run in (first, second)
    ]
    assert (result.code, found["kind"]) == (0, "shards")
    assert found["kept"] == {
        "both": len(keys[0] & keys[1]),
        "only_a": len(keys[0] - keys[1]),
        "only_b": len(keys[1] - keys[0]),
    }
    told = curate("diff", tmp_path / "alone/one", tmp_path / "alone/two").out
    assert "files: 0 the same, 1 changed" in told
    assert "text number" in told


def test_the_same_is_told_in_python(curate: Curate, first: Path, second: Path):
    told = json.loads(curate("diff", first, second, "--json", "--examples", 1).out)
    found = package.diff(first, str(second), examples=1)
    assert {key: value for key, value in asdict(found).items() if key != "shown"} == {
        key: told[key] for key in asdict(found) if key != "shown"
    }
    assert [len(shown) for shown in found.shown.values()] == [1] * len(found.shown)


def test_what_cannot_be_compared_is_told(curate: Curate, first: Path, tmp_path: Path):
    result = curate("diff", first, tmp_path / "absent")
    assert result.code == 3
    assert "there is no folder" in result.err
    (tmp_path / "empty").mkdir()
    result = curate("diff", first, tmp_path / "empty")
    assert result.code == 3
    assert "no complete plan and no shards" in result.err


def test_shards_without_keys_are_compared_by_rows_not_by_examples(
    curate: Curate, config: Config, first: Path, tmp_path: Path
):
    settings = config(
        "lines.yaml",
        run=str(tmp_path / "lines"),
        plan={"score": "random", "keep": 0.25},
        shards={"format": "jsonl"},
    )
    assert curate("run", settings, "-q").code == 0
    told = curate("diff", first / "shards", tmp_path / "lines/shards").out
    assert "rows have keys in Parquet shards only" in told
    assert "kept" not in told.replace("only files and counts", "")
    assert "effective" not in told
    found = json.loads(curate("diff", first / "shards", tmp_path / "lines/shards", "--json").out)
    assert (found["keyed"], found["kept"], found["examples"]) == (False, {}, {})
    rows = {"a": plan_of(first)["copies"].sum(), "b": plan_of(tmp_path / "lines")["copies"].sum()}
    assert {side: entry["copies"] for side, entry in found["totals"].items()} == rows
    same = curate("diff", tmp_path / "lines/shards", tmp_path / "lines/shards").out
    assert same.startswith(f"the same: both shards hold the same {rows['b']} rows\n")
