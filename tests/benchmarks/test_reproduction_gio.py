"""GIO in small: is a model that learns what GIO chooses better on the target than one that learns a
random choice of the same size, or everything? Rows of docs/reproductions.md.

    CURATE_DATA=... pytest tests/benchmarks/test_reproduction_gio.py -s \\
        -o addopts=--import-mode=importlib

6,000 digits of MNIST of 14 by 14; the target are 100 of the classes 0 to 4, and measured is on
1,000 others of these classes. A network 196-64-10, 400 steps of 64, ten seeds; pixels are the
vectors.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from evaluate.compared_digits import compare
from PIL import Image
from reproduction import data_folder, line, of_verdict

import curate
from jobs.cluster import InlineExecutor, Pool
from jobs.embedding import embed_run
from jobs.index import index_run
from jobs.score import score_run
from jobs.settings import parse_settings

pytestmark = pytest.mark.timeout(0)

TRAINED = tuple(range(10))
SETTING = "MNIST 14 x 14, 6,000 in the pool, target 100 of the digits 0 to 4; 13,258 parameters"
SOURCE = {"features": "x", "label": "label"}
TASK = {"kind": "tabular-classification", "num_classes": 10}


def digits(part: str) -> pl.DataFrame:
    frame = pl.read_parquet(data_folder("mnist") / f"{part}.parquet")
    frame = frame if part == "test" else frame[:6000]
    images = np.stack([np.array(Image.open(io.BytesIO(image))) for image in frame["image"]])
    pixels = (images.astype(np.float32) / 255).reshape(-1, 14, 2, 14, 2).mean((2, 4))
    return pl.DataFrame({"x": pixels.reshape(len(pixels), -1), "label": frame["label"]})


def test_what_gio_chooses_against_a_random_choice(tmp_path: Path):
    torch.set_num_threads(1)
    pool, low = digits("train"), digits("test").filter(pl.col("label") < 5)
    pool.write_parquet(tmp_path / "pool.parquet")
    low[:100].write_parquet(tmp_path / "wanted.parquet")
    low[100:1100].write_parquet(tmp_path / "test.parquet")
    values: dict[str, Any] = {
        "run": str(tmp_path / "run"),
        "sources": {"pool": {"path": str(tmp_path / "pool.parquet"), **SOURCE}},
        "target": {"path": str(tmp_path / "wanted.parquet"), **SOURCE},
        "task": TASK,
        "index": {"held_out": 0.0},
        "score": {"scorers": ["gio"]},
    }
    settings, inline = parse_settings(values), Pool(InlineExecutor(), 1)
    index_run(settings, pool=inline)
    embed_run(settings, pool=inline)
    score_run(settings, pool=inline)
    scores = curate.open(settings.run).scores.sort("row").collect()
    scores.select("file", "row", "gio").write_parquet(tmp_path / "scores.parquet")
    chosen = scores["gio"].is_not_null().to_numpy()
    wanted = (pool["label"].to_numpy()[chosen] < 5).mean()
    print(f"chosen {chosen.sum()}, of the wanted digits {wanted:.3f}")
    values |= {
        "run": str(tmp_path / "compared"),
        "target": {"path": str(tmp_path / "test.parquet"), **SOURCE},
        "model": {"config": {"model_type": "mlp", "hidden": [64]}, "device": "cpu"},
        "checkpoints": {"train": {"epochs": 10, "lr": 3e-3, "batch_tokens": 64}},
        "score": {"scorers": [{"external": {"chosen": str(tmp_path / "scores.parquet")}}]},
        "plan": {"score": "chosen.gio", "order": "easiest", "within": "all",
                 "keep": {"examples": int(chosen.sum())}},
        "compare": {"seeds": list(TRAINED), "steps": 400, "metric": "accuracy",
                    "arms": ["plan", "random", "everything"]},
    }  # fmt: skip
    verdicts = {verdict["arm"]: verdict for verdict in compare(parse_settings(values))["verdicts"]}
    for verdict in verdicts.values():
        print(verdict["sentence"], flush=True)
    found = of_verdict(verdicts["plan"], seeds=len(TRAINED))
    figure = "accuracy on the target's digits, GIO's choice minus a random one"
    print("\n" + line("beats a random choice", SETTING, figure, found, digits=4))
