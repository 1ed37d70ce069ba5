"""Preference pairs through a run: the reference once, training by its loss, every checkpoint."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tiny_models import byte_tokenizer, save_language_model

from curate.data.files import read_json
from curate.errors import ConfigError
from curate.models.load import load_model
from curate.models.settings import Model, Preference
from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.score import measure_score, plan_score, score_run
from jobs.settings import Settings, parse_settings
from jobs.train import train_run

INLINE = Pool(InlineExecutor(), 1)
WORDS = ["the", "cat", "in", "a", "hat", "then", "sat", "there", "until", "dawn"]


def words(number: int, count: int) -> str:
    return " ".join(WORDS[(number * k) % 10] for k in range(1, 2 + count))


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Pairs, of which good answers end in `yes`, and two models."""
    rows = {
        "prompt": [words(i, 2) + "?" for i in range(24)],
        "chosen": [" " + words(i, i % 3) + " yes" for i in range(24)],
        "rejected": [" " + words(i + 1, i % 4) + " no" for i in range(24)],
    }
    pl.DataFrame(rows).write_parquet(tmp_path / "pairs.parquet")
    save_language_model(tmp_path / "model")
    save_language_model(tmp_path / "other", seed=1)
    return tmp_path


def settings_of(world: Path, **more: Any) -> Settings:
    values: dict[str, Any] = {
        "run": str(world / "run"),
        "sources": {"pairs": {"path": str(world / "pairs.parquet")}},
        "index": {"partition_rows": 10, "held_out": 0.2},
        "task": {"kind": "preference", "beta": 0.5, "max_tokens": 64},
        "model": {"name": str(world / "model"), "device": "cpu"},
        "score": {"scorers": ["el2n", "loss", "margin"], "batch_tokens": 200},
    }
    for key, value in more.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return parse_settings(values)


def indexed(world: Path, **more: Any) -> Settings:
    settings = settings_of(world, **more)
    index_run(settings, pool=INLINE)
    return settings


def column(settings: Settings, folder: str, name: str = "") -> pl.Series:
    paths = sorted((Path(settings.run) / "scores" / folder).glob("*.parquet"))
    return pl.concat([pl.read_parquet(path) for path in paths])[name or folder]


def loop_margins(world: Path) -> list[float]:
    """Of the model over the other one, by the models' own logits, answer by answer."""
    tokenizer = byte_tokenizer()
    models: list[Any] = [
        load_model(Model(name=str(world / name), device="cpu"), Preference()).model.double()
        for name in ("model", "other")
    ]
    found: list[float] = []
    for row in pl.read_parquet(world / "pairs.parquet").iter_rows(named=True):
        gains: list[float] = []
        for side in ("chosen", "rejected"):
            given = [tokenizer.bos_token_id, *tokenizer(row["prompt"]).input_ids]
            tokens = torch.tensor(given + tokenizer(row[side]).input_ids)
            sums: list[float] = []
            for model in models:
                with torch.no_grad():
                    logits = model(input_ids=tokens[None]).logits[0].log_softmax(-1)
                each = logits[:-1].gather(1, tokens[1:, None])[:, 0]
                sums.append(float(each[len(given) - 1 :].sum()))
            gains.append(sums[0] - sums[1])
        found.append(0.5 * (gains[0] - gains[1]))
    return found


def test_scores_compare_with_the_reference_that_is_measured_once(world: Path):
    settings = indexed(world, task={"reference": str(world / "other")})
    assert measure_score(settings)["seconds"] > 0
    before = plan_score(settings)
    assert before.done == 0
    first = score_run(settings, pool=INLINE)
    assert first["done"] == 3
    wanted = np.array(loop_margins(world))
    np.testing.assert_allclose(column(settings, "margin").to_numpy(), wanted, rtol=1e-4)
    np.testing.assert_allclose(
        column(settings, "loss").to_numpy(), np.log1p(np.exp(-wanted)), rtol=1e-4
    )
    state = plan_score(settings)
    assert state.done == state.total == before.total
    (folder,) = (world / "run" / "quantities").glob("reference-*")
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    assert len(stamps) == 3
    bolder = settings_of(world, task={"reference": str(world / "other"), "beta": 1.0})
    score_run(bolder, pool=INLINE)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.parquet")} == stamps
    np.testing.assert_allclose(column(bolder, "margin").to_numpy(), 2 * wanted, rtol=1e-4)


def test_another_reference_measures_anew(world: Path):
    settings = indexed(world, task={"reference": str(world / "other")})
    score_run(settings, pool=INLINE)
    own = settings_of(world)
    assert score_run(own, pool=INLINE)["done"] == 3
    assert column(own, "margin").abs().max() == pytest.approx(0, abs=1e-5)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("scorer", ["grand"])
def test_training_lowers_the_loss_and_starts_from_the_reference(world: Path, scorer: str):
    train = {"epochs": 6, "lr": 1e-3, "batch_tokens": 400, "save_every_epochs": 3, "warmup": 0.0}
    settings = indexed(
        world,
        checkpoints={"train": train},
        score={"scorers": ["margin", "loss", scorer]},
    )
    done = train_run(settings, pool=INLINE)
    first = pl.read_parquet(world / "run" / "checkpoints" / "seed-0" / "curve.parquet")
    assert first["loss"][0] == pytest.approx(np.log(2), rel=0.05)
    assert done["loss"]["seed-0"] < 0.5 * np.log(2)
    score_run(settings, pool=INLINE)
    assert (column(settings, "margin") > 0).mean() > 0.7  # pyright: ignore[reportOperatorIssue]
    assert column(settings, scorer).is_between(1e-6, 1e6).all()


def test_a_model_from_scratch_needs_a_reference_by_name(world: Path):
    settings = indexed(
        world,
        model={"name": None, "config": {"model_type": "llama", "hidden_size": 16},
               "tokenizer": str(world / "model")},
        checkpoints={"train": {"epochs": 1}},
    )  # fmt: skip
    with pytest.raises(ConfigError, match="but none is named"):
        train_run(settings, pool=INLINE)


def test_a_reference_with_another_tokenizer_is_refused(world: Path):
    save_language_model(world / "odd", tokenizer=byte_tokenizer(merges=False))
    settings = indexed(world, task={"reference": str(world / "odd")})
    with pytest.raises(ConfigError, match="is not that of"):
        score_run(settings, pool=INLINE)


def test_lengths_count_the_prompt_and_both_answers(world: Path):
    settings = indexed(world, score={"scorers": ["length"]})
    score_run(settings, pool=INLINE)
    tokenizer = byte_tokenizer()
    row = pl.read_parquet(world / "pairs.parquet").row(5, named=True)
    wanted = sum(len(tokenizer(text).input_ids) for text in row.values())
    assert column(settings, "length", "num_tokens")[5] == wanted
    assert not (world / "run" / "quantities").exists()  # nothing here needs a model
    assert read_json(world / "run" / "manifest.json") is not None


def test_a_table_in_memory_is_compared_with_the_model_that_training_started_from(world: Path):
    import curate

    frame = pl.read_parquet(world / "pairs.parquet")
    task = {"kind": "preference", "beta": 0.5, "reference": str(world / "other")}
    found = curate.score(frame, scorers=["margin"], model=world / "model", task=task)
    np.testing.assert_allclose(found["margin"].to_numpy(), loop_margins(world), rtol=1e-4)
    renamed = frame.rename({"chosen": "good", "rejected": "bad", "prompt": "asked"})
    columns: dict[str, Any] = {"prompt": "asked", "chosen": "good", "rejected": "bad"}
    again = curate.score(
        renamed,
        scorers=["margin"],
        model=world / "other",
        checkpoints=[world / "model"],
        task={"kind": "preference", "beta": 0.5},
        **columns,
    )
    np.testing.assert_allclose(again["margin"].to_numpy(), found["margin"].to_numpy(), rtol=1e-6)
    with pytest.raises(ConfigError, match="none is named"):
        curate.score(
            frame, scorers=["margin"], checkpoints=[world / "model"], task={"kind": "preference"}
        )


def test_settings_for_pairs_can_be_written_from_the_data(world: Path):
    from typer.testing import CliRunner

    from curate.cli.app import app

    out = world / "pairs.yaml"
    CliRunner().invoke(app, ["init", str(world / "pairs.parquet"), "--out", str(out)])
    text = out.read_text()
    assert "kind: preference" in text
    assert "chosen: chosen" in text
