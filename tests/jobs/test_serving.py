"""Which pass serves which scorers, before and after training."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from tiny_models import save_language_model
from typer.testing import CliRunner

from curate.cli.app import app
from curate.config import plain
from curate.errors import ConfigError
from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.serving import Serving, passes_of
from jobs.settings import Settings, parse_settings
from jobs.train import train_run

INLINE = Pool(InlineExecutor(), 1)
TRAIN = {"train": {"epochs": 1, "seeds": [0, 3], "lr": 1e-3, "batch_tokens": 200}}


@pytest.fixture
def world(tmp_path: Path) -> Path:
    rows = {"prompt": [f"p{i}" for i in range(20)], "response": [f"r{i % 3}" for i in range(20)]}
    pl.DataFrame(rows).write_parquet(tmp_path / "data.parquet")
    save_language_model(tmp_path / "model")
    pl.DataFrame({"row": [0], "quality": [0.5]}).write_parquet(tmp_path / "quality.parquet")
    return tmp_path


def settings_of(world: Path, *scorers: Any, **more: Any) -> Settings:
    values: dict[str, Any] = {
        "run": str(world / "run"),
        "sources": {"data": {"path": str(world / "data.parquet")}},
        "task": {"kind": "causal-lm", "max_tokens": 32},
        "model": {"name": str(world / "model"), "device": "cpu"},
        "score": {"scorers": list(scorers)},
    }
    return parse_settings(values | more)


def by_kind(found: list[Serving]) -> dict[str, Serving]:
    assert len({serving.kind for serving in found}) == len(found)
    return {serving.kind: serving for serving in found}


def test_scorers_of_equal_needs_share_one_pass(world: Path):
    found = by_kind(passes_of(settings_of(world, "el2n", "loss", "margin", "entropy")))
    assert list(found) == ["forward"]
    assert found["forward"].scorers == ("el2n", "loss", "margin", "entropy")
    assert found["forward"].models == ("model",)
    assert set(found["forward"].measures) == {
        "loss", "error_norms", "error_frob", "margin", "entropy"
    }  # fmt: skip


def test_with_gradients_it_is_still_one_pass(world: Path):
    found = by_kind(passes_of(settings_of(world, "el2n", "grand", "loss")))
    assert list(found) == ["backward"]
    assert found["backward"].scorers == ("el2n", "grand", "loss")
    assert {"grad_sq_norm", "num_positions", "loss"} <= set(found["backward"].measures)


def test_each_kind_is_told_apart(world: Path):
    table = {"quality": {"path": str(world / "quality.parquet"), "columns": ["quality"]}}
    settings = settings_of(
        world, "forgetting", "loss", "length", "random", {"external": table}, {"pvi": {"folds": 2}},
        checkpoints=TRAIN,
    )  # fmt: skip
    before = by_kind(passes_of(settings))
    assert set(before) == {"forward", "log", "table", "outside", "own"}
    assert before["forward"].models == ("seed-0, to be trained", "seed-3, to be trained")
    assert before["log"].scorers == ("forgetting",)
    assert before["log"].models == ("training of seed 0", "training of seed 3")
    assert before["table"].scorers == ("length", "random")
    assert before["outside"].scorers == ("quality",)
    assert before["own"].measures[0].startswith("known later: ")
    index_run(settings, pool=INLINE)
    train_run(settings, pool=INLINE)
    after = by_kind(passes_of(settings))
    assert len(after["forward"].models) == 2
    assert after["forward"].models[1].startswith("seed-3/step-")
    assert after["own"].models == ("seed 0", "seed 3")
    assert after["own"].measures[1] == "pvi: training (6 tasks)"


def test_a_history_of_checkpoints_comes_from_the_shared_pass(world: Path):
    settings = settings_of(
        world, "forgetting", "loss", checkpoints={"paths": [str(world / "model")]}
    )
    found = by_kind(passes_of(settings))
    assert list(found) == ["forward"]
    assert found["forward"].scorers == ("forgetting", "loss")


def test_a_reference_is_a_pass_of_its_own(world: Path):
    rows = {"prompt": ["p"], "chosen": ["a"], "rejected": ["b"]}
    pl.DataFrame(rows).write_parquet(world / "data.parquet")
    settings = settings_of(world, "loss", task={"kind": "preference"})
    found = by_kind(passes_of(settings))
    assert list(found) == ["reference", "forward"]
    assert found["reference"].models == (str(world / "model"),)


def test_without_scorers_it_says_so(world: Path):
    with pytest.raises(ConfigError, match=r"score\.scorers is empty"):
        passes_of(settings_of(world))


def test_the_command_prints_a_line_for_each_pass_or_json(world: Path):
    config = world / "config.yaml"
    config.write_text(yaml.safe_dump(plain(settings_of(world, "grand", "loss", "random"))))
    printed = CliRunner().invoke(app, ["methods", "--plan", str(config)])
    lines = printed.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["pass", "backward", "table"]
    assert "grand, loss" in lines[1]
    printed = CliRunner().invoke(app, ["methods", "--plan", str(config), "--json"])
    found = json.loads(printed.stdout)
    assert [entry["kind"] for entry in found["passes"]] == ["backward", "table"]
    assert found["passes"][1]["scorers"] == ["random"]
    assert not (world / "run").exists()
