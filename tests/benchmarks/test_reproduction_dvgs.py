"""DVGS in small: are wrong labels found, and does it help to leave them out? Rows of
docs/reproductions.md; more settings of DVGS are in test_dvgs_evidence.py.

    pytest tests/benchmarks/test_reproduction_dvgs.py -s -o addopts=--import-mode=importlib

scikit-learn's digits: 1,000 in the pool, a fifth of the labels wrong, 300 clean ones as the target
of DVGS, 497 others to measure on; a network 64-64-10. Five draws for the labels; then the first of
them with ten seeds of training.
"""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from evaluate.compared_digits import compare
from reproduction import SEEDS, line, of_values, of_verdict
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import curate
from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.score import score_run
from jobs.settings import parse_settings

pytestmark = pytest.mark.timeout(0)

POOL, TARGET = 1000, 300
TRAINED = tuple(range(10))
SETTING = "scikit-learn's digits, 1,000 in the pool, a fifth of the labels wrong, 4,810 parameters"
SOURCE = {"features": "x", "label": "label"}
TASK = {"kind": "tabular-classification", "num_classes": 10, "scale": 0.0625}
MODEL: dict[str, Any] = {"config": {"model_type": "mlp", "hidden": [64]}, "device": "cpu"}


def write(folder: Path, seed: int) -> np.ndarray:
    """pool, trusted and test; returns which labels of the pool are wrong."""
    folder.mkdir()
    features, labels = load_digits(return_X_y=True)
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(labels))
    wrong = np.zeros(POOL, dtype=bool)
    wrong[draw.permutation(POOL)[: POOL // 5]] = True
    given = labels[order].copy()
    shifted = (given[:POOL] + draw.integers(1, 10, POOL)) % 10
    given[:POOL] = np.where(wrong, shifted, given[:POOL])
    ends = {"pool": (0, POOL), "trusted": (POOL, POOL + TARGET), "test": (POOL + TARGET, None)}
    for name, (start, end) in ends.items():
        rows = np.asarray(features[order][start:end], dtype=np.float32)
        table = pl.DataFrame({"x": rows, "label": given[start:end]})
        table.write_parquet(folder / f"{name}.parquet")
    return wrong


def scores_of(folder: Path, seed: int) -> pl.DataFrame:
    """DVGS of the pool by every step of 100 epochs on the trusted digits."""
    settings = parse_settings(
        {
            "run": str(folder / "run"),
            "seed": seed,
            "sources": {"pool": {"path": str(folder / "pool.parquet"), **SOURCE}},
            "target": {"path": str(folder / "trusted.parquet"), **SOURCE},
            "task": TASK,
            "model": MODEL,
            "index": {"held_out": 0.0},
            "score": {"scorers": [{"dvgs": {"epochs": 100, "every": 1}}]},
        }
    )
    pool = Pool(InlineExecutor(), 1)
    index_run(settings, pool=pool)
    score_run(settings, pool=pool)
    return curate.open(settings.run).scores.sort("row").collect()


def test_wrong_labels_are_found(tmp_path: Path):
    torch.set_num_threads(1)
    areas: dict[str, list[float]] = {"dvgs": [], "the loss of the target's model": []}
    for seed in SEEDS:
        folder = tmp_path / str(seed)
        wrong = write(folder, seed)
        scores = scores_of(folder, seed)
        areas["dvgs"].append(float(roc_auc_score(wrong, -scores["dvgs"].to_numpy())))
        loss = scores["dvgs_target_loss"].to_numpy()
        areas["the loss of the target's model"].append(float(roc_auc_score(wrong, loss)))
    print({name: [round(area, 4) for area in own] for name, own in areas.items()})
    own, loss = areas.values()
    found = of_values(own, against=0.5, claimed="above")
    figure = "AUROC of wrong labels by DVGS"
    print("\n" + line("wrong labels are low", SETTING, figure, found, signed=False))
    beyond = [one - other for one, other in zip(own, loss, strict=True)]
    figure = "AUROC, DVGS minus the loss of the model trained on the target"
    print(line("better than a plain baseline", SETTING, figure, of_values(beyond, claimed="above")))


def test_leaving_out_the_lowest_fifth(tmp_path: Path):
    torch.set_num_threads(1)
    folder = tmp_path / "digits"
    wrong = write(folder, 0)
    scores = scores_of(folder, 0)
    scores.select("file", "row", "dvgs").write_parquet(folder / "scores.parquet")
    lowest = scores["dvgs"].arg_sort().to_numpy()[: POOL // 5]
    print(f"wrong among the lowest fifth: {wrong[lowest].mean():.3f}")
    rules: dict[str, Any] = {"score": "values.dvgs", "keep": 0.8, "within": "all"}
    settings = parse_settings(
        {
            "run": str(folder / "compared"),
            "sources": {"pool": {"path": str(folder / "pool.parquet"), **SOURCE}},
            "target": {"path": str(folder / "test.parquet"), **SOURCE},
            "task": TASK,
            "model": MODEL,
            "checkpoints": {"train": {"epochs": 10, "lr": 3e-3, "batch_tokens": 64}},
            "index": {"held_out": 0.0},
            "score": {"scorers": [{"external": {"values": str(folder / "scores.parquet")}}]},
            "plan": {**rules, "order": "hardest"},
            "compare": {
                "seeds": list(TRAINED),
                "steps": 400,
                "arms": ["plan", "random", "everything",
                         {"name": "lowest", "rules": {**rules, "order": "easiest"}}],
            },
        }
    )  # fmt: skip
    verdicts = {verdict["arm"]: verdict for verdict in compare(settings)["verdicts"]}
    for verdict in verdicts.values():
        print(verdict["sentence"], flush=True)
    found = of_verdict(verdicts["plan"], seeds=len(TRAINED))
    figure = "accuracy on clean digits, without the lowest fifth minus random four fifths"
    print("\n" + line("leaving out low values helps", SETTING, figure, found, digits=4))
    found = of_verdict(verdicts["lowest"], seeds=len(TRAINED), claimed="hurts")
    figure = "accuracy on clean digits, without the highest fifth minus random four fifths"
    print(line("leaving out high values hurts", SETTING, figure, found, digits=4))
