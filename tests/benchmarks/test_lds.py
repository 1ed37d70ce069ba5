"""The linear datamodeling score of every way of attribution, on models retrained for it.

    CURATE_DATA=FOLDER pytest tests/benchmarks/test_lds.py -s -o addopts=--import-mode=importlib

Fifty random halves of the training examples, two or four models on each, their mean loss of each
query foretold; the ceiling is what as many other such models would reach. The sizes are those of
the comparison in dattri (Deng et al., NeurIPS 2024, arXiv:2410.04555): MNIST with 5,000 training
rows and logistic regression, or a network of 0.11 M parameters; and a small language model over the
characters of plays. Figures are printed; what is asserted is that nothing is broken.

Data: the folders `mnist` and `domains_en` under CURATE_DATA. kronfluence's EK-FAC runs beside ours
where it is installed, and is left out with a sentence where it is not. About twenty minutes of one
core: CURATE_BENCH_LDS=logistic,network,characters chooses among the three.
"""

import io
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from attribution_ways import Ways, has_kronfluence, kronfluence_scores, mean_trak
from many_models import Characters, Data, Recipe, losses_of, one_model, train_many
from PIL import Image
from torch import nn

from curate.evaluate.attribution import (
    Mean,
    ceiling,
    mean_over_queries,
    predictions,
    rank_agreement,
)
from curate.models.mlp import MLP

pytestmark = pytest.mark.timeout(7200)

WANTED = os.environ.get("CURATE_BENCH_LDS", "logistic,network,characters").split(",")
SUBSETS, ENSEMBLE = 50, 10

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass
class Bench:
    """One model and its data: retrained, then asked of each way."""

    name: str
    make: Callable[[], nn.Module]
    train: Data
    queries: Data
    recipe: Recipe
    models: int = 4
    """On each subset."""
    table: dict[str, tuple[Mean, float]] = field(default_factory=dict[str, tuple[Mean, float]])

    def __post_init__(self) -> None:
        torch.set_num_threads(1)
        started = time.process_time()
        num = len(self.train.targets)
        generator = np.random.default_rng(0)
        self.members = np.zeros((SUBSETS, num), dtype=np.bool_)
        for own in self.members:
            own[generator.permutation(num)[: num // 2]] = True
        half = train_many(
            self.make,
            self.train,
            np.concatenate([self.members] * self.models),
            [1000 + number for number in range(SUBSETS * self.models)],
            self.recipe,
        )
        losses = losses_of(self.make, half.weights, self.queries)
        self.outputs: list[Floats] = [-part for part in np.split(losses, self.models)]
        self.full = train_many(
            self.make,
            self.train,
            np.ones((ENSEMBLE, num), dtype=np.bool_),
            list(range(ENSEMBLE)),
            self.recipe,
        )
        parameters = sum(p.numel() for p in self.make().parameters())
        print(
            f"\n{self.name}: {num} training examples, {len(self.queries.targets)} queries,"
            f" {parameters:,} parameters, {self.recipe.epochs} epochs; loss of the queries"
            f" {losses.mean():.3f} (halves),"
            f" {losses_of(self.make, self.full.weights, self.queries).mean():.3f} (all);"
            f" trained in {time.process_time() - started:.0f} CPU seconds",
            flush=True,
        )

    def ways(self, number: int = 0) -> Ways:
        """Of one of the models on all examples."""
        return Ways(one_model(self.make, self.full.weights, number), self.train, self.queries)

    def tracin(self) -> Floats:
        total: Floats | float = 0.0
        for rate, weights in zip(self.full.rates, self.full.snapshots, strict=True):
            model = one_model(self.make, weights, 0)
            total = total + rate * Ways(model, self.train, self.queries).dot()
        return np.asarray(total)

    def say(self, name: str, way: Callable[[], Floats]) -> Floats:
        """Score a way, and print its row."""
        started = time.process_time()
        scores = way()
        seconds = time.process_time() - started
        measured: Floats = np.mean(self.outputs, axis=0)
        found = mean_over_queries(rank_agreement(predictions(scores, self.members), measured))
        self.table[name] = found, seconds
        print(_row(name, found, seconds), flush=True)
        return scores

    def common(self, *, dim: int, trak_dim: int) -> None:
        """The ways that every model has."""
        print("\n| way | LDS | 95 % interval | CPU s |\n| --- | ---: | --- | ---: |")
        ways = self.ways()
        dots = self.say("Grad-Dot", ways.dot)
        self.say("Grad-Cos", lambda: ways.cosine(dots))
        self.say(f"TracIn, {self.recipe.snapshots} checkpoints", self.tracin)
        for structure in ("blocks", "full"):
            self.say(
                f"projected influence, {structure}, p = {dim}",
                lambda structure=structure: ways.projected(dim=dim, structure=structure),
            )
        parts = [self.ways(number).trak(dim=trak_dim, seed=number, share=0.1)
                 for number in range(ENSEMBLE)]  # fmt: skip
        self.say(f"TRAK-1, p = {trak_dim}", lambda: mean_trak(parts[:1]))
        self.say(f"TRAK-{ENSEMBLE}, p = {trak_dim}", lambda: mean_trak(parts))
        self.say("K-FAC", lambda: ways.ekfac(corrected=False))
        ours = self.say("EK-FAC", ways.ekfac)
        self.say("EK-FAC, queries of rank 32", lambda: ways.ekfac(rank=32))
        again = self.say("EK-FAC, other labels drawn", lambda: ways.ekfac(seed=1))
        self.say("EK-FAC, eigenvalues by the factors' labels", lambda: ways.ekfac(redraws=False))
        self.say("EK-FAC, 8 labels for each example", lambda: ways.ekfac(seed=2, rounds=8))
        if not has_kronfluence():
            print("kronfluence is not installed: its EK-FAC is left out")
            return
        theirs = self.say("EK-FAC of kronfluence", lambda: self.kronfluence(None))
        self.say("the same, other labels drawn", lambda: self.kronfluence(None, seed=1))
        self.say("the same, damping 1e-8 (its default)", lambda: self.kronfluence(1e-8))
        for name, other in (("kronfluence's", theirs), ("itself with other labels", again)):
            agree = float(np.nanmean(rank_agreement(ours, other)))
            print(f"EK-FAC ranks the examples like {name}: {agree:.3f}", flush=True)

    def kronfluence(self, damping: float | None, seed: int = 0) -> Floats:
        model = one_model(self.make, self.full.weights, 0)
        return kronfluence_scores(model, self.train, self.queries, damping=damping, seed=seed)

    def end(self) -> None:
        one, other = self.outputs[0], self.outputs[1]
        repeat = mean_over_queries(rank_agreement(other, one))
        top = ceiling(self.outputs)
        print(_row("one model by another of the same subset", repeat, float("nan")))
        print(_row(f"ceiling: {self.models} models by as many others", top, float("nan")))
        print(f"what a perfect prediction reaches: about {top.value**0.5:.2f}", flush=True)


def _row(name: str, found: Mean, seconds: float) -> str:
    cost = "" if np.isnan(seconds) else f"{seconds:.1f}"
    return f"| {name} | {found.value:.3f} | {found.low:.3f} to {found.high:.3f} | {cost} |"


def test_logistic_regression():
    bench = _digits("MNIST, logistic regression", (), 40, 0.02, 1e-2)
    bench.common(dim=32, trak_dim=48)
    bench.say("influence, whole Hessian", lambda: bench.ways().dense(weight_decay=1e-2))
    bench.end()
    assert bench.table["influence, whole Hessian"][0].value > 0.8
    assert bench.table[f"TRAK-{ENSEMBLE}, p = 48"][0].value > 0.6


def test_a_network():
    bench = _digits("MNIST, network", (128, 64), 15, 0.01, 1e-4)
    bench.common(dim=16, trak_dim=16)
    bench.say(
        "conjugate gradients, Gauss-Newton of 1,000",
        lambda: bench.ways().conjugate(sample=1000, iterations=20),
    )
    bench.end()
    assert bench.table["EK-FAC"][0].low > 0


def test_characters():
    length = 32
    train, known = _plays("train", 1000, length, "")
    queries, _ = _plays("test", 60, length, known)
    _need("characters")
    bench = Bench(
        "characters of plays",
        lambda: Characters(len(known), length, 32, 2, 4),
        train,
        queries,
        Recipe(epochs=8, batch_size=20, lr=5e-3, optimiser="adam", snapshots=4),
    )
    bench.common(dim=16, trak_dim=16)
    bench.say(
        "conjugate gradients, Gauss-Newton of 500",
        lambda: bench.ways().conjugate(sample=500, iterations=15),
    )
    bench.end()
    assert bench.table["EK-FAC"][0].num == 60


def _digits(
    name: str, hidden: tuple[int, ...], epochs: int, lr: float, weight_decay: float
) -> Bench:
    _need("network" if hidden else "logistic")
    recipe = Recipe(epochs=epochs, batch_size=64, lr=lr, weight_decay=weight_decay, snapshots=5)
    return Bench(
        name,
        lambda: MLP(num_features=784, num_classes=10, hidden=hidden),
        _mnist("train", 5000),
        _mnist("test", 100),
        recipe,
        models=4 if hidden else 2,
    )


def _need(name: str) -> None:
    if name not in WANTED:
        pytest.skip(f"CURATE_BENCH_LDS does not name {name}")


def _folder(name: str) -> Path:
    root = os.environ.get("CURATE_DATA")
    if root is None:
        pytest.skip(f"CURATE_DATA names no folder with the data set {name}")
    return Path(root) / name


def _mnist(part: str, rows: int) -> Data:
    """The first rows: the files are in an order that a hash of their names gives."""
    table = pl.read_parquet(_folder("mnist") / f"{part}.parquet").head(rows)
    images = table["image"]
    if isinstance(images.dtype, pl.Struct):
        images = images.struct.field("bytes")
    pixels = [np.asarray(Image.open(io.BytesIO(each)), dtype=np.float32) for each in images]
    flat = (np.stack(pixels).reshape(len(pixels), -1) / 255 - 0.1307) / 0.3081
    labels = table["label"].to_numpy().astype(np.int64)
    return Data(torch.from_numpy(flat), torch.from_numpy(labels))


def _plays(part: str, count: int, length: int, known: str) -> tuple[Data, str]:
    """Passages of so many characters, evenly spaced; the last place of `known` is all others."""
    table = pl.read_parquet(_folder("domains_en") / f"{part}.parquet")
    text = "\n\n".join(table.filter(pl.col("domain") == "drama")["text"].to_list())
    known = known or "".join(sorted(set(text))) + "\0"
    places = {character: place for place, character in enumerate(known)}
    starts = np.linspace(0, len(text) - length - 2, count).astype(int)
    rows = [[places.get(c, len(known) - 1) for c in text[s : s + length + 1]] for s in starts]
    ids = torch.tensor(rows)
    return Data(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()), known
