"""What a pass with gradients holds decides whether it is done again, and nothing else does."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from tiny_models import save_language_model

from curate.config import plain
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
