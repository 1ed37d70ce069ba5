"""What goes wrong ends with one clear message (what, where, fix) and the documented exit code."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

Curate = Callable[..., Any]
"""Runs a command: code, out, err."""
Config = Callable[..., Path]
"""Writes settings."""


def message(result: Any, code: int) -> str:
    """The error's two lines; nothing on stdout, no traceback."""
    assert result.code == code, result.err
    assert result.out == ""
    assert "Traceback" not in result.err
    found = re.search(r"^error: (.*)\n  fix: (.*)\n\Z", result.err, re.MULTILINE)
    assert found, result.err
    return f"{found[1]} | {found[2]}"


def test_a_wrong_key_is_named_with_its_file_and_the_nearest_key(curate: Curate, config: Config):
    path = config(plan={"keeep": 0.5})
    assert message(curate("index", path), 2) == (
        f"unknown key plan.keeep, set by {path} | did you mean keep?"
    )


def test_a_wrong_key_deep_below_is_named(curate: Curate, config: Config):
    path = config(checkpoints={"train": {"epoch": 1}})
    assert "unknown key checkpoints.train.epoch" in message(curate("index", path), 2)


def test_a_wrong_override_is_told_to_come_from_the_command_line(curate: Curate, config: Config):
    assert message(curate("index", config(), "--set", "plan.keep=5"), 2) == (
        "plan: keep is 5.0, outside (0, 1], set by --set"
        " | write a share, or {examples: N} or {tokens: N}"
    )


def test_a_wrong_environment_variable_is_named(
    curate: Curate, config: Config, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CURATE__INDEX__PARTITION_ROWS", "many")
    assert "set by environment CURATE__INDEX__PARTITION_ROWS" in message(
        curate("index", config()), 2
    )


def test_a_key_that_stands_twice_is_named_with_its_line(curate: Curate, tmp_path: Path):
    path = tmp_path / "twice.yaml"
    path.write_text("run: a\nrun: b\n")
    assert f"{path}, line 2: run is set twice" in message(curate("index", path), 2)


def test_a_missing_settings_file_is_missing_input(curate: Curate, tmp_path: Path):
    assert message(curate("run", tmp_path / "absent.yaml"), 3) == (
        f"there is no settings file {tmp_path / 'absent.yaml'} | check the path"
    )


def test_data_in_place_of_settings_is_told_what_to_do(curate: Curate, data: Path):
    assert f"curate init {data}" in message(curate("plan", data), 2)


def test_a_missing_file_is_named(curate: Curate, config: Config, tmp_path: Path):
    path = config(sources={"a": {"path": str(tmp_path / "absent.parquet")}})
    told = message(curate("index", path), 3)
    assert "absent.parquet" in told
    assert "sources.a" in told


def test_a_missing_column_is_named_with_the_nearest(curate: Curate, config: Config, data: Path):
    path = config(sources={"a": {"path": str(data), "text": "txet"}})
    told = message(curate("index", path), 3)
    assert "a/data.parquet" in told
    assert "'txet'" in told
    assert "did you mean text?" in told


def test_an_empty_data_set_is_told(curate: Curate, config: Config, data: Path):
    pl.DataFrame(schema={"text": pl.String}).write_parquet(data)
    assert "there are no examples in a: 1 file, 0 rows" in message(curate("index", config()), 3)


def test_a_label_outside_the_classes_is_set_aside_and_too_many_stop_the_run(
    curate: Curate, config: Config, data: Path
):
    frame = pl.read_parquet(data)
    frame.with_columns(label=2 * pl.col("label")).write_parquet(data)
    path = config(
        sources={"a": {"path": str(data), "text": "text", "label": "label"}},
        task={"kind": "text-classification", "num_classes": 2},
    )
    told = message(curate("index", path), 4)
    assert "label_out_of_range" in told
    assert "20" in told


def test_one_class_is_no_classification(curate: Curate, config: Config):
    task = {"kind": "text-classification", "num_classes": 1}
    assert "num_classes is 1" in message(curate("index", config(task=task)), 2)


def test_a_folder_of_somebody_else_is_left_alone(curate: Curate, config: Config, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("x")
    told = message(curate("index", config()), 5)
    assert "thesis.tex" in told
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"score": {"scorers": ["el3n"]}}, "there is no scorer 'el3n' | did you mean el2n?"),
        ({"mix": {"mixer": "unimix"}}, "there is no mixer 'unimix' | did you mean unimax?"),
        (
            {"task": {"kind": "causal-ml"}},
            "there is no task 'causal-ml' | did you mean causal-lm?",
        ),
        ({"mix": {"mixer": "unimax", "epochs": 1}}, "unknown key mix.epochs"),
        ({"task": {"max_tokens": 1}}, "task.kind is missing"),
    ],
)
def test_an_unknown_method_is_refused_before_any_work(
    curate: Curate, config: Config, tmp_path: Path, sections: dict[str, Any], told: str
):
    assert told in message(curate("run", config(**sections)), 2)
    assert not (tmp_path / "run").exists()


def test_measure_alone_is_refused(curate: Curate, config: Config):
    assert "--measure belongs to --dry-run" in message(curate("index", config(), "--measure"), 2)


def test_a_scorer_without_a_model_is_told(curate: Curate, data: Path):
    told = message(curate("score", data, "--scorer", "el2n"), 2)
    assert "the score el2n needs a model" in told
    assert "--model" in told
    told = message(curate("score", data, "--scorer", "random", "--scorer", "grand",
                          "--scorer", "loss"), 2)  # fmt: skip
    assert "the scores grand, loss need a model" in told


def test_an_unknown_scorer_is_told_before_a_model_that_is_missing(
    curate: Curate, data: Path, tmp_path: Path
):
    told = message(curate("score", data, "--scorer", "el3n"), 2)
    assert told == "there is no scorer 'el3n' | did you mean el2n?"
    told = message(curate("score", data, "--scorer", "el3n", "--model", tmp_path / "absent"), 2)
    assert "there is no scorer 'el3n'" in told


def test_a_missing_model_folder_is_named(curate: Curate, data: Path, tmp_path: Path):
    told = message(curate("score", data, "--model", tmp_path / "absent"), 3)
    assert str(tmp_path / "absent") in told


def test_status_and_show_of_no_run_are_told(curate: Curate, tmp_path: Path):
    for command in ("status", "show"):
        assert "is no run folder" in message(curate(command, tmp_path), 5)


def test_verify_of_no_shards_is_told(curate: Curate, tmp_path: Path):
    assert str(tmp_path) in message(curate("verify", tmp_path / "absent"), 3)


def test_an_unknown_method_name_is_told(curate: Curate):
    assert "there is no method 'el3n' | did you mean el2n?" in message(curate("methods", "el3n"), 2)


def test_init_does_not_overwrite(curate: Curate, data: Path, tmp_path: Path):
    target = tmp_path / "mine.yaml"
    target.write_text("precious")
    assert f"{target} exists" in message(curate("init", data, "--out", target), 1)
    assert target.read_text() == "precious"


def test_events_that_cannot_be_written_are_told(curate: Curate, config: Config, tmp_path: Path):
    told = message(curate("index", config(), "--events", tmp_path / "no" / "events.jsonl"), 1)
    assert "events.jsonl cannot be written" in told


def test_a_bug_keeps_its_traceback_and_says_what_it_is(
    curate: Curate, config: Config, monkeypatch: pytest.MonkeyPatch
):
    import jobs.index

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(jobs.index, "index_run", broken)
    result = curate("index", config())
    assert result.code == 1
    assert "Traceback" in result.err
    assert "ZeroDivisionError: a bug" in result.err
    assert "error: this is a bug" in result.err


def test_quiet_leaves_stderr_empty_on_success(curate: Curate, config: Config):
    result = curate("index", config(), "--quiet", "--json")
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out)["command"] == "index"


def test_what_a_scorer_lacks_is_said_before_anything_is_made(
    curate: Curate, config: Config, tmp_path: Path
):
    """On a new run, by --dry-run, and where only another section than the scores has changed."""
    training: dict[str, Any] = {
        "sources": {
            "a": {"path": str(tmp_path / "data.parquet"), "text": "text", "label": "label"}
        },
        "task": {"kind": "text-classification", "num_classes": 2},
        "model": {"config": {"model_type": "bert"}, "tokenizer": {"train": "bpe"}},
        "checkpoints": {"train": {"epochs": 1}},
        "plan": {},
    }
    path = config(score={"scorers": ["vog"]}, **training)
    for command in ("run", "score"):
        for more in ((), ("--dry-run",)):
            assert "takes 2 or more" in message(curate(command, path, *more), 2)
    path = config(score={"scorers": ["dvgs"]}, **training)
    assert "settings name none" in message(curate("run", path), 2)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    more = {**training, "target": {"path": str(tmp_path / "data.parquet")}}
    opened = config("opened.yaml", score={"scorers": ["dvgs"]}, **more)
    (tmp_path / "run" / "config.yaml").write_text(opened.read_text())
    assert "settings name none" in message(curate("run", path), 2)


def test_every_scorer_that_fails_says_why(
    curate: Curate, config: Config, data: Path, tmp_path: Path
):
    goal = tmp_path / "goal.parquet"
    pl.DataFrame({"text": ["the only row"]}).write_parquet(goal)
    pl.read_parquet(data).drop("label").write_parquet(data)
    path = config(
        target={"path": str(goal), "text": "text"},
        score={"scorers": ["gio", "label_issues"]},
    )
    result = curate("score", path)
    assert "1 different target point among 1 target row" in message(result, 3)
    reason = "label_issues needs two classes or more"
    assert f"error: label_issues: fit: the whole pool failed: {reason}" in result.err
    assert "others go on" not in result.err
    status = json.loads(curate("status", tmp_path / "run", "--json").out)
    (score,) = (stage for stage in status["stages"] if stage["stage"] == "score")
    assert "1 different target point" in score["why"][0]
    assert reason in score["why"][1]


def test_a_line_break_in_a_name_cannot_break_a_message(
    curate: Curate, config: Config, tmp_path: Path
):
    runs = pl.DataFrame({"one": [0.5, 0.4], "so\nrare\x1b": [0.5, 0.6], "loss.one": [1.0, 2.0]})
    runs.write_csv(tmp_path / "runs.csv")
    path = config(mix={"mixer": "regmix", "results": [str(tmp_path / "runs.csv")]})
    assert curate("index", path).code == 0
    told = message(curate("mix", path), 2)
    assert "the runs say nothing of the domain 'a' | " in told
    assert told.endswith("they are one, so\\nrare\\x1b")


def told(result: Any, code: int) -> dict[str, Any]:
    """The one line on stdout, which says what stderr says."""
    assert result.code == code, result.err
    assert result.out.count("\n") == 1
    document = json.loads(result.out)
    assert document["schema_version"] == 1
    error = document["error"]
    assert error["exit_code"] == code
    if code != 2 or "error: " in result.err:
        assert result.err.endswith(f"error: {error['what']}\n  fix: {error['fix']}\n")
    return document


def test_a_program_is_told_as_json_what_went_wrong(
    curate: Curate, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    wrong = config("wrong.yaml", plan={"keeep": 0.5})
    found = told(curate("index", wrong, "--json"), 2)
    assert found.keys() == {"schema_version", "command", "error"}
    assert (found["command"], found["error"]["fix"]) == ("index", "did you mean keep?")
    missing = config("gone.yaml", sources={"a": {"path": str(tmp_path / "gone"), "text": "text"}})
    told(curate("run", missing, "--json", "-q"), 3)
    nothing = told(curate("status", tmp_path / "nothing", "--json", "--watch"), 3)
    assert nothing["command"] == "status"
    usage = told(curate("index", wrong, "--json", "--nonsense"), 2)
    assert "--nonsense" in usage["error"]["what"]

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("jobs.methods.all_methods", broken)
    assert "bug in curate" in told(curate("methods", "--json"), 1)["error"]["what"]
    assert curate("index", wrong).out == ""


def test_events_on_stdout_end_with_what_went_wrong(curate: Curate, config: Config, data: Path):
    data.write_bytes(b"no table")
    result = curate("run", config(), "-q", "--events", "-")
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert [line["event"] for line in lines[-1:]] == ["error"]
    assert lines[-1]["error"]["exit_code"] == result.code > 0


def test_one_document_says_that_shards_are_damaged(curate: Curate, config: Config, tmp_path: Path):
    assert curate("run", config(), "-q").code == 0
    next((tmp_path / "run" / "shards").rglob("*.parquet")).write_bytes(b"no table")
    result = curate("verify", tmp_path / "run" / "shards", "--json")
    found = json.loads(result.out)
    assert (result.code, found["error"]["exit_code"], found["whole"]) == (1, 1, False)
    assert found["error"]["what"] == found["what"]


def test_options_that_would_say_nothing_are_refused(curate: Curate, config: Config, tmp_path: Path):
    numbers = tmp_path / "numbers.csv"
    numbers.write_text("arm,seed,metric,value\n")
    path = config()
    assert curate("index", path, "-q").code == 0
    run = tmp_path / "run"
    for given, said in (
        (("compare", numbers, "--dry-run"), "--dry-run is given, but numbers in a file"),
        (("compare", numbers, "--events", "-"), "--events is given, but numbers in a file"),
        (("compare", numbers, "--workers", 2), "--workers is given, but numbers in a file"),
        (("show", run, "--quarantine", "--domain", "a"), "--domain does not go with --quarantine"),
        (("show", run, "--quarantine", "--score", "el2n"), "--score does not go with --quara"),
        (("status", run, "--every", 2), "--every belongs to --watch"),
        (("methods", "el2n", "--plan", path), "and el2n is named beside it"),
    ):
        result = curate(*given)
        assert (result.code, said in result.err) == (2, True), result.err
