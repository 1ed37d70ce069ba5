"""EL2N and GraNd in small: is the hardest half better than a random one, and with wrong labels?
Rows of docs/reproductions.md, beside those of MNIST in test_pruning_mnist.py.

    pytest tests/benchmarks/test_reproduction_pruning.py -s -o addopts=--import-mode=importlib

scikit-learn's digits, a network 64-64-10 of 4,810 parameters; scores of five runs of ten epochs;
every arm is trained for 400 steps of 64 by ten seeds and measured on 497 other digits.
"""

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from evaluate.compared_digits import compare, digits_settings, write_digits
from reproduction import SEEDS, line, of_verdict

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


def test_with_a_fifth_of_the_labels_wrong_the_hardest_are_left_out(tmp_path: Path):
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
