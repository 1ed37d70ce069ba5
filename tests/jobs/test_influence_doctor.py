"""`curate doctor --influence`: how near the chosen scores are to the exact ones."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from curate.cli.tools import print_doctor
from curate.config import to_yaml
from curate.errors import ConfigError, InputError
from curate.models.checkpoints import save_checkpoint
from curate.models.mlp import MLP
from jobs.influence_doctor import Nearness, influence_nearness

WAYS = {"fisher", "ekfac", "gradients", "datainf"}


@pytest.fixture
def world(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    MLP(num_features=4, num_classes=3, hidden=(5,)).save_pretrained(tmp_path / "model")
    numbers = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    labels = [i % 3 for i in range(60)]
    frame = pl.DataFrame({"features": numbers, "label": labels})
    frame.write_parquet(tmp_path / "rows.parquet")
    return tmp_path


def config_of(world: Path, options: dict[str, Any]) -> Path:
    columns = {"features": "features", "label": "label"}
    values: dict[str, Any] = {
        "run": str(world / "run"),
        "sources": {"rows": {"path": str(world / "rows.parquet"), **columns}},
        "target": {"path": str(world / "rows.parquet"), **columns},
        "task": {"kind": "tabular-classification", "num_classes": 3},
        "model": {"name": str(world / "model"), "device": "cpu"},
        "score": {"scorers": [{"influence": options}]},
    }
    (world / "config.yaml").write_text(to_yaml(values))
    return world / "config.yaml"


def test_the_chosen_metric_of_settings_is_compared_on_their_own_rows(world: Path):
    config = config_of(world, {"metric": "ekfac", "damping": 0.3})
    found = influence_nearness(None, config, kind=None, data=None, rows=60)
    assert (found.way, found.rows, found.queries, found.damping) == ("ekfac", 50, 10, 0.3)
    assert set(found.ways) == WAYS
    ranks = [way["spearman"] for way in found.ways.values()]
    assert ranks == sorted(ranks, reverse=True)
    assert found.ways["ekfac"]["spearman"] > 0.7 > found.ways["gradients"]["spearman"] - 0.3
    assert found.check().state == "ok"
    assert found.residual < 1e-3


def test_the_command_prints_a_table_or_json(world: Path, capsys: pytest.CaptureFixture[str]):
    given: dict[str, Any] = {"task": None, "data": str(world / "rows.parquet"), "influence": 40}
    print_doctor(str(world / "model"), None, **given, as_json=False)
    out = capsys.readouterr().out
    assert "influence of 30 rows on 10 queries, beside the damped exact answer" in out
    lines = out[out.index("\nway ") + 1 :].splitlines()
    assert {line.split()[0] for line in lines[1:]} == WAYS
    (chosen,) = [line for line in lines if line.endswith("metric influence")]
    assert chosen.startswith("fisher")
    print_doctor(str(world / "model"), None, **given, as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert set(document["influence"]["ways"]) == WAYS
    assert document["checks"][-1]["name"] == "influence"


def test_a_way_that_ranks_otherwise_is_noted_with_a_better_one():
    ways = {"ekfac": {"spearman": 0.9}, "gradients": {"spearman": 0.1}}
    more: dict[str, Any] = {"rows": 50, "queries": 10, "damping": 0.1, "seconds": 1.0}
    more["residual"] = 1e-4
    found = Nearness(metric="dot", way="gradients", ways=ways, **more).check()
    assert found.state == "note"
    assert "ekfac reaches 0.90" in found.fix
    more["residual"] = 0.4
    coarse = Nearness(metric="ekfac", way="ekfac", ways=ways, **more).check()
    assert coarse.state == "note"
    assert "left 0.40 of a query" in coarse.text


def test_a_checkpoint_is_compared_under_settings_that_made_it(world: Path):
    config = config_of(world, {"metric": "dot"})
    values = config.read_text().replace(f"name: {world / 'model'}", "config: {model_type: mlp}")
    config.write_text(values)
    checkpoint = str(world / "model")
    found = influence_nearness(checkpoint, config, kind=None, data=None, rows=40)
    assert (found.way, found.rows) == ("gradients", 30)


def test_of_settings_that_train_the_last_checkpoint_is_compared_and_each_query_is_told(
    world: Path, caplog: pytest.LogCaptureFixture
):
    config = config_of(world, {"metric": "dot"})
    model = MLP.from_pretrained(world / "model")
    save_checkpoint(world / "run" / "checkpoints", seed=0, step=7, epoch=1.0, lr=0.1,
                    write_model=lambda folder: model.save_pretrained(folder))  # fmt: skip
    values = config.read_text().replace(f"name: {world / 'model'}", "config: {model_type: mlp}")
    config.write_text(values)
    with caplog.at_level("INFO"):
        found = influence_nearness(None, config, kind=None, data=None, rows=40)
    own = influence_nearness(str(world / "model"), config, kind=None, data=None, rows=40)
    assert found.ways == own.ways
    assert "run/checkpoints/seed-0/step-000007: 30 rows against 10 queries" in caplog.text
    for number in range(1, 11):
        assert f"influence: query {number} of 10 took" in caplog.text


def test_too_few_rows_are_refused(world: Path):
    model, data = str(world / "model"), str(world / "rows.parquet")
    with pytest.raises(ConfigError, match="too few to compare"):
        influence_nearness(model, None, kind=None, data=data, rows=12)
    with pytest.raises(ConfigError, match="there are none"):
        influence_nearness(model, None, kind=None, data=None, rows=40)
    pl.read_parquet(data).with_columns(label=pl.lit(None, pl.Int64)).write_parquet(data)
    with pytest.raises(InputError, match="only 0 rows"):
        influence_nearness(None, config_of(world, {"metric": "dot"}), kind=None, data=None, rows=40)


def test_no_model_is_refused():
    with pytest.raises(ConfigError, match="no model to check"):
        print_doctor(None, None, task=None, data=None, as_json=False, influence=40)
