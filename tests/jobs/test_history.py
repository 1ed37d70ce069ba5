"""What training showed of each example, read again as quantities by epoch, and scored."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import curate
from curate.config import plain
from curate.data.example import KEY
from curate.data.layout import RunFolder
from curate.data.tables import read_examples
from curate.errors import CurateError, InputError
from jobs.cluster import InlineExecutor, Pool
from jobs.history import log_digest, log_tables, read_log
from jobs.index import index_run
from jobs.score import score_run
from jobs.settings import Settings, parse_settings
from jobs.train import train_run

INLINE = Pool(InlineExecutor(), 1)
LOGGED = ("forgetting", "confidence", "variability", "aum")
SWEPT = [{name: {"history": "checkpoints"}} for name in LOGGED]


def write_rows(path: Path, order: np.ndarray) -> None:
    """200 rows of three numbers and a class, in this order; `name` tells them apart."""
    generator = np.random.default_rng(0)
    features = generator.normal(size=(200, 3)).astype(np.float32)
    label = (features.sum(1) > 0).astype(int)
    label[:40] = 1 - label[:40]  # so that some are never learned
    path.mkdir(parents=True)
    pl.DataFrame({"x": features, "label": label, "name": np.arange(200)})[order].write_parquet(
        path / "rows.parquet"
    )


def made(root: Path, **changes: Any) -> Settings:
    train = {"epochs": 4, "seeds": [0, 1], "lr": 3e-2, "batch_tokens": 32, "schedule": "constant"}
    values: dict[str, Any] = {
        "run": str(root / "run"),
        "sources": {
            "toy": {"path": str(root / "data"), "features": "x", "label": "label", "id": "name"}
        },
        "index": {"held_out": 0.1, "partition_rows": 90},
        "task": {"kind": "tabular-classification", "num_classes": 2},
        "model": {"config": {"model_type": "mlp", "hidden": [8]}, "device": "cpu"},
        "checkpoints": {"train": train},
        "score": {"scorers": list(LOGGED)},
        **changes,
    }
    return parse_settings(values)


def with_scorers(settings: Settings, scorers: list[Any], **more: Any) -> Settings:
    return parse_settings({**plain(settings), "score": {"scorers": scorers}, **more})


def scores_of(settings: Settings) -> pl.DataFrame:
    """By the examples' own names, held-out ones with nulls."""
    opened = curate.open(settings.run)
    names = opened.examples.select(*KEY, "id", "split")
    joined = opened.scores.join(names, on=list(KEY))
    return joined.sort(pl.col("id").cast(pl.Int64)).collect()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    root = tmp_path_factory.mktemp("history")
    write_rows(root / "data", np.arange(200))
    settings = made(root)
    index_run(settings, pool=INLINE)
    train_run(settings, pool=INLINE)
    return settings


def test_the_log_has_a_row_for_each_epoch_and_nothing_of_held_out_examples(trained: Settings):
    run = RunFolder(Path(trained.run))
    parts = run.partitions()
    assert len(parts) == 3
    for part in parts:
        examples = read_examples(run, part)
        found = read_log(run, part, examples.select(KEY), 1)
        is_held_out = (examples["split"] == "held_out").to_numpy()
        for name, column in (
            ("loss_by_epoch", "loss"),
            ("correct_by_epoch", "correct"),
            ("margin_by_epoch", "margin"),
        ):
            values = found[name]
            assert values.shape == (4, examples.height)
            assert values.dtype == np.float64
            assert np.isnan(values[:, is_held_out]).all()
            assert np.isfinite(values[:, ~is_held_out]).all()
            for epoch in range(4):
                path = run.root / f"checkpoints/seed-1/log/epoch-{epoch:03d}/{part.name}.parquet"
                stored = pl.read_parquet(path)[column].to_list()
                shown = [None if np.isnan(value) else value for value in values[epoch]]
                assert shown == stored


def test_scores_are_those_of_the_epochs_averaged_over_seeds(trained: Settings):
    score_run(trained, pool=INLINE)
    scores = scores_of(trained)
    run = RunFolder(Path(trained.run))
    seeds: list[dict[str, list[float]]] = []
    for seed in (0, 1):
        tables = [
            pl.concat(
                [pl.read_parquet(folder / f"{part.name}.parquet") for part in run.partitions()]
            )
            for folder in sorted((run.checkpoints / f"seed-{seed}" / "log").iterdir())
        ]
        found: dict[str, list[float]] = {"aum": [], "confidence": [], "forgetting": []}
        for row in range(200):
            shown = [table.row(row, named=True) for table in tables]
            if shown[0]["loss"] is None:
                for values in found.values():
                    values.append(np.nan)
                continue
            right = [entry["correct"] >= 0.5 for entry in shown]
            falls = sum(a and not b for a, b in itertools.pairwise(right))
            found["forgetting"].append(falls if any(right) else 4)
            found["aum"].append(sum(entry["margin"] for entry in shown) / 4)
            found["confidence"].append(sum(np.exp(-entry["loss"]) for entry in shown) / 4)
        seeds.append(found)
    assert {value for found in seeds for value in found["forgetting"]} >= {0, 4}
    for name in ("aum", "confidence", "forgetting"):
        mean = (np.array(seeds[0][name]) + np.array(seeds[1][name])) / 2
        np.testing.assert_allclose(scores[name].cast(pl.Float64).to_numpy(), mean, rtol=1e-5)
        spread = np.abs(np.array(seeds[0][name]) - np.array(seeds[1][name])) / 2**0.5
        stds = scores[f"{name}_std"].cast(pl.Float64).to_numpy()
        np.testing.assert_allclose(stds, spread, rtol=1e-4, atol=1e-5)


def test_the_log_costs_no_pass_and_a_sweep_one_for_each_checkpoint(trained: Settings):
    run = RunFolder(Path(trained.run))
    assert not (run.root / "quantities").exists()
    summary = score_run(with_scorers(trained, [*SWEPT, "margin"]), pool=INLINE)
    assert len(summary["checkpoints"]) == 8
    assert summary["done"] == 8 * 3
    scores = scores_of(trained)
    # The margin's own mean over the checkpoints is the area under the margin.
    np.testing.assert_allclose(scores["aum"], scores["margin"], rtol=1e-5, atol=1e-6)
    assert scores["aum"].null_count() == 0  # a sweep looks at held-out examples too


def test_a_sweep_does_not_depend_on_the_order_of_the_rows_or_on_partitions(
    trained: Settings, tmp_path: Path
):
    score_run(with_scorers(trained, SWEPT), pool=INLINE)
    first = scores_of(trained)
    write_rows(tmp_path / "data", np.random.default_rng(3).permutation(200))
    folders = sorted((Path(trained.run) / "checkpoints").glob("seed-*/step-*"))
    paths = {"paths": [str(folder) for folder in folders]}
    other = made(tmp_path, checkpoints=paths, index={"held_out": 0.0, "partition_rows": 40})
    # The user's own checkpoints have no log: without an option they are swept.
    index_run(other, pool=INLINE)
    score_run(other, pool=INLINE)
    second = scores_of(other)
    for name in LOGGED:
        np.testing.assert_allclose(first[name], second[name], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(first[f"{name}_std"], second[f"{name}_std"], atol=1e-5)


def test_without_training_to_the_end_there_is_no_digest(trained: Settings):
    run = RunFolder(Path(trained.run))
    part = run.partitions()[0]
    assert log_digest(run, part, 0) != log_digest(run, part, 1)
    assert log_digest(run, part, 7) is None


def test_a_log_table_that_is_gone_is_named(trained: Settings):
    run = RunFolder(Path(trained.run))
    part = run.partitions()[0]
    path = log_tables(run, part, 1)[2]
    hidden = path.rename(path.with_suffix(".gone"))
    try:
        with pytest.raises(InputError, match=r"epoch-002.*lacks this table"):
            log_digest(run, part, 1)
    finally:
        hidden.rename(path)


def test_a_log_of_other_examples_is_refused(trained: Settings):
    run = RunFolder(Path(trained.run))
    part = run.partitions()[0]
    keys = read_examples(run, part, KEY).reverse()
    with pytest.raises(CurateError, match="differ at row 0"):
        read_log(run, part, keys, 0)
