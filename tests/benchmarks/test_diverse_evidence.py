"""What the diverse draws keep, beside random: coverage, classes, and a classifier on what is kept.

    CURATE_DATA=... CURATE_VECTORS=... pytest tests/benchmarks/test_diverse_evidence.py -s \
        -o addopts=--import-mode=importlib

`CURATE_VECTORS` names a folder with `clinc150/train.npy` and `test.npy`, sentence vectors in the
order of the set's tables beside them; without it the vectors are hashed words. A linear classifier
is fitted on the vectors of what is kept; its accuracy is on the test part, intents in scope.
"""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from sklearn.linear_model import RidgeClassifier

from curate.vectors.diverse import Budget, farthest_first, most_covering
from curate.vectors.ngrams import hashed_ngrams

SEEDS = (0, 1, 2, 3, 4)
SHARES = (0.02, 0.05, 0.1, 0.2)


def read(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Vectors and intents of one part of clinc150, without what is out of scope."""
    folder = os.environ.get("CURATE_VECTORS")
    if folder is not None:
        table = pl.read_parquet(Path(folder) / "clinc150" / f"{part}.parquet")
        vectors = np.load(Path(folder) / "clinc150" / f"{part}.npy")
    else:
        if "CURATE_DATA" not in os.environ:
            pytest.skip("set CURATE_DATA to the folder of the data sets")
        table = pl.read_parquet(Path(os.environ["CURATE_DATA"]) / "clinc150" / f"{part}.parquet")
        vectors = hashed_ngrams(table["text"].to_list(), dim=1024, ngrams=(1, 2), unit="words")
    intents = table["label_name"]
    inside = (intents != "oos").to_numpy()
    return np.asarray(vectors, np.float32)[inside], intents.to_numpy()[inside]


def unequal(vectors: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A pool in which intents are common or rare: 100 rows down to 5, as a log scale."""
    names = sorted(set(labels.tolist()))
    sizes = np.geomspace(100, 5, len(names)).astype(int)
    rows = np.concatenate(
        [np.flatnonzero(labels == name)[:size] for name, size in zip(names, sizes, strict=True)]
    )
    return vectors[rows], labels[rows]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("pool", ["equal", "unequal"])
def test_coverage_and_accuracy_of_what_is_kept(pool: str):
    vectors, labels = read("train")
    test, test_labels = read("test")
    if pool == "unequal":
        vectors, labels = unequal(vectors, labels)
    draws: dict[str, Any] = {
        "random": lambda rows, budget: np.arange(budget.most + 1),  # they are shuffled
        "k_centre": lambda rows, budget: farthest_first(rows, budget).order,
        "facility_location": lambda rows, budget: most_covering(rows, budget).order,
    }  # fmt: skip
    print(
        f"\n{pool}: {len(vectors):,} rows, {len(set(labels))} intents, {vectors.shape[1]} numbers"
    )
    found: dict[tuple[str, float], np.ndarray] = {}
    for share in SHARES:
        for name, draw in draws.items():
            lines = []
            for seed in SEEDS:
                order = np.random.default_rng(100 + seed).permutation(len(vectors))
                rows = vectors[order]
                started = time.process_time()
                kept = draw(rows, Budget.rows(len(rows), round(share * len(rows))))
                seconds = time.process_time() - started
                model = RidgeClassifier(alpha=1.0).fit(rows[kept], labels[order][kept])
                near = (rows @ rows[kept].T).max(axis=1)
                lines.append(
                    [
                        len(set(labels[order][kept])),
                        near.mean(),
                        near.min(),
                        100 * model.score(test, test_labels),
                        seconds,
                    ]
                )
            figures = np.array(lines)
            found[name, share] = figures
            mean, spread = figures.mean(axis=0), figures.std(axis=0, ddof=1)
            print(
                f"{share:5.0%} {name:18} intents {mean[0]:5.1f}  mean cosine {mean[1]:.3f}  least"
                f" {mean[2]:.3f}  accuracy {mean[3]:5.1f} ± {spread[3]:.1f}  {mean[4]:.1f} s",
                flush=True,
            )
    for share in SHARES:
        random = found["random", share].mean(axis=0)
        assert found["facility_location", share].mean(axis=0)[1] > random[1]
        assert found["k_centre", share].mean(axis=0)[2] > random[2]
