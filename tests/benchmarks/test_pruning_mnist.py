"""Pruning by EL2N and GraNd against random on MNIST: the experiment of "Deep Learning on a Data
Diet" in small, judged by `curate compare`.

6,000 digits, a small convolutional network, the highest scores kept, as in the paper: 20, 40, 60
and 80 %, every arm trained for the same number of steps. Prints the table of docs/pruning.md;
about ten minutes of one core. Data: the folder `mnist` under CURATE_DATA.
"""

import os
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
from evaluate.compared_digits import compare

import curate
from curate.cli.compare import comparison_lines
from jobs.settings import Settings, parse_settings

pytestmark = pytest.mark.timeout(3600)

SHARES = (0.2, 0.4, 0.6, 0.8)
SEEDS = (0, 1, 2, 3, 4)
"""Of the runs that score, and of the training of each arm."""
TRAIN_ROWS, TEST_ROWS = 6000, 2000
STEPS = 600
_NAMES = {"plan": "EL2N", "grand": "GraNd", "everything": "everything"}
TOKENS_A_DIGIT = 13
"""28 x 28 pixels, 64 of them a token."""


def test_the_hardest_digits_are_compared_with_random_ones(tmp_path: Path):
    pool, target = _subset(tmp_path, "train", TRAIN_ROWS), _subset(tmp_path, "test", TEST_ROWS)
    table = ["| kept | arm | mean | spread | to random | 95 % interval | p | verdict | found |"]
    for share in SHARES:
        summary = compare(_settings(tmp_path / "run", pool, target, share))
        print("", *comparison_lines(summary, "run"), sep="\n", flush=True)
        table += _lines(share, summary, tmp_path / "run")
        print("", *table, sep="\n", flush=True)
        assert {v["arm"] for v in summary["verdicts"]} >= {"plan", "grand"}
        if share == SHARES[0]:
            scores = curate.open(tmp_path / "run").scores.collect()
            found = scores.select(pl.corr("el2n", "grand", method="spearman")).item()
            print(f"Spearman's correlation of EL2N and GraNd: {found:.3f}", flush=True)
        assert all(v["word"] != "no verdict" for v in summary["verdicts"])


def _subset(folder: Path, part: str, rows: int) -> Path:
    """The first rows: the files are in an order that a hash of their names gives."""
    root = os.environ.get("CURATE_DATA")
    if root is None:
        pytest.skip("CURATE_DATA names no folder with the data set mnist")
    path = folder / f"{part}.parquet"
    pq.write_table(pq.read_table(Path(root) / "mnist" / f"{part}.parquet").slice(0, rows), path)
    return path


def _settings(run: Path, pool: Path, target: Path, share: float) -> Settings:
    columns = {"image": "image", "label": "label"}
    rules = {"keep": share, "order": "hardest", "draw": "top", "within": "all"}
    train = {
        "epochs": 2,
        "seeds": list(SEEDS),
        "lr": 3e-3,
        "batch_tokens": 64 * TOKENS_A_DIGIT,
    }
    arms: list[Any] = ["plan", "random", {"name": "grand", "rules": {"score": "grand", **rules}}]
    arms += ["everything"] if share == SHARES[0] else []
    return parse_settings(
        {
            "run": str(run),
            "sources": {"mnist": {"path": str(pool), **columns}},
            "target": {"path": str(target), **columns},
            "task": {"kind": "image-classification", "num_classes": 10, "channels": 1},
            "model": {
                "config": {
                    "model_type": "cnn", "widths": [8, 16], "hidden": [64], "norm": "none",
                }
            },
            "checkpoints": {"train": train},
            "index": {"held_out": 0.0},
            "score": {"scorers": ["el2n", "grand"], "checkpoints": "last"},
            "plan": {"score": "el2n", **rules},
            "compare": {
                "seeds": list(SEEDS),
                "steps": STEPS,
                "held_out_examples": TEST_ROWS,
                "arms": arms,
            },
        }
    )  # fmt: skip


def _lines(share: float, summary: dict[str, Any], run: Path) -> list[str]:
    """Random once, over all its draws, then every arm against it."""
    measured = pl.read_parquet(run / "compare" / "table.parquet").filter(
        (pl.col("part") == "target") & (pl.col("metric") == "accuracy")
    )
    drawn = measured.filter(pl.col("arm").str.starts_with("random"))["value"]
    lines = [f"| {share:.0%} | random | {drawn.mean():.4f} | {drawn.std():.4f} | | | | | |"]
    for verdict in summary["verdicts"]:
        test, own = verdict["test"], measured.filter(pl.col("arm") == verdict["arm"])["value"]
        low, high = test["interval"]
        lines.append(
            f"| {share:.0%} | {_NAMES[verdict['arm']]} | {own.mean():.4f} | {own.std():.4f}"
            f" | {test['mean']:+.4f} | {low:+.4f} to {high:+.4f} | {verdict['corrected_p']:.3f}"
            f" | {verdict['word']} | {verdict['detectable_difference']:.3f} |"
        )
    return lines
