"""Options of the command line beside settings that say something of the same thing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
