"""VoG in small: does the model err more where VoG is high, and are wrong labels found? Rows of
docs/reproductions.md; the tables of planted groups are test_vog_evidence.py's.

    CURATE_DATA=... pytest tests/benchmarks/test_reproduction_vog.py -s \\
        -o addopts=--import-mode=importlib

2,400 digits of MNIST of 14 by 14, half of them held out, a network with one hidden layer of 64, ten
checkpoints over 20 epochs; five draws of digits and weights.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from reproduction import SEEDS, data_folder, line, of_values
from scipy.stats import rankdata

from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.score import score_run
from jobs.settings import parse_settings
from jobs.train import train_run

pytestmark = pytest.mark.timeout(0)

INLINE = Pool(InlineExecutor(), 1)
ROWS = 2400
SETTING = "MNIST 14 x 14, 1,200 to learn and 1,200 held out, 13,258 parameters, 10 checkpoints"


def digits(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(2400, 196) in [0, 1] and their classes."""
    frame = pl.read_parquet(data_folder("mnist") / "train.parquet").sample(ROWS, seed=seed)
    images = np.stack([np.array(Image.open(io.BytesIO(image))) for image in frame["image"]])
    pixels = (images.astype(np.float32) / 255).reshape(-1, 14, 2, 14, 2).mean((2, 4))
    return pixels.reshape(len(pixels), -1), frame["label"].to_numpy()


def scored(folder: Path, pixels: np.ndarray, labels: np.ndarray, seed: int) -> pl.DataFrame:
    """VoG, margin and EL2N of every digit, and whether it was held out."""
    folder.mkdir()
    pl.DataFrame({"x": pixels, "label": labels}).write_parquet(folder / "data.parquet")
    source = {"path": str(folder / "data.parquet"), "features": "x", "label": "label"}
    train = {"epochs": 20, "save_every_epochs": 2, "seeds": [seed], "lr": 5e-3, "batch_tokens": 64}
    values: dict[str, Any] = {
        "run": str(folder / "run"),
        "seed": seed,
        "sources": {"data": source},
        "task": {"kind": "tabular-classification", "num_classes": 10},
        "model": {"config": {"model_type": "mlp", "hidden": [64]}, "device": "cpu"},
        "index": {"held_out": 0.5},
        "checkpoints": {"train": train},
    }
    settings = parse_settings(values)
    index_run(settings, pool=INLINE)
    train_run(settings, pool=INLINE)
    for scorers, checkpoints in ((["vog"], "all"), (["margin", "el2n"], "last")):
        asked = {"scorers": scorers, "checkpoints": checkpoints}
        score_run(parse_settings({**values, "score": asked}), pool=INLINE)
    run = Path(settings.run)
    tables: list[Any] = [
        pl.read_parquet(run / "scores" / name / "*.parquet").select("row", name)
        for name in ("vog", "margin", "el2n")
    ]
    held_out = pl.read_parquet(run / "examples" / "*.parquet").select(
        "row", held_out=pl.col("split") == "held_out"
    )
    for table in tables:
        held_out = held_out.join(table, on="row")
    return held_out.sort("row")


def auroc(score: np.ndarray, positive: np.ndarray) -> float:
    ranks, count = rankdata(score), positive.sum()
    pairs = count * (len(score) - count)
    return float((ranks[positive].sum() - count * (count + 1) / 2) / pairs)


def test_the_model_errs_more_where_vog_is_high(tmp_path: Path):
    torch.set_num_threads(1)
    higher: list[float] = []
    thirds: list[list[float]] = []
    for seed in SEEDS:
        table = scored(tmp_path / str(seed), *digits(seed), seed)
        unseen = table.filter(pl.col("held_out")).sort("vog")
        wrong = (unseen["margin"] < 0).to_numpy()
        parts = [float(part.mean()) for part in np.array_split(wrong, 3)]
        thirds.append(parts)
        higher.append(parts[2] - parts[0])
        print(f"seed {seed}: wrong by thirds of VoG {[round(part, 3) for part in parts]}")
    print("means by thirds", np.mean(thirds, axis=0).round(4))
    found = of_values(higher, claimed="above")
    figure = "share of held-out digits that are misread, highest third by VoG minus lowest"
    print("\n" + line("high VoG, more errors", SETTING, figure, found))


def test_wrong_labels(tmp_path: Path):
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {"vog": [], "el2n": []}
    for seed in SEEDS:
        pixels, labels = digits(seed)
        draw = np.random.default_rng(seed)
        wrong = draw.random(ROWS) < 0.2
        labels = np.where(wrong, (labels + draw.integers(1, 10, ROWS)) % 10, labels)
        table = scored(tmp_path / str(seed), pixels, labels, seed)
        learned = (~table["held_out"]).to_numpy()
        for name, own in found.items():
            own.append(auroc(table[name].to_numpy()[learned], wrong[learned]))
        print(f"seed {seed}: " + ", ".join(f"{name} {own[-1]:.3f}" for name, own in found.items()))
    setting = SETTING + ", a fifth of the labels wrong"
    print("")
    for name, own in found.items():
        figure = f"AUROC of wrong labels by {name}"
        values = of_values(own, against=0.5, claimed="above")
        print(line("wrong labels are high", setting, figure, values, signed=False))
