"""scikit-learn's digits as a pool with wrong labels, for tests of comparisons by real training."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from sklearn.datasets import load_digits

from jobs.all_stages import run_stages, stages_for
from jobs.cluster import Cluster, open_pool
from jobs.settings import Settings, parse_settings


def write_digits(
    folder: Path, *, rows: int = 1000, flipped: float = 0.0, seed: int = 0
) -> tuple[Path, Path]:
    """Write a pool and a clean target; returns both files.

    In the pool the labels of a share of the rows are wrong; those rows are the domain `noise`, the
    others `clean`.
    """
    pixels, labels = load_digits(return_X_y=True)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(labels))
    pixels, labels = np.asarray(pixels)[order] / 16.0, np.asarray(labels)[order]
    is_wrong = generator.random(rows) < flipped
    wrong = (labels[:rows] + generator.integers(1, 10, rows)) % 10
    pool, target = folder / "pool.parquet", folder / "target.parquet"
    _write(pool, pixels[:rows], np.where(is_wrong, wrong, labels[:rows]),
           np.where(is_wrong, "noise", "clean"))  # fmt: skip
    _write(target, pixels[1300:], labels[1300:], np.full(len(labels) - 1300, "clean"))
    return pool, target


def digits_settings(run: Path, pool: Path, target: Path | None = None, **changes: Any) -> Settings:
    """Settings of a small comparison; a change replaces a whole top-level key."""
    columns = {"features": "features", "label": "label"}
    values: dict[str, Any] = {
        "run": str(run),
        "sources": {"digits": {"path": str(pool), **columns, "domain": "domain"}},
        "task": {"kind": "tabular-classification", "num_classes": 10},
        "model": {"config": {"model_type": "mlp", "hidden": [16]}},
        "checkpoints": {"train": {"epochs": 4, "lr": 1e-2, "batch_tokens": 32}},
        "index": {"held_out": 0.2, "partition_rows": 250},
        "plan": {"keep": 0.5},
        "compare": {"seeds": [0, 1, 2], "steps": 30},
        **changes,
    }
    if target is not None:
        values["target"] = {"path": str(target), **columns, "domain": "domain"}
    return parse_settings(values)


def compare(settings: Settings, cluster: Cluster | None = None) -> dict[str, Any]:
    """Run all that a comparison needs, and the comparison."""
    with open_pool(cluster or Cluster()) as pool:
        return run_stages(settings, stages_for(settings, "compare"), pool=pool)["compare"]


def words(summary: dict[str, Any]) -> dict[str, str]:
    """Arm -> verdict."""
    return {verdict["arm"]: verdict["word"] for verdict in summary["verdicts"]}


def _write(path: Path, pixels: Any, labels: Any, domains: Any) -> None:
    table = pl.DataFrame(
        {
            "features": pl.Series(pixels.astype(np.float32).tolist(), dtype=pl.List(pl.Float32)),
            "label": labels.astype(np.int64),
            "domain": domains.astype(str).tolist(),
        }
    )
    table.write_parquet(path, row_group_size=250)
