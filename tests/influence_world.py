"""A pool and a target of rows of numbers, and networks small enough that no side is projected."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from curate.models.mlp import MLP
from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.score import score_run
from jobs.settings import Settings, parse_settings

INLINE = Pool(InlineExecutor(), 1)
BLOCKS = [32, 24]
"""Numbers of each layer's weights."""
TOPICS = ["a", "b", "b", "a", "b", "b"]


def save_mlp(folder: Path, *, draw: int, seed: int = 0, lr: float | None = None) -> str:
    torch.manual_seed(draw)
    MLP(num_features=4, num_classes=3, hidden=(8,)).save_pretrained(folder)
    more = "" if lr is None else f', "lr": {lr}'
    (folder / "checkpoint.json").write_text(f'{{"seed": {seed}, "step": {draw}{more}}}')
    return str(folder)


def rows(count: int, draw: int) -> pl.DataFrame:
    numbers = np.random.default_rng(draw).normal(size=(count, 4)).astype(np.float32)
    return pl.DataFrame({"x": numbers, "label": [i % 3 for i in range(count)]})


def pool() -> pl.DataFrame:
    return rows(30, 0)


def target() -> pl.DataFrame:
    topics = pl.Series("topic", TOPICS)
    return rows(6, 1).hstack([topics, pl.Series("number", range(6))])


def make_world(root: Path) -> Path:
    pool().write_parquet(root / "rows.parquet")
    target().write_parquet(root / "target.parquet")
    save_mlp(root / "step-1", draw=1, lr=0.4)
    save_mlp(root / "step-2", draw=2, lr=0.2)
    return root


def values_of(world: Path, options: Any, **more: Any) -> dict[str, Any]:
    columns = {"features": "x", "label": "label"}
    values: dict[str, Any] = {
        "run": str(world / "run"),
        "sources": {"rows": {"path": str(world / "rows.parquet"), **columns}},
        "target": {"path": str(world / "target.parquet"), "domain": "topic", **columns},
        "task": {"kind": "tabular-classification", "num_classes": 3},
        "model": {"device": "cpu"},
        "checkpoints": {"paths": [str(path) for path in sorted(world.glob("step-*"))]},
        "index": {"partition_rows": 10, "held_out": 0.0},
        "score": {"scorers": [{"influence": {"dtype": "float32", **options}}], "batch_tokens": 64},
    }
    return {**values, **more}


def settings_of(world: Path, options: Any, **more: Any) -> Settings:
    settings = parse_settings(values_of(world, options, **more))
    index_run(settings, pool=INLINE)
    return settings


def scored(settings: Settings, pool: Pool = INLINE) -> pl.DataFrame:
    score_run(settings, pool=pool)
    return table(settings, "scores/influence")


def table(settings: Settings, folder: str) -> pl.DataFrame:
    paths = sorted((Path(settings.run) / folder).glob("part-*.parquet"))
    return pl.concat([pl.read_parquet(path) for path in paths]).sort("source", "file", "row")
