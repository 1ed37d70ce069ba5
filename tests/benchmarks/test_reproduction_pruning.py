"""EL2N and GraNd in small: is the hardest half better than a random one, and with wrong labels?
Rows of docs/reproductions.md, beside those of MNIST in test_pruning_mnist.py.

    CURATE_DATA=... pytest tests/benchmarks/test_reproduction_pruning.py -s \\
        -o addopts=--import-mode=importlib

`-k digits`: one pool of scikit-learn's digits, a network 64-64-10 of 4,810 parameters, scores of
five runs of ten epochs; every arm is trained for 400 steps of 64 by ten seeds and measured on 497
other digits. One set may be lucky, and the verdict allows for that.

`-k pools`: ten pools of 1,500 digits of MNIST that share none, each with scores of its own (three
runs of ten epochs), each arm trained once on each pool: it is the way of choosing that is judged.
GraNd at initialisation is worked out here, since no checkpoint of a run is untrained.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from evaluate.compared_digits import compare, digits_settings, write_digits
from PIL import Image
from reproduction import SEEDS, data_folder, judged, line, of_verdict
from torch import nn

import curate

pytestmark = pytest.mark.timeout(0)

TRAINED = tuple(range(10))
SETTING = "scikit-learn's digits, 1,000 in the pool, 4,810 parameters, 400 steps of 64"
HARDEST: dict[str, Any] = {"keep": 0.5, "order": "hardest", "within": "all"}


def run(
    folder: Path, *, flipped: float, plan: dict[str, Any], arms: list[Any]
) -> dict[str, dict[str, Any]]:
    """Arm -> verdict."""
    pool, target = write_digits(folder, rows=1000, flipped=flipped)
    settings = digits_settings(
        folder / "run",
        pool,
        target,
        model={"config": {"model_type": "mlp", "hidden": [64]}},
        checkpoints={"train": {"epochs": 10, "seeds": list(SEEDS), "lr": 3e-3, "batch_tokens": 64}},
        index={"held_out": 0.0},
        score={"scorers": ["el2n", "grand"], "checkpoints": "last"},
        plan=plan,
        compare={"seeds": list(TRAINED), "steps": 400, "arms": arms},
    )
    summary = compare(settings)
    for verdict in summary["verdicts"]:
        print(verdict["sentence"], flush=True)
    return {verdict["arm"]: verdict for verdict in summary["verdicts"]}


def test_the_hardest_half_of_clean_digits(tmp_path: Path):
    verdicts = run(
        tmp_path,
        flipped=0.0,
        plan={"score": "el2n", **HARDEST},
        arms=["plan", "random", "everything",
              {"name": "grand", "rules": {"score": "grand", **HARDEST}}],
    )  # fmt: skip
    print("")
    for name, arm in (("EL2N", "plan"), ("GraNd", "grand")):
        found = of_verdict(verdicts[arm], seeds=len(TRAINED))
        figure = f"accuracy, hardest half by {name} minus random"
        print(line("the hardest half beats a random one", SETTING, figure, found, digits=4))
    scores = curate.open(tmp_path / "run").scores.collect()
    both = scores.select(pl.corr("el2n", "grand", method="spearman")).item()
    print(f"Spearman's correlation of EL2N and GraNd: {both:.3f}")


def test_the_hardest_digits_are_left_out_with_a_fifth_of_the_labels_wrong(tmp_path: Path):
    verdicts = run(
        tmp_path,
        flipped=0.2,
        plan={"score": "el2n", **HARDEST, "drop_first": 0.25},
        arms=["plan", "random", "everything",
              {"name": "hardest", "rules": {"score": "el2n", **HARDEST}},
              {"name": "grand", "rules": {"score": "grand", **HARDEST, "drop_first": 0.25}}],
    )  # fmt: skip
    print("")
    setting = SETTING + ", a fifth of the labels wrong"
    figure = "accuracy, half kept, {}, minus random"
    claim = "with noise the highest scores must go"
    for name, arm in (("EL2N", "plan"), ("GraNd", "grand")):
        found = of_verdict(verdicts[arm], seeds=len(TRAINED))
        what = figure.format(f"hardest quarter by {name} left out")
        print(line(claim, setting, what, found, digits=4))
    found = of_verdict(verdicts["hardest"], seeds=len(TRAINED), claimed="hurts")
    what = figure.format("hardest by EL2N")
    print(line("with noise the highest scores are bad", setting, what, found, digits=4))


POOLS, ROWS = 10, 1500
MNIST = (
    "MNIST 14 x 14, 10 pools of 1,500 with scores of their own, 13,258 parameters, 400 steps of 64"
)


def mnist(part: str, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, 196) in [0, 1] and their classes, in the files' own hashed order."""
    frame = pl.read_parquet(data_folder("mnist") / f"{part}.parquet")[:rows]
    images = np.stack([np.array(Image.open(io.BytesIO(image))) for image in frame["image"]])
    pixels = (images.astype(np.float32) / 255).reshape(-1, 14, 2, 14, 2).mean((2, 4))
    return pixels.reshape(len(pixels), -1), frame["label"].to_numpy().astype(np.int64)


def norms_at_initialisation(pixels: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """(rows,) mean gradient norm over ten untrained networks of the arms' kind."""
    inputs, targets = torch.from_numpy(pixels), torch.from_numpy(labels)
    total = torch.zeros(len(inputs))
    for number in range(10):
        torch.manual_seed(1000 * seed + number)
        first, last = nn.Linear(inputs.shape[1], 64), nn.Linear(64, 10)
        hidden = first(inputs).relu()
        errors = last(hidden).softmax(-1) - nn.functional.one_hot(targets, 10)
        inner = (errors @ last.weight) * (hidden > 0)
        # A layer's gradient is the outer product of an error and an input, with 1 for the bias.
        squared = errors.square().sum(1) * (hidden.square().sum(1) + 1)
        squared += inner.square().sum(1) * (inputs.square().sum(1) + 1)
        total += squared.sqrt().detach() / 10
    return total.numpy()


def one_pool(folder: Path, number: int, *, noise: bool) -> dict[str, float]:
    """Arm -> accuracy, of arms trained once on one pool."""
    folder.mkdir()
    pixels, labels = mnist("train", POOLS * ROWS)
    own = slice(number * ROWS, (number + 1) * ROWS)
    pixels, labels = pixels[own], labels[own]
    draw = np.random.default_rng(number)
    if noise:
        wrong = draw.random(ROWS) < 0.2
        labels = np.where(wrong, (labels + draw.integers(1, 10, ROWS)) % 10, labels)
    for name, rows in (("pool", (pixels, labels)), ("test", mnist("test", 2000))):
        table = pl.DataFrame({"features": rows[0], "label": rows[1], "domain": "digits"})
        table.write_parquet(folder / f"{name}.parquet")
    start = norms_at_initialisation(pixels, labels, number)
    table = pl.DataFrame({"file": "pool.parquet", "row": range(ROWS), "norm": start})
    table.write_parquet(folder / "start.parquet")
    drop = {**HARDEST, "drop_first": 0.25} if noise else HARDEST
    arms = {
        "grand": {"score": "grand", **drop},
        "hardest": {"score": "el2n", **HARDEST},
        "start": {"score": "start.norm", **HARDEST},
    }
    seeds = [number, number + 100, number + 200]
    settings = digits_settings(
        folder / "run",
        folder / "pool.parquet",
        folder / "test.parquet",
        model={"config": {"model_type": "mlp", "hidden": [64]}},
        checkpoints={"train": {"epochs": 10, "seeds": seeds, "lr": 3e-3, "batch_tokens": 64}},
        index={"held_out": 0.0},
        score={
            "scorers": ["el2n", "grand", {"external": {"start": str(folder / "start.parquet")}}],
            "checkpoints": "last",
        },
        plan={"score": "el2n", **drop},
        compare={
            "seeds": [number],
            "steps": 400,
            "held_out_examples": 2000,
            "arms": [
                "plan", "random", "everything",
                *({"name": name, "rules": rules} for name, rules in arms.items()),
            ],
        },
    )  # fmt: skip
    compare(settings)
    measured = pl.read_parquet(Path(settings.run) / "compare" / "table.parquet").filter(
        (pl.col("part") == "target") & (pl.col("metric") == "accuracy")
    )
    return dict(measured.select("arm", "value").iter_rows())


@pytest.mark.parametrize("noise", [False, True], ids=["clean", "noisy"])
def test_ways_of_choosing_over_pools(tmp_path: Path, noise: bool):
    torch.set_num_threads(1)
    values: dict[str, dict[int, float]] = {}
    for number in range(POOLS):
        found = one_pool(tmp_path / str(number), number, noise=noise)
        print(number, {arm: round(value, 4) for arm, value in found.items()}, flush=True)
        for arm, value in found.items():
            values.setdefault(arm, {})[number] = value
    setting = MNIST + (", a fifth of the labels wrong" if noise else "")
    told = {"plan": "EL2N", "grand": "GraNd", "start": "GraNd at initialisation"}
    if noise:
        told = {name: f"{score}, hardest quarter out" for name, score in told.items()}
        told |= {"start": "GraNd at initialisation", "hardest": "hardest by EL2N"}
    else:
        values.pop("hardest")  # the same rules as the plan's
    for against in ("random", "everything"):
        is_drawn = against == "random"
        given = {arm: own for arm, own in values.items() if is_drawn or "random" not in arm}
        verdicts = judged(tmp_path, given, against=against, metric="accuracy", better="higher")
        for verdict in verdicts.values():
            print(f"against {against}: {verdict['sentence']}", flush=True)
        for arm, name in told.items():
            claimed = "hurts" if arm == "hardest" else "helps"
            finding = of_verdict(verdicts[arm], seeds=POOLS, claimed=claimed)
            figure = f"accuracy, half kept, {name}, minus {against}"
            print(line("", setting, figure, finding, digits=4), flush=True)
