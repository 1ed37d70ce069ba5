"""Tasks that fail for good: set aside with traceback and input, told, and run again alone."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import polars as pl
import pytest
from torch import Tensor

from curate.cli import main
from curate.config import STRICT, to_yaml
from curate.data.layout import RunFolder
from jobs.run_failures import (
    SetAside,
    failures_folder,
    forget_failures,
    inputs_of,
    keep_failure,
    kept_failures,
)

FILES = 6
ROWS = 5


@dataclass(frozen=True)
class Picky:
    """The length in characters; fails on the partitions whose texts have a length in `bad`."""

    __pydantic_config__: ClassVar = STRICT

    needs: ClassVar[frozenset[str]] = frozenset({"num_chars"})
    columns: ClassVar[Mapping[str, str]] = {"picky": "characters"}
    bad: ClassVar[set[int]] = set()
    seen: ClassVar[list[int]] = []

    def score(self, quantities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        length = int(quantities["num_chars"][0])
        self.seen.append(length)
        if length in self.bad:
            raise ZeroDivisionError(f"length {length} is no good")
        return {"picky": quantities["num_chars"]}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Settings of a run: file number i has texts of 10 + i characters."""
    data = tmp_path / "data"
    data.mkdir()
    for number in range(FILES):
        texts = [str(row) * (10 + number) for row in range(ROWS)]
        pl.DataFrame({"text": texts}).write_parquet(data / f"{number}.parquet")
    values = {
        "run": str(tmp_path / "run"),
        "sources": {"files": {"path": str(data), "text": "text"}},
        "index": {"held_out": 0.0},
        "score": {"scorers": [f"{__name__}:Picky"]},
        "plan": {"score": "picky", "keep": 0.5},
    }
    (tmp_path / "config.yaml").write_text(to_yaml(values))
    Picky.bad, Picky.seen[:] = set(), []
    return tmp_path / "run"


Curate = Callable[..., tuple[int, str]]


@pytest.fixture
def curate(capsys: pytest.CaptureFixture[str]) -> Curate:
    def call(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        code = main([str(each) for each in arguments])
        return code, capsys.readouterr().err

    return call


def test_some_fail_the_rest_goes_on_and_just_those_are_run_again(run: Path, curate: Curate):
    Picky.bad = {11, 14}
    code, told = curate("run", run.parent / "config.yaml")
    assert code == 4
    assert "columns: 2 of 6 tasks failed" in told
    assert "ZeroDivisionError: length 1" in told
    assert "plan and write did not run: they need all of what score makes" in told
    assert f"`curate score {run} --retry-failed`" in told
    assert len(Picky.seen) == FILES
    assert len(list((run / "scores" / "Picky").glob("*.parquet"))) == FILES - 2

    files = sorted(failures_folder(run, "columns").iterdir())
    assert len(files) == 2
    text = files[0].read_text()
    assert "ZeroDivisionError: length 1" in text
    assert 'raise ZeroDivisionError(f"length' in text, "the line of the traceback"
    assert f"source files, file {1}.parquet" in text or "file 4.parquet" in text
    assert "rows 0 to 4" in text

    # Meanwhile another table is lost: it is due, but has not failed.
    Picky.bad = {14}
    Picky.seen.clear()
    code, told = curate("score", run, "--retry-failed")
    assert code == 4
    assert sorted(Picky.seen) == [11, 14]
    assert len(list(failures_folder(run, "columns").iterdir())) == 1

    Picky.bad = set()
    Picky.seen.clear()
    code, told = curate("run", run.parent / "config.yaml", "--retry-failed")
    assert code == 0, told
    assert Picky.seen == [14]
    assert not (run / "failures").exists()
    assert not (run / "plan").exists(), "nothing else was asked for"

    Picky.seen.clear()
    code, told = curate("score", run, "--retry-failed")
    assert (code, Picky.seen) == (0, [])
    assert "nothing has failed" in told
    code, told = curate("run", run.parent / "config.yaml")
    assert (code, Picky.seen) == (0, [])
    assert (run / "shards" / "manifest.json").exists()


def test_what_was_not_run_at_all_is_left_out_of_the_retry_and_said(run: Path, curate: Curate):
    Picky.bad = {11}
    curate("score", run.parent / "config.yaml")
    parts = RunFolder(run).partitions()
    lost = next(part for part in parts if part.file == "3.parquet")
    RunFolder(run).scores(lost, "Picky").remove()
    Picky.bad = set()
    Picky.seen.clear()
    code, told = curate("score", run, "--retry-failed")
    assert Picky.seen == [11]
    assert code == 75
    assert "1 task beside had not run yet" in told
    assert f"run `curate score {run}`" in told
    code, told = curate("score", run)
    assert (code, Picky.seen) == (0, [11, 13])


def test_where_all_tasks_fail_the_code_is_that_of_their_error(run: Path, curate: Curate):
    Picky.bad = set(range(100))
    code, told = curate("score", run.parent / "config.yaml")
    assert code == 1
    assert "this is a bug in curate, or in a method of your own" in told
    assert len(list(failures_folder(run, "columns").iterdir())) == FILES


def failed(root: Path, name: str, payload: Mapping[str, Any] | None = None) -> SetAside:
    return SetAside("the phase: 1", name, payload or {}, root / "out", ValueError("no\nway"),
                    "Traceback: x\n", "w-1", 2)  # fmt: skip


def test_any_name_has_a_file_of_its_own_and_comes_back_as_it_was(tmp_path: Path):
    names = ["a/b", "a-b", "a b", "ü" * 200, "ü" * 199 + "u", "../../x", "line\nbreak", ".hidden"]
    for name in names:
        keep_failure(tmp_path, failed(tmp_path, name))
    assert kept_failures(tmp_path) == {"the phase: 1": frozenset(names)}
    assert {path.parent for path in tmp_path.rglob("*.txt")} == {
        failures_folder(tmp_path, "the phase: 1")
    }
    forget_failures(tmp_path, "the phase: 1", but={"a b"})
    assert kept_failures(tmp_path) == {"the phase: 1": frozenset({"a b"})}
    forget_failures(tmp_path, "the phase: 1")
    assert not (tmp_path / "failures").exists()


def test_the_input_is_told_in_a_line_each_however_long_it_is(tmp_path: Path):
    part = {"source": "web", "file": "a.parquet", "first_row": 100, "num_rows": 50,
            "address": "s3://b/a.parquet"}  # fmt: skip
    payload = {"settings": {"x": 1}, "partition": part, "fingerprint": "f", "list": ["x" * 1000]}
    told = inputs_of(payload)
    assert told[0] == ("source web, file a.parquet, rows 100 to 149, read from s3://b/a.parquet")
    assert told[1].startswith('list ["xxx')
    assert len(told) == 2
    assert all(len(line) < 400 for line in told)
    keep_failure(tmp_path, failed(tmp_path, "t", payload))
    (path,) = failures_folder(tmp_path, "the phase: 1").iterdir()
    lines = path.read_text().splitlines()
    assert json.loads(lines[1].removeprefix("task: ")) == "t"
    assert "error: ValueError: no way" in lines
    assert "attempts: 2, the last on w-1" in lines
