"""Plans whose worth is known, judged by `curate compare` with real training.

Digits, 40 % of the labels wrong, a small network, 800 steps; measured on clean digits. Prints the
table of docs/compare.md; about two minutes on one core.
"""

from pathlib import Path
from typing import Any

import pytest
from evaluate.compared_digits import compare, digits_settings, words, write_digits

from curate.cli.compare import comparison_lines

pytestmark = pytest.mark.timeout(1200)

_NOISE = {"mixer": "fixed", "weights": {"noise": 1}}
_ARMS: list[Any] = [
    "plan",
    "random",
    {
        "name": "noise-only",
        "rules": {"keep": 0.3},
        "mix": {"mixer": "fixed", "weights": {"noise": 1}},
    },
    {"name": "another-draw", "rules": {"keep": 0.5, "within": "all"}},
    "everything",
]


@pytest.mark.parametrize("score", ["el2n", "loss"])
def test_dropping_wrong_labels_helps_and_noise_alone_hurts(tmp_path: Path, score: str):
    pool, target = write_digits(tmp_path, rows=1300, flipped=0.4)
    settings = digits_settings(
        tmp_path / "run",
        pool,
        target,
        model={"config": {"model_type": "mlp", "hidden": [64]}},
        checkpoints={"train": {"epochs": 10, "seeds": [0, 1, 2], "lr": 3e-3, "batch_tokens": 64}},
        index={"held_out": 0.1},
        score={"scorers": [score], "checkpoints": "last"},
        plan={"score": score, "keep": 0.5, "order": "easiest", "within": "label"},
        compare={"arms": _ARMS, "steps": 800},
    )
    summary = compare(settings)
    print("", *comparison_lines(summary, "run"), sep="\n")
    assert words(summary) == {
        "plan": "helps",
        "noise-only": "hurts",
        "another-draw": "not distinguishable from random",
        "everything": words(summary)["everything"],
    }
