"""What is wrong with a target is said before anything is passed over for it."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from influence_world import make_world, scored, settings_of, target
from tiny_models import save_language_model

from curate.errors import CurateError
from curate.models.mlp import MLP


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return make_world(tmp_path)


def passed_over(world: Path) -> list[str]:
    """Vectors of the pool, and of the target."""
    run = world / "run"
    folders = (run / "influence", run / "target" / "influence")
    return [path.name for folder in folders for path in folder.rglob("*.vectors")]


def test_rows_of_another_length_than_the_pools_are_refused_before_any_pass(world: Path):
    wide = np.zeros((6, 7), dtype=np.float32)
    target().with_columns(pl.Series("x", wide)).write_parquet(world / "target.parquet")
    with pytest.raises(CurateError, match="rows have 7 features, those of the pool have 4"):
        scored(settings_of(world, {}))
    assert passed_over(world) == []


def test_a_model_of_nans_stops_at_the_target_and_is_named(world: Path):
    model = MLP.from_pretrained(world / "step-2")
    with torch.no_grad():
        next(model.parameters())[0, 0] = float("nan")
    model.save_pretrained(world / "step-2")
    with pytest.raises(
        CurateError, match="'a' has a gradient that is finite, with step-2"
    ) as caught:
        scored(settings_of(world, {}))
    assert "NaN or infinite" in str(caught.value)
    assert not list((world / "run" / "influence").rglob("*.vectors"))


def test_a_sub_task_in_which_nothing_counts_is_told_from_one_without_finite_gradients(
    tmp_path: Path,
):
    save_language_model(tmp_path / "lm", num_hidden_layers=1)
    prompts = ["the cat", "the cat " * 30]
    frame = pl.DataFrame({"p": prompts, "r": ["sat", "sat"], "topic": ["short", "long"]})
    frame.write_parquet(tmp_path / "rows.parquet")
    source = {
        "path": str(tmp_path / "rows.parquet"),
        "prompt": "p",
        "response": "r",
        "domain": "topic",
    }
    task = {"kind": "causal-lm", "max_tokens": 24}
    settings = settings_of(
        tmp_path,
        {"dim": 3},
        sources={"rows": source},
        target=source,
        task=task,
        model={"name": str(tmp_path / "lm"), "device": "cpu"},
        checkpoints={},
    )
    with pytest.raises(CurateError, match="'long' has a gradient: nothing in them counts"):
        scored(settings)
