"""`import curate` as a notebook uses it."""

import logging
import math
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import polars as pl
import pytest
import torch
from tiny_models import byte_tokenizer, save_classifier, save_language_model
from torch.nn import functional

import curate
from curate.data.files import write_json
from curate.errors import ConfigError, CurateError, InputError
from curate.models.mlp import MLP
from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.opening import open_run
from jobs.score import lengths_run, score_run
from jobs.settings import parse_settings

INLINE = Pool(InlineExecutor(), 1)
TEXTS = ["the cat", "in a hat", "then it sat until the dawn", "a", "the the the"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language_model(tmp_path_factory.mktemp("model"))


def test_a_frame_gets_a_frame_of_columns_in_its_order(model: Path):
    frame = pl.DataFrame({"body": TEXTS, "other": range(5)})
    scores = curate.score(
        frame, scorers=["el2n", "loss", "length"], model=model, task="causal-lm", text="body"
    )
    assert scores.columns == [
        "el2n", "el2n_frob", "loss", "perplexity", "num_tokens", "num_chars", "num_scored",
    ]  # fmt: skip
    assert scores["num_chars"].to_list() == [len(text) for text in TEXTS]
    both = frame.hstack(scores)
    assert both.height == 5
    alone = curate.score(
        frame[2:3], scorers=["loss"], model=str(model), task="causal-lm", text="body"
    )
    assert scores["loss"][2] == pytest.approx(alone["loss"][0], rel=1e-5)
    tokens = len(byte_tokenizer()(TEXTS[2])["input_ids"])
    assert scores["num_scored"][2] == scores["num_tokens"][2] == tokens


def test_a_dataset_gets_a_dataset(model: Path):
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    picked = rows.select([4, 1])
    scores = curate.score(picked, scorers=["loss"], model=model, task="causal-lm")
    assert isinstance(scores, datasets.Dataset)
    frame = curate.score(
        pl.DataFrame({"text": TEXTS}), scorers=["loss"], model=model, task="causal-lm"
    )
    np.testing.assert_allclose(scores["loss"][:], frame["loss"].gather([4, 1]), rtol=1e-5)


def test_memory_and_run_folder_agree(model: Path, tmp_path: Path):
    frame = pl.DataFrame({"text": [f"{text} {i}" for i in range(8) for text in TEXTS]})
    frame.write_parquet(tmp_path / "a.parquet")
    settings = parse_settings(
        {
            "run": str(tmp_path / "run"),
            "sources": {"a": {"path": str(tmp_path / "a.parquet"), "text": "text"}},
            "task": {"kind": "causal-lm"},
            "model": {"name": str(model), "device": "cpu"},
            "score": {"scorers": ["el2n", "margin"]},
        }
    )
    index_run(settings, pool=INLINE)
    score_run(settings, pool=INLINE)
    in_memory = curate.score(frame, scorers=["el2n", "margin"], model=model, task="causal-lm")
    in_run = curate.open(tmp_path / "run").scores.collect()
    for column in ("el2n", "el2n_frob", "margin"):
        assert in_memory[column].equals(in_run[column])


def test_rows_that_a_run_would_set_aside_have_nulls(model: Path, caplog: pytest.LogCaptureFixture):
    frame = pl.DataFrame({"text": ["the cat", None, "", "a hat"]})
    with caplog.at_level(logging.WARNING):
        scores = curate.score(frame, scorers=["loss", "random"], model=model, task="causal-lm")
    assert scores["loss"].is_null().to_list() == [False, True, True, False]
    assert scores["random"].is_null().to_list() == [False, True, True, False]
    assert "2 rows are not scored" in caplog.text


def test_several_checkpoints_give_a_mean_and_a_spread(tmp_path: Path):
    folders = [save_language_model(tmp_path / str(seed), seed=seed) for seed in (1, 2, 3)]
    frame = pl.DataFrame({"text": TEXTS})
    each = [
        curate.score(frame, scorers=["loss"], model=folder, task="causal-lm")["loss"]
        for folder in folders
    ]
    scores = curate.score(frame, scorers=["loss"], checkpoints=folders, task="causal-lm")
    stacked = np.stack([loss.to_numpy().astype(np.float64) for loss in each])
    np.testing.assert_allclose(scores["loss"], stacked.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(scores["loss_std"], stacked.std(axis=0, ddof=1), rtol=1e-4)


def test_classes_by_name(tmp_path: Path):
    folder = save_classifier(tmp_path)
    frame = pl.DataFrame({"text": TEXTS[:3], "kind": ["bad", "good", "fair"]})
    scores = curate.score(
        frame,
        scorers=["loss"],
        model=folder,
        task={"kind": "text-classification", "num_classes": 3},
        label="kind",
        classes=["good", "fair", "bad"],
    )
    numbered = curate.score(
        frame.with_columns(kind=pl.Series([2, 0, 1])),
        scorers=["loss"],
        model=folder,
        task={"kind": "text-classification", "num_classes": 3},
        label="kind",
    )
    assert scores["loss"].equals(numbered["loss"])


def test_numbers(tmp_path: Path):
    torch.manual_seed(0)
    network = MLP(num_features=2, num_classes=2, hidden=(4,))
    network.save_pretrained(tmp_path)
    frame = pl.DataFrame({"x": [0.5, -1.0, 2.0], "y": [1.0, 0.0, -1.0], "label": [0, 1, 1]})
    scores = curate.score(
        frame,
        scorers=["loss", "length"],
        model=tmp_path,
        task={"kind": "tabular-classification", "num_classes": 2},
        features=["x", "y"],
    )
    with torch.no_grad():
        logits = network(torch.from_numpy(frame.select("x", "y").to_numpy()).float())
    wanted = functional.cross_entropy(logits, torch.tensor([0, 1, 1]), reduction="none")
    np.testing.assert_allclose(scores["loss"], wanted.numpy(), rtol=1e-5)
    assert scores["num_tokens"].to_list() == [1, 1, 1]


def test_length_and_random_need_neither_model_nor_task():
    scores = curate.score(pl.DataFrame({"text": TEXTS}), scorers=["length", "random"])
    assert scores["num_tokens"].null_count() == 5
    assert scores["num_chars"].to_list() == [len(text) for text in TEXTS]
    assert scores["random"].n_unique() == 5
    again = curate.score(pl.DataFrame({"text": TEXTS}), scorers=["random"], seed=1)
    assert not again["random"].equals(scores["random"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scorers": ["loss"]}, ConfigError, "no task is set"),
        ({"scorers": ["loss"], "task": "causal-lm"}, ConfigError, "no model is set"),
        ({"scorers": ["lost"]}, ConfigError, "did you mean loss"),
        ({"scorers": []}, ConfigError, "empty"),
        ({"scorers": ["random"], "text": "txt"}, InputError, "no column 'txt'"),
        ({"scorers": [{"external": {"q": "q.csv"}}]}, ConfigError, "join them yourself"),
        ({"scorers": ["random"], "task": "causal"}, ConfigError, "did you mean causal-lm"),
    ],
)
def test_mistakes_end_in_one_clear_message(options: Any, error: type[CurateError], message: str):
    with pytest.raises(error, match=message):
        curate.score(pl.DataFrame({"text": TEXTS}), **options)


def test_a_dictionary_of_splits_is_refused_with_a_hint():
    splits: Any = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS})})
    with pytest.raises(ConfigError, match="one split"):
        curate.score(splits, scorers=["random"])


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Path:
    rows = {"text": [f"{text} {i}" for i in range(5) for text in TEXTS]}
    pl.DataFrame(rows).write_parquet(tmp_path / "a.parquet")
    settings = parse_settings(
        {
            "run": str(tmp_path / "run"),
            "sources": {"a": {"path": str(tmp_path / "a.parquet"), "text": "text"}},
            "task": {"kind": "causal-lm"},
            "model": {"name": str(model), "device": "cpu"},
            "index": {"partition_rows": 10},
            "score": {"scorers": ["el2n", "loss", "random"]},
        }
    )
    with open_run(settings) as settings:
        index_run(settings, pool=INLINE)
        score_run(settings, pool=INLINE)
        lengths_run(settings, pool=INLINE)
    return tmp_path / "run"


def test_the_tables_of_a_run_stand_side_by_side(run: Path):
    opened = curate.open(run)
    assert opened.scorers == ("el2n", "loss", "random")
    assert opened.checkpoints == ("model",)
    scores = opened.scores.collect()
    assert scores.columns[:3] == ["source", "file", "row"]
    assert {"el2n", "loss", "random", "el2n.num_scored", "loss.num_scored"} <= set(scores.columns)
    assert scores["row"].to_list() == list(range(25))
    assert opened.examples.collect().height == 25
    assert opened.lengths.collect()["num_tokens"].min() == scores["loss.num_scored"].min()
    quantities = opened.quantities("model").collect()
    assert quantities["loss"].equals(scores["loss"])
    assert opened.quarantine.collect().is_empty()
    assert opened.config["task"]["kind"] == "causal-lm"
    assert set(opened.manifest["stages"]) == {"index", "score", "lengths"}


def test_what_is_not_there_yet_names_the_command(run: Path, tmp_path: Path):
    opened = curate.open(run)
    with pytest.raises(InputError, match="not complete"):
        _ = opened.plan
    with pytest.raises(InputError, match="no plan"):
        _ = opened.plan_summary
    with pytest.raises(InputError, match="ask for no mixture"):
        _ = opened.mixture
    with pytest.raises(InputError, match="no run at"):
        curate.open(tmp_path / "elsewhere")


def test_scores_of_an_older_index_are_not_handed_out(run: Path):
    opened = curate.open(run)
    mark = sorted((run / "scores" / "loss" / ".done").glob("*.json"))[0]
    import json

    facts = json.loads(mark.read_text())
    write_json(mark, facts | {"rows": facts["rows"] - 1})
    with pytest.raises(CurateError, match="the index is newer"):
        _ = opened.scores


def test_numbers_are_plain_floats_a_notebook_can_use(model: Path):
    scores = curate.score(
        pl.DataFrame({"text": TEXTS}), scorers=["loss"], model=model, task="causal-lm"
    )
    worst = scores.with_row_index().top_k(1, by="loss")
    assert math.isfinite(worst["loss"][0])
    assert set(scores.dtypes) == {pl.Float32}


def test_the_guide_s_python_runs_as_it_stands(
    model: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    guide = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    assert len(blocks) == 2
    (tmp_path / "models").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "models" / "small").symlink_to(model)
    (tmp_path / "runs" / "news").symlink_to(run)
    pl.DataFrame({"body": TEXTS * 3}).write_parquet(tmp_path / "data.parquet")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert names["worst"].height == 10
    assert names["worst"]["loss"].is_sorted(descending=True)
