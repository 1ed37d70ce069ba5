"""Options of the command line beside settings that say something of the same thing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

Curate = Callable[..., Any]
"""Runs a command: code, out, err."""
Config = Callable[..., Path]
"""Writes settings."""

HASHED = "score.scorers=[{dsir: {buckets: 128}}, random]"


def scorers(run: Path) -> list[Any]:
    """As the run has them."""
    return yaml.safe_load((run / "config.yaml").read_text())["score"]["scorers"]


def test_a_scorer_that_is_set_with_options_keeps_them(curate: Curate, data: Path, tmp_path: Path):
    given = ("score", data, "--target", data, "--text", "text", "--out", tmp_path / "new")
    result = curate(*given, "--scorer", "dsir", "--set", HASHED)
    assert result.code == 0, result.err
    assert scorers(tmp_path / "new") == [{"dsir": {"buckets": 128}}, "random"]


def test_a_scorer_beside_others_that_are_set_is_refused(curate: Curate, data: Path, tmp_path: Path):
    given = ("score", data, "--target", data, "--text", "text", "--out", tmp_path / "new")
    result = curate(*given, "--scorer", "bm25", "--set", HASHED)
    assert result.code == 2
    assert "--scorer bm25 is none of those that --set score.scorers names" in result.err
    assert not (tmp_path / "new").exists()


def test_a_scorer_of_the_settings_keeps_its_options(curate: Curate, config: Config, data: Path):
    path = config(
        score={"scorers": [{"dsir": {"buckets": 128}}, "random"]},
        target={"path": str(data), "text": "text"},
        plan={},
    )
    result = curate("score", path, "--scorer", "dsir", "--scorer", "length", "--json")
    assert result.code == 0, result.err
    assert scorers(Path(json.loads(result.out)["run"])) == [{"dsir": {"buckets": 128}}, "length"]


def test_the_way_of_the_weights_is_given_to_write(curate: Curate, config: Config):
    path = config(score={"scorers": ["random"]}, plan={"keep": 0.5})
    result = curate("write", path, "--weights", "domains", "--json")
    assert result.code == 0, result.err
    run = Path(json.loads(result.out)["run"])
    assert yaml.safe_load((run / "config.yaml").read_text())["shards"]["weights"] == "domains"
    refused = curate("write", path, "--weights", "pairs")
    assert refused.code == 2
    assert "shards.weights" in refused.err


def test_options_that_are_set_reach_the_mixer_that_is_given(curate: Curate, config: Config):
    path = config(mix={"mixer": "unimax", "max_epochs": 2}, plan={"keep": 0.5})
    result = curate("mix", path, "--mixer", "temperature", "--set", "mix.tau=7", "--json")
    assert result.code == 0, result.err
    run = Path(json.loads(result.out)["run"])
    mix = yaml.safe_load((run / "config.yaml").read_text())["mix"]
    assert mix["mixer"] == "temperature"
    assert mix["tau"] == 7
    refused = curate("mix", path, "--mixer", "temperature", "--set", "mix.max_epochs=3")
    assert refused.code == 2
    assert "max_epochs" in refused.err


def labelled(path: Path, *, separator: str = ",") -> Path:
    """Short texts of three classes, and which of two people said so."""
    names = ["red", "green", "blue"]
    rows = [{"text": f"{names[n % 3]} thing {n}", "label": names[n % 3], "by": "mn"[n // 3 % 2]}
            for n in range(60)]  # fmt: skip
    pl.DataFrame(rows).write_csv(path, separator=separator)
    return path


def planned_source(result: Any) -> dict[str, Any]:
    """What `--dry-run --json` says of the only source, defaults left out."""
    assert result.code == 0, result.err
    settings = json.loads(result.out)["settings"]
    found = {key.split(".")[-1]: entry["value"] for key, entry in settings.items()
             if key.startswith("sources.")}  # fmt: skip
    return {key: value for key, value in found.items() if key in ("label", "classes", "separator")}


def test_bare_data_have_their_label_and_its_classes_taken(curate: Curate, tmp_path: Path):
    data = labelled(tmp_path / "texts.csv", separator=";")
    given = ("score", data, "--scorer", "label_issues", "--out", tmp_path / "run")
    result = curate(*given, "--dry-run", "--json")
    names = ["blue", "green", "red"]
    assert planned_source(result) == {"label": "label", "classes": names, "separator": ";"}
    assert "texts: taking label: label (3 classes)" in result.err
    other = curate(*given, "--label", "by", "--dry-run", "--json")
    assert planned_source(other) == {"label": "by", "classes": ["m", "n"], "separator": ";"}
    own = curate(*given, "--set", "sources.texts.label=by", "--dry-run", "--json")
    assert own.code == 3
    assert "label column 'by' holds text\n  fix: list the class names" in own.err
    done = curate(*given, "--set", "score.scorers=[{label_issues: {folds: 2}}]", "--json")
    assert done.code == 0, done.err
    plain = curate("score", data, "--scorer", "length", "--dry-run", "--json")
    assert planned_source(plain) == {"label": None, "classes": [], "separator": ";"}


def test_a_target_without_labels_does_not_get_the_guessed_one(curate: Curate, tmp_path: Path):
    data = labelled(tmp_path / "texts.csv")
    pl.DataFrame({"text": ["a", "b"]}).write_csv(tmp_path / "wanted.csv")
    given = ("score", data, "--scorer", "label_issues", "--dry-run", "--json", "--target")
    for target, label in ((tmp_path / "wanted.csv", None), (data, "label")):
        result = curate(*given, target)
        assert result.code == 0, result.err
        assert json.loads(result.out)["settings"]["target.label"]["value"] == label


def test_data_beside_the_settings_and_not_in_the_working_folder_are_pointed_out(
    curate: Curate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    project.mkdir()
    elsewhere.mkdir()
    labelled(project / "texts.csv")
    settings = project / "curate.yaml"
    for path in ("texts.csv", "*.csv"):
        settings.write_text(f"run: run\nsources: {{a: {{path: '{path}'}}}}\n")
        monkeypatch.chdir(elsewhere)
        result = curate("index", settings, "--dry-run")
        assert result.code == 3
        assert f"there is no {elsewhere / path}, but beside the settings" in result.err
        assert f"run it in {project}, or write the whole path" in result.err
        monkeypatch.chdir(project)
        assert curate("index", settings, "--dry-run").code == 0


def test_what_is_set_beside_a_flag_of_the_same_section_counts(
    curate: Curate, data: Path, tmp_path: Path
):
    """The flag names the file, the task or the vectors; what is set is meant for these."""
    wanted = tmp_path / "wanted.jsonl"
    wanted.write_text(json.dumps({"wish": "a text", "text": "no"}) + "\n")
    given = ("score", data, "--text", "text", "--dry-run", "--json", "--task", "causal-lm",
             "--set", "task.max_tokens=77", "--scorer", "rds", "--embed", "ngrams",
             "--set", "embed.ngrams.dim=64", "--target", wanted,
             "--set", "target.text=wish", "--set", "target.path=elsewhere")  # fmt: skip
    result = curate(*given)
    assert result.code == 0, result.err
    settings = json.loads(result.out)["settings"]
    keys = ("task.kind", "task.max_tokens", "embed.ngrams.dim", "target.text", "target.path")
    assert [settings[key]["value"] for key in keys] == [
        "causal-lm", 77, 64, "wish", str(wanted),
    ]  # fmt: skip


def test_data_that_are_missing_are_looked_for_with_any_glob(
    curate: Curate, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """`**.jsonl` is a pattern of ours; it is none of pathlib's."""
    path = config(sources={"texts": {"path": "data/**.jsonl", "text": "text"}})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    result = curate("index", path, "--dry-run")
    assert "bug" not in result.err
    (path.parent / "data" / "deep").mkdir(parents=True)
    (path.parent / "data" / "deep" / "a.jsonl").write_text('{"text": "a"}\n')
    result = curate("index", path, "--dry-run")
    assert result.code == 3
    assert "but beside the settings there is" in result.err
