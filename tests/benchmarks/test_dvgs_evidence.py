"""Does `dvgs` find wrong labels, and what does it stand on? Digits, and real labels by rules.

    python -m pytest tests/benchmarks/test_dvgs_evidence.py -s

The first table is of scikit-learn's digits: 1,000 in the pool, a fifth of their labels replaced by
another class, 300 clean ones as the target, five draws of all that. The second is of messages whose
labels come from rules (CURATE_DATA, `sms_spam`), a target of 300 with true labels.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from sklearn.datasets import load_digits
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import roc_auc_score

import curate
from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.score import score_run
from jobs.settings import parse_settings

pytestmark = pytest.mark.timeout(1800)

SEEDS = range(5)
VARIANTS: dict[str, dict[str, Any]] = {
    "10 epochs (30 steps)": {"epochs": 10},
    "30 epochs (90 steps)": {"epochs": 30},
    "100 epochs, every third of 300 steps (default)": {"epochs": 100},
    "100 epochs, all 300 steps": {"epochs": 100, "every": 1},
    "30 epochs, every fifth step": {"epochs": 30, "every": 5},
    "30 epochs, a third of the pool at each step": {"epochs": 30, "subsample": 3},
    "30 epochs, steps weighed by norm": {"epochs": 30, "weight_by_norm": True},
    "30 epochs, ranks of the cosine": {"epochs": 30, "aggregate": "rank"},
    "30 epochs, last layer alone": {"epochs": 30, "parameters": r"layers\.2"},
    "30 epochs, the target as one batch": {"epochs": 30, "batch_size": 300},
    "30 epochs, learning rate 1e-2": {"epochs": 30, "lr": 1e-2},
    "30 epochs, learning rate 1e-4": {"epochs": 30, "lr": 1e-4},
    "30 epochs, a target of 30": {"epochs": 30},
}
COLUMNS = ("dvgs", "dvgs_dot", "dvgs_projection", "dvgs_distance", "dvgs_target_loss")


def write_digits(folder: Path, seed: int, *, num_target: int = 300) -> np.ndarray:
    """Pool and target; returns which labels of the pool were replaced."""
    features, labels = load_digits(return_X_y=True)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(labels))
    pool, target = order[:1000], order[1000 : 1000 + num_target]
    wrong = np.zeros(1000, dtype=bool)
    wrong[generator.permutation(1000)[:200]] = True
    given = np.where(wrong, (labels[pool] + generator.integers(1, 10, 1000)) % 10, labels[pool])
    write_table(folder / "pool.parquet", features[pool], given)
    write_table(folder / "target.parquet", features[target], labels[target])
    return wrong


def write_table(path: Path, features: Any, labels: Any) -> None:
    table = {"x": np.asarray(features, dtype=np.float32), "label": np.asarray(labels)}
    pl.DataFrame(table).write_parquet(path)


def scores_of(
    folder: Path, options: dict[str, Any], *, seed: int, num_classes: int, scale: float
) -> pl.DataFrame:
    source = {"features": "x", "label": "label"}
    settings = parse_settings(
        {
            "run": str(folder / "run"),
            "seed": seed,
            "sources": {"pool": {"path": str(folder / "pool.parquet"), **source}},
            "target": {"path": str(folder / "target.parquet"), **source},
            "task": {"kind": "tabular-classification", "num_classes": num_classes, "scale": scale},
            "model": {"config": {"model_type": "mlp", "hidden": [64]}, "device": "cpu"},
            "index": {"held_out": 0.0},
            "score": {"scorers": [{"dvgs": options}]},
        }
    )
    pool = Pool(InlineExecutor(), 1)
    index_run(settings, pool=pool)
    score_run(settings, pool=pool)
    return curate.open(settings.run).scores.sort("row").collect()


def found(wrong: np.ndarray, scores: pl.DataFrame) -> list[float]:
    """AUROC of finding the wrong labels by each column."""
    signs = [1.0 if column == "dvgs_target_loss" else -1.0 for column in COLUMNS]
    return [
        float(roc_auc_score(wrong, sign * scores[column].to_numpy()))
        for column, sign in zip(COLUMNS, signs, strict=True)
    ]


def show(title: str, rows: dict[str, np.ndarray]) -> None:
    print(f"\n| {title} | {' | '.join(COLUMNS)} |")
    print("| --- |" + " --- |" * len(COLUMNS))
    for name, values in rows.items():
        cells = [f"{values[:, i].mean():.3f} ± {values[:, i].std(ddof=1):.3f}"
                 for i in range(len(COLUMNS))]  # fmt: skip
        print(f"| {name} | {' | '.join(cells)} |")


def test_wrong_labels_of_digits_are_found_by_more_steps_and_a_larger_target(tmp_path: Path):
    rows: dict[str, list[list[float]]] = {name: [] for name in VARIANTS}
    means: list[tuple[float, float]] = []
    for seed in SEEDS:
        for number, (name, options) in enumerate(VARIANTS.items()):
            folder = tmp_path / f"{seed}-{number}"
            folder.mkdir()
            wrong = write_digits(folder, seed, num_target=30 if "target of 30" in name else 300)
            scores = scores_of(folder, options, seed=seed, num_classes=10, scale=0.0625)
            rows[name].append(found(wrong, scores))
            if name.startswith("100 epochs, all"):
                values = scores["dvgs"].to_numpy()
                means.append((values[wrong].mean(), values[~wrong].mean()))
    tables = {name: np.array(values) for name, values in rows.items()}
    show("digits, a fifth of the labels wrong", tables)
    print(f"\nmean cosine of wrong and right labels: {np.mean(means, axis=0).round(3)}")
    cosine = [tables[name][:, 0].mean() for name in VARIANTS]
    assert cosine[0] < cosine[1] < cosine[3]
    assert cosine[3] > 0.97
    assert cosine[-1] < cosine[1] - 0.1
    assert all(low < 0 < high for low, high in means)


def write_messages(folder: Path, seed: int) -> np.ndarray:
    """Messages labelled by rules, and a target with true labels; returns where the rules err."""
    data = Path(os.environ["CURATE_DATA"]) / "sms_spam"
    train, test = (pl.read_parquet(data / f"{part}.parquet") for part in ("train", "test"))
    pool = train.filter(pl.col("rule_label") >= 0)
    others = test.filter(~pl.col("text").is_in(train["text"].to_list()))
    target = others.sample(300, shuffle=True, seed=seed)
    words = TfidfVectorizer(max_features=1000, sublinear_tf=True).fit(pool["text"].to_list())
    for name, table, label in (("pool", pool, "rule_label"), ("target", target, "label")):
        features = words.transform(table["text"].to_list()).toarray()
        write_table(folder / f"{name}.parquet", features, table[label].cast(pl.Int64).to_numpy())
    return pool["rule_wrong"].cast(pl.Boolean).to_numpy()


@pytest.mark.skipif("CURATE_DATA" not in os.environ, reason="CURATE_DATA names no folder of data")
def test_labels_that_rules_got_wrong_are_found(tmp_path: Path):
    """Tf-idf features, so that the network is the one of the digits."""
    variants = {"30 epochs": {"epochs": 30}, "100 epochs": {"epochs": 100}}
    rows: dict[str, list[list[float]]] = {name: [] for name in variants}
    for seed in range(3):
        for name, options in variants.items():
            folder = tmp_path / f"{seed}-{name}"
            folder.mkdir()
            wrong = write_messages(folder, seed)
            scores = scores_of(folder, options, seed=seed, num_classes=2, scale=1.0)
            rows[name].append(found(wrong, scores))
    show("messages labelled by rules, 3.1 % wrong", {n: np.array(v) for n, v in rows.items()})
    assert np.mean(rows["100 epochs"], axis=0)[0] > 0.6
