"""What a pass with gradients holds decides whether it is done again, and nothing else does."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tiny_models import save_language_model

from curate.config import plain
from curate.errors import CurateError
from curate.models.gradient_pass import GradientPass
from curate.models.mlp import MLP
from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.score import plan_score, score_run
from jobs.settings import Settings, parse_settings

INLINE = Pool(InlineExecutor(), 1)
HEAD = {"grand": {"parameters": "head"}}
BY_LAYER = {"grand": {"by_layer": True}}


@pytest.fixture
def world(tmp_path: Path) -> Settings:
    texts = [f"the {word} sat there until dawn" for word in ("cat", "hat", "dog", "cow")]
    pl.DataFrame({"text": texts}).write_parquet(tmp_path / "texts.parquet")
    save_language_model(tmp_path / "model", num_hidden_layers=2)
    settings = parse_settings(
        {
            "run": str(tmp_path / "run"),
            "sources": {"texts": {"path": str(tmp_path / "texts.parquet"), "text": "text"}},
            "task": {"kind": "causal-lm", "max_tokens": 64},
            "model": {"name": str(tmp_path / "model"), "device": "cpu"},
            "index": {"partition_rows": 2},
            "score": {"scorers": ["grand", "el2n"]},
        }
    )
    index_run(settings, pool=INLINE)
    return settings


def with_scorers(settings: Settings, *scorers: Any) -> Settings:
    return parse_settings({**plain(settings), "score": {"scorers": list(scorers)}})


@pytest.mark.parametrize(
    ("scorers", "passes"),
    [
        (["grand", "el2n"], 0),
        (["loss", "grand"], 0),  # the same columns serve it
        ([{"grand": {"parameters": "all", "by_layer": False}}], 0),
        ([HEAD], 2),
        ([{"grand": {"parameters": "mlp"}}], 2),
        ([BY_LAYER], 2),
        (["el2n"], 2),
    ],
)
def test_a_pass_is_done_again_when_its_columns_change(
    world: Settings, scorers: list[Any], passes: int
):
    score_run(world, pool=INLINE)
    assert score_run(with_scorers(world, *scorers), pool=INLINE)["done"] == passes


def test_scores_by_layer_are_in_the_run_s_table(world: Settings):
    settings = with_scorers(world, BY_LAYER, "el2n")
    score_run(settings, pool=INLINE)
    run = Path(settings.run)
    scores = pl.read_parquet(run / "scores" / "grand" / "*.parquet")
    assert {"grand", "grand_layer_0", "grand_layer_1", "grand_head_std"} <= set(scores.columns)
    held = pl.read_parquet(run / "quantities" / "model" / "*.parquet").columns
    assert "grad_sq_norm/layer_1" in held
    assert "grad_sq_norm[head]" not in held
    state = plan_score(settings)
    assert state.total == state.done


@pytest.fixture
def numbers(tmp_path: Path) -> Settings:
    """Ten rows in two partitions: one has an infinite loss, one a gradient beyond float32."""
    torch.manual_seed(0)
    model = MLP(num_features=2, num_classes=2)
    with torch.no_grad():
        model.layers[0].weight.copy_(torch.tensor([[10.0, 0], [-10, 0]]))  # pyright: ignore
    model.save_pretrained(tmp_path / "mlp")
    features = np.random.default_rng(0).normal(size=(10, 2)).astype(np.float32)
    features[3, 0] = 3e38
    features[8, 1] = 1e30
    frame = pl.DataFrame({"x": features, "kind": [0, 1] * 5})
    frame.write_parquet(tmp_path / "rows.parquet")
    source = {"path": str(tmp_path / "rows.parquet"), "features": "x", "label": "kind"}
    settings = parse_settings(
        {
            "run": str(tmp_path / "run"),
            "sources": {"rows": source},
            "task": {"kind": "tabular-classification", "num_classes": 2},
            "model": {"name": str(tmp_path / "mlp"), "device": "cpu"},
            "index": {"partition_rows": 5},
            "score": {"scorers": ["grand", "loss"]},
        }
    )
    index_run(settings, pool=INLINE)
    return settings


def test_losses_and_gradients_that_are_not_finite_are_null_and_counted(numbers: Settings):
    summary = score_run(numbers, pool=INLINE)
    assert summary["unscored"] == 2
    grand, loss = (
        pl.read_parquet(Path(numbers.run) / "scores" / name / "*.parquet").sort("row")[name]
        for name in ("grand", "loss")
    )
    assert grand.is_null().to_list() == [i in (3, 8) for i in range(10)]
    assert loss.is_null().to_list() == [i == 3 for i in range(10)]


def test_an_example_that_does_not_fit_alone_fails_its_partition_only(
    world: Settings, monkeypatch: pytest.MonkeyPatch
):
    right = GradientPass.measure
    sizes: list[int] = []

    def short_of_memory(self: GradientPass, batch: Any, num_examples: int) -> Any:
        if num_examples > 1 or not sizes:
            sizes.append(num_examples)
            raise torch.OutOfMemoryError
        return right(self, batch, num_examples)

    settings = parse_settings({**plain(world), "score": {"scorers": ["grand"], "batch_tokens": 4}})
    monkeypatch.setattr(GradientPass, "measure", short_of_memory)
    with pytest.raises(CurateError, match=r"memory does not suffice for one example of \d+ tokens"):
        score_run(settings, pool=INLINE)
    state = plan_score(settings)
    assert 0 < state.done < state.total
