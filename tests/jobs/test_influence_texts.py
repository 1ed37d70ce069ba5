"""The scorer `influence` on texts and on pairs of answers, by loops over single examples."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from influence_dense import damped
from influence_world import INLINE, scored, table
from tiny_models import save_language_model
from torch.nn import functional

from curate.models.load import load_model
from jobs.index import index_run
from jobs.score import score_run
from jobs.settings import Settings, parse_settings, task_settings

WORDS = ["the", "cat", "in", "a", "hat", "then", "sat"]
LAYER = "v_proj"


def texts(count: int, seed: int) -> pl.DataFrame:
    draw = np.random.default_rng(seed)
    return pl.DataFrame({"text": [" ".join(draw.choice(WORDS, 1 + n % 6)) for n in range(count)]})


def settings_of(root: Path, options: dict[str, Any], **more: Any) -> Settings:
    """One matrix, whole: a side of 32 is no longer than `dim`."""
    own = {"layers": LAYER, "dim": 32, "dtype": "float32", "curvature": "full", **options}
    values: dict[str, Any] = {
        "run": str(root / "run"),
        "sources": {"pool": {"path": str(root / "pool.parquet"), "text": "text"}},
        "target": {"path": str(root / "target.parquet"), "text": "text"},
        "task": {"kind": "causal-lm", "max_tokens": 48},
        "model": {"name": str(root / "lm"), "device": "cpu"},
        "index": {"held_out": 0.0, "partition_rows": 6},
        "score": {"scorers": [{"influence": own}]},
    }
    settings = parse_settings({**values, **more})
    index_run(settings, pool=INLINE)
    return settings


def by_hand(settings: Settings, frame: pl.DataFrame, reduction: str) -> tuple[Any, Any]:
    """(n, k) gradients and (n,) losses, text by text in float64."""
    loaded = load_model(settings.model, task_settings(settings))
    model: Any = loaded.model.double()
    tokenizer: Any = loaded.tokenizer
    weight = dict(model.named_parameters())["model.layers.0.self_attn.v_proj.weight"]
    rows: list[np.ndarray] = []
    losses: list[float] = []
    for text in frame["text"]:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        given = torch.tensor([ids])
        logits = model(input_ids=given).logits[0, :-1]
        loss = functional.cross_entropy(logits, given[0, 1:], reduction=reduction)
        rows.append(torch.autograd.grad(loss, weight)[0].flatten().numpy())
        losses.append(float(loss.detach()))
    return np.stack(rows), np.array(losses)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("metric", ["dot", "cosine", "influence", "trak"])
def test_texts_are_scored_as_a_plain_loop_does(tmp_path: Path, metric: str, reduction: str):
    """p = exp(-loss) with trak, the loss being the mean or the sum over the tokens."""
    texts(11, 0).write_parquet(tmp_path / "pool.parquet")
    texts(3, 1).write_parquet(tmp_path / "target.parquet")
    save_language_model(tmp_path / "lm", num_hidden_layers=1)
    settings = settings_of(tmp_path, {"metric": metric, "reduction": reduction})
    found = scored(settings)
    own, losses = by_hand(settings, texts(11, 0), reduction)
    other, asked = by_hand(settings, texts(3, 1), reduction)
    if metric == "dot":
        matrix = own @ other.T
    elif metric == "cosine":
        lengths = [np.linalg.norm(rows, axis=1) for rows in (own, other)]
        matrix = own @ other.T / np.outer(*lengths)
    elif metric == "influence":
        matrix = own @ np.linalg.solve(damped(own, [512]), other.T)
    else:
        odds = own / (1 - np.exp(-losses))[:, None]
        queries = other / (1 - np.exp(-asked))[:, None]
        matrix = odds @ np.linalg.solve(11 * damped(odds, [512]), queries.T)
        matrix *= (1 - np.exp(-losses))[:, None]
    wanted = matrix.mean(1)
    np.testing.assert_allclose(found["influence"], wanted, rtol=1e-3,
                               atol=1e-5 * np.abs(wanted).max())  # fmt: skip
    assert found.filter(pl.col("num_scored") < 1).is_empty()


def test_pairs_of_answers_are_compared_with_a_reference_in_the_target_too(tmp_path: Path):
    def words(number: int, count: int) -> str:
        return " ".join(WORDS[(number * k) % 7] for k in range(1, 2 + count))

    pairs = pl.DataFrame({
        "prompt": [words(i, 2) + "?" for i in range(9)],
        "chosen": [" " + words(i, i % 3) + " yes" for i in range(9)],
        "rejected": [" " + words(i + 1, i % 4) + " no" for i in range(9)],
    })  # fmt: skip
    pairs.write_parquet(tmp_path / "pool.parquet")
    pairs[4:5].write_parquet(tmp_path / "target.parquet")
    save_language_model(tmp_path / "lm", num_hidden_layers=1)
    save_language_model(tmp_path / "other", num_hidden_layers=1, seed=1)
    settings = settings_of(
        tmp_path,
        {"metric": "cosine"},
        sources={"pairs": {"path": str(tmp_path / "pool.parquet")}},
        target={"path": str(tmp_path / "target.parquet")},
        task={"kind": "preference", "max_tokens": 64, "reference": str(tmp_path / "other")},
    )
    score_run(settings, pool=INLINE)
    found = table(settings, "scores/influence")["influence"]
    assert found.arg_max() == 4
    assert found[4] == pytest.approx(1, abs=1e-6)
