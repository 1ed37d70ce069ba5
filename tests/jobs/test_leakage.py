"""Leakage as part of a run: what is planted is found, reported and left out."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import curate
from curate.cli import main
from curate.config import to_yaml
from curate.data.example import KEY
from tests.jobs.lexical_pool import pool, score_bytes

DATA = os.environ.get("CURATE_DATA")
QUESTIONS = [" ".join(f"{letter}{number}" for number in range(26)) for letter in "pqrs"]
PLANTED = {
    3: QUESTIONS[0].upper().replace(" ", ", ") + "!",
    20: "before it. " + QUESTIONS[1] + " And after it.",
    41: " ".join(QUESTIONS[2].split()[:13]),
    77: " ".join(QUESTIONS[3].split()[:12]),
    130: "What is it?",
}
ANSWERS = ["What is it", "nothing that anybody has ever written anywhere before", "no", "two of it"]


def write_world(root: Path) -> None:
    """180 texts, five of them planted; two evaluation sets of four."""
    (root / "data").mkdir(parents=True)
    texts = pool()["text"].to_list()
    for row, text in PLANTED.items():
        texts[row] = text
    pl.DataFrame({"text": texts[:100]}).write_parquet(root / "data" / "one.parquet")
    pl.DataFrame({"text": texts[100:]}).write_parquet(root / "data" / "two.parquet")
    pl.DataFrame({"q": ANSWERS}).write_ndjson(root / "answers.jsonl")
    pl.DataFrame({"q": QUESTIONS, "a": ["yes"] * 4}).write_parquet(root / "questions.parquet")


def values_of(root: Path, run: str = "run", **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "run": str(root / run),
        "sources": {"web": {"path": str(root / "data"), "text": "text"}},
        "evaluation": {
            "answers": {"path": str(root / "answers.jsonl"), "text": "q"},
            "exam": {"path": str(root / "questions.parquet"), "prompt": "q", "response": "a"},
        },
        "index": {"held_out": 0.0, "partition_rows": 25},
        "score": {"scorers": ["leakage"]},
    }
    return values | changes


def run_command(command: str, root: Path, run: str = "run", **changes: Any) -> int:
    path = root / f"{run}.yaml"
    path.write_text(to_yaml(values_of(root, run, **changes)), encoding="utf-8")
    return main([command, str(path)])


def scores_of(root: Path, run: str = "run") -> pl.DataFrame:
    """Scores in the order of the input."""
    return curate.open(root / run).scores.sort("file", "row").collect()


def report_of(root: Path, run: str = "run") -> dict[str, Any]:
    return json.loads((root / run / "plan" / "leakage.json").read_text(encoding="utf-8"))


def test_planted_texts_are_found_and_nothing_else(tmp_path: Path):
    write_world(tmp_path)
    assert run_command("score", tmp_path) == 0
    scores = scores_of(tmp_path)
    columns = ["leakage", "leakage_exact", "leakage_set", "leakage_row"]
    found_rows = scores.select(*columns).rows()
    assert {row: values for row, values in enumerate(found_rows) if values[0] > 0} == {
        3: (1.0, 1.0, 1.0, 0.0),
        20: (1.0, 0.0, 1.0, 1.0),
        41: (0.5, 0.0, 1.0, 2.0),
        130: (1.0, 1.0, 0.0, 0.0),
    }
    assert scores["leakage_exact"].null_count() == 0
    assert scores["leakage_row"].null_count() == 176


def test_the_plan_says_what_is_kept_and_a_condition_leaves_it_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_world(tmp_path)
    assert run_command("run", tmp_path) == 0
    assert "of exam 3 of 4 (75.0 %) stand in what is kept" in capsys.readouterr().out
    card = (tmp_path / "run" / "shards" / "README.md").read_text(encoding="utf-8")
    assert "| exam | 4 | 3 (75.0 %) | 1 | 3 | 0 |" in card
    assert "as a whole: answers 3." in card
    report = report_of(tmp_path)
    nothing = {"rows": 0, "exact_rows": 0, "examples": 0, "exact_examples": 0}
    assert report["sets"]["exam"] == {
        "examples": 4,
        "short": 0,
        "template": 0,
        "kept": {"rows": 3, "exact_rows": 1, "examples": 3, "exact_examples": 1, "share": 0.75},
        "left_out": nothing,
    }
    assert report["sets"]["answers"]["short"] == 3
    assert report["sets"]["answers"]["kept"]["exact_rows"] == 1
    before = score_bytes(tmp_path, "run")
    assert run_command("run", tmp_path, plan={"drop": "leakage > 0.5"}) == 0
    assert score_bytes(tmp_path, "run") == before
    exam = report_of(tmp_path)["sets"]["exam"]
    assert exam["kept"]["rows"] == 1
    assert exam["left_out"] == {
        "rows": 2, "exact_rows": 1, "examples": 2, "exact_examples": 1
    }  # fmt: skip
    plan = curate.open(tmp_path / "run").plan.sort("file", "row").collect()
    assert plan.with_row_index().filter(~pl.col("keep"))["index"].to_list() == [3, 20, 130]
    assert set(plan.filter(~pl.col("keep"))["reason"]) == {"dropped"}


def test_a_report_that_no_longer_holds_goes_away(tmp_path: Path):
    write_world(tmp_path)
    assert run_command("run", tmp_path) == 0
    path = tmp_path / "run" / "plan" / "leakage.json"
    files = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]["plan"]["files"]
    assert "plan/leakage.json" in files
    stamp = path.stat().st_mtime_ns
    assert run_command("plan", tmp_path) == 0
    assert path.stat().st_mtime_ns == stamp
    shutil.rmtree(tmp_path / "run" / "leakage")
    assert run_command("plan", tmp_path) == 0
    assert not path.exists()
    assert run_command("run", tmp_path) == 0
    assert path.exists()
    assert run_command("plan", tmp_path, score={"scorers": ["random"]}) == 0
    assert not path.exists()


def test_another_evaluation_set_redoes_what_depends_on_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_world(tmp_path)
    assert run_command("score", tmp_path) == 0
    before = score_bytes(tmp_path, "run")
    gathered: list[str] = []

    def gather(payload: dict[str, Any]) -> Any:
        gathered.append(payload["set"])
        return work(payload)

    from jobs.leakage import gather_work as work

    monkeypatch.setattr("jobs.leakage.gather_work", gather)
    assert run_command("score", tmp_path) == 0
    assert gathered == []
    texts = pl.read_parquet(tmp_path / "data" / "one.parquet")["text"].to_list()
    text = max(texts[50:], key=lambda text: len(text.split()))
    pl.DataFrame({"q": [*ANSWERS, f"So {text}"]}).write_ndjson(tmp_path / "answers.jsonl")
    assert run_command("score", tmp_path) == 0
    assert gathered == ["answers"]
    assert score_bytes(tmp_path, "run") != before
    row = scores_of(tmp_path).filter(pl.col("leakage_row") == 4)
    assert row["row"].to_list() == [texts.index(text)]


def test_partitions_and_workers_change_nothing(tmp_path: Path):
    write_world(tmp_path)
    assert run_command("score", tmp_path) == 0
    few = {"held_out": 0.0, "partition_rows": 1000}
    assert run_command("score", tmp_path, "few", index=few) == 0
    assert scores_of(tmp_path).equals(scores_of(tmp_path, "few"))


def test_a_run_that_stopped_midway_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from jobs.leakage import look_work as work

    looked: list[str] = []

    def stopping(payload: dict[str, Any]) -> Any:
        looked.append(payload["partition"]["name"])
        if len(looked) == 4:
            raise KeyboardInterrupt
        return work(payload)

    write_world(tmp_path)
    assert run_command("run", tmp_path) == 0
    monkeypatch.setattr("jobs.leakage.look_work", stopping)
    assert run_command("run", tmp_path, "stopped") != 0
    stopped = tmp_path / "stopped"
    assert len(list(stopped.glob("leakage/matches/part-*"))) == 3
    assert not list(stopped.glob("scores/leakage/*"))
    assert run_command("run", tmp_path, "stopped") == 0
    assert len(looked) == 4 + 8 - 3
    assert score_bytes(tmp_path, "run") == score_bytes(tmp_path, "stopped")
    assert report_of(tmp_path) == report_of(tmp_path, "stopped")


@pytest.mark.slow
def test_workers_and_the_driver_write_the_same_bytes(tmp_path: Path):
    write_world(tmp_path)
    assert run_command("score", tmp_path) == 0
    workers = {"kind": "local", "workers": 1}
    assert run_command("score", tmp_path, "dask", cluster=workers) == 0
    assert score_bytes(tmp_path, "run") == score_bytes(tmp_path, "dask")


def test_settings_that_cannot_be_compared_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_world(tmp_path)
    assert run_command("score", tmp_path, evaluation={}) == 2
    assert "set evaluation" in capsys.readouterr().err
    gone = {"exam": {"path": str(tmp_path / "no.parquet"), "text": "q"}}
    assert run_command("score", tmp_path, evaluation=gone) == 3
    assert "evaluation.exam" in capsys.readouterr().err
    column = {"exam": {"path": str(tmp_path / "questions.parquet"), "text": "question"}}
    assert run_command("score", tmp_path, evaluation=column) != 0
    assert "evaluation.exam" in capsys.readouterr().err
    pl.DataFrame({"x": [0.5, 1.5]}).write_parquet(tmp_path / "numbers.parquet")
    numbers = {"web": {"path": str(tmp_path / "numbers.parquet"), "features": "x"}}
    assert run_command("score", tmp_path, sources=numbers) == 2
    assert "compares texts" in capsys.readouterr().err
    bad = {"scorers": [{"leakage": {"shortest": 20}}]}
    assert run_command("score", tmp_path, score=bad) == 2
    assert "shortest 20" in capsys.readouterr().err
    blank = tmp_path / "blank.parquet"
    pl.DataFrame({"q": ["!!!", "..."]}).write_parquet(blank)
    empty = {"exam": {"path": str(blank), "text": "q"}}
    assert run_command("score", tmp_path, evaluation=empty) == 3
    assert "evaluation.exam has no words" in capsys.readouterr().err


@pytest.mark.skipif(DATA is None, reason="needs real data: set CURATE_DATA to its folder")
def test_questions_of_a_test_set_are_found_in_other_peoples_solutions(tmp_path: Path):
    assert DATA is not None
    mixed = pl.read_parquet(Path(DATA) / "instruct_mix" / "test.parquet")
    exam = mixed.filter(pl.col("source") == "maths")
    exam.write_parquet(tmp_path / "exam.parquet")
    train = pl.read_parquet(Path(DATA) / "instruct_mix" / "train.parquet")
    own = train.filter(pl.col("source") == "maths")[1000:2500]
    theirs = pl.read_parquet(Path(DATA) / "gsm8k_solutions" / "test.parquet")
    columns = ["instruction", "output"]
    pool = pl.concat([own.select(columns), theirs.select(columns)])
    pool.write_parquet(tmp_path / "pool.parquet")
    source = {"prompt": "instruction", "response": "output"}
    values: dict[str, Any] = {
        "sources": {"pool": {"path": str(tmp_path / "pool.parquet"), **source}},
        "evaluation": {"gsm8k": {"path": str(tmp_path / "exam.parquet"), **source}},
        "index": {"held_out": 0.0},
    }
    assert run_command("run", tmp_path, "run", **values) == 0
    scores = scores_of(tmp_path)
    assert set(scores.columns) >= set(KEY)
    questions = set(exam["instruction"])
    expected = pool["instruction"].is_in(list(questions))
    assert expected.sum() == theirs.height
    assert ((scores["leakage"] >= 0.5) == expected).all()
    report = report_of(tmp_path)["sets"]["gsm8k"]
    assert report["examples"] == 1319
    asked = theirs["instruction"].n_unique()
    assert asked <= report["kept"]["examples"] <= asked + 3
