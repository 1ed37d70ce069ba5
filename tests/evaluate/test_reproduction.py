"""Rows of docs/reproductions.md are made by `reproduction`; here on numbers worked out by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
from reproduction import judged, line, of_values, of_verdict


def verdict(word: str, mean: float) -> dict[str, Any]:
    test = {"mean": mean, "interval": [mean - 0.01, mean + 0.01], "num": 10}
    return {"arm": "a", "word": word, "why": "", "test": test, "detectable_difference": 0.04}


@pytest.mark.parametrize(
    ("word", "claimed", "outcome"),
    [
        ("helps", "helps", "holds"),
        ("hurts", "helps", "does not hold here"),
        ("hurts", "hurts", "holds"),
        ("not distinguishable from random", "helps", "not distinguishable"),
    ],
)
def test_the_outcome_is_the_verdict_seen_from_the_claim(word: str, claimed: Any, outcome: str):
    found = of_verdict(verdict(word, 0.02), seeds=5, claimed=claimed)
    assert found.outcome == outcome
    assert (found.value, found.seeds, found.found) == (0.02, 5, 0.04)
    assert found.interval == pytest.approx((0.01, 0.03))


def test_a_comparison_without_a_verdict_is_no_row():
    with pytest.raises(ValueError, match="diverged"):
        of_verdict({**verdict("no verdict", 0.0), "why": "random diverged"}, seeds=5)


def test_the_interval_of_values_is_students():
    """Of 1 to 5: mean 3, standard error sqrt(2.5 / 5), the 97.5 % point of 4 degrees 2.776445."""
    found = of_values([1, 2, 3, 4, 5], claimed="above")
    half = 2.7764451 * math.sqrt(0.5)
    assert found.interval == pytest.approx((3 - half, 3 + half), abs=1e-6)
    assert found.outcome == "holds"
    # A known spread would have it at (2.776 + 0.941) errors (noncentral t); ours is not known.
    assert found.found > 3.7 * math.sqrt(0.5)


@pytest.mark.parametrize(
    ("against", "claimed", "outcome"),
    [
        (0.0, "below", "does not hold here"),
        (2.0, "above", "not distinguishable"),
        (6.0, "below", "holds"),
        (6.0, "above", "does not hold here"),
    ],
)
def test_the_outcome_of_values_is_the_side_of_the_interval(
    against: float, claimed: Any, outcome: str
):
    assert of_values([1, 2, 3, 4, 5], against=against, claimed=claimed).outcome == outcome


def test_any_arm_can_stand_in_the_place_of_random(tmp_path: Path):
    seeds = range(5)
    values = {
        "natural": {seed: 2.0 + 0.01 * seed for seed in seeds},
        "found": {seed: 1.5 + 0.011 * seed for seed in seeds},
        "uniform": {seed: 2.5 + 0.012 * seed for seed in seeds},
    }
    one = judged(tmp_path, values, against="natural", metric="loss", better="lower")
    other = judged(tmp_path, values, against="uniform", metric="loss", better="lower")
    assert {arm: each["word"] for arm, each in one.items()} == {
        "found": "helps",
        "uniform": "hurts",
    }
    assert set(other) == {"natural", "found"}
    assert other["found"]["test"]["mean"] == pytest.approx(-1.002)


def test_a_row_says_that_it_is_a_scaled_down_check():
    found = of_verdict(verdict("hurts", 0.02), seeds=5)
    row = line("lowers the loss", "digits", "loss", found)
    assert row == (
        "| lowers the loss | digits | loss: +0.020 (+0.010 to +0.030) | 5 | 0.040"
        " | scaled-down check: **does not hold here** |"
    )


def test_a_figure_that_is_no_difference_has_no_sign():
    found = of_values([0.9, 0.8, 0.85], against=0.5, claimed="above")
    assert "AUROC: 0.85 (0.73 to 0.97)" in line("", "", "AUROC", found, digits=2, signed=False)
