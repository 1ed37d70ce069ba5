"""From measured values to a row of docs/reproductions.md: figure, interval, power, outcome.

A paper's claim has a direction, and a scaled-down check of it one of three outcomes:

    holds                 the interval, or the verdict of a comparison, is on the claim's side
    does not hold here    it is on the other side
    not distinguishable   neither; the row says which difference would have been found

Nothing here is a refutation: the models are a hundred to a million times smaller than the papers'.
"""

import csv
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from curate.evaluate.paired import critical
from curate.evaluate.power import detectable_difference
from jobs.compare import judge_results

Outcome = Literal["holds", "does not hold here", "not distinguishable"]

SEEDS: tuple[int, ...] = (0, 1, 2, 3, 4)
_LEVEL, _POWER = 0.05, 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a check measured."""

    value: float
    """The difference, or the figure itself."""
    interval: tuple[float, float]
    """95 %."""
    seeds: int
    found: float
    """The smallest true difference that a repetition finds with 80 % power."""
    outcome: Outcome


def of_verdict(
    verdict: Mapping[str, Any], *, seeds: int, claimed: Literal["helps", "hurts"] = "helps"
) -> Finding:
    """From an entry of `verdicts` in `comparison.json`.

    Args:
        verdict: one arm's; it must have a test.
        seeds: of the comparison; the test counts differences, which may be more.
        claimed: the paper's word on it.

    Raises:
        ValueError: the comparison gave no verdict, so that there is nothing to print.
    """
    test, word = verdict["test"], verdict["word"]
    if test is None or word == "no verdict":
        raise ValueError(f"{verdict['arm']}: {verdict['word']}, {verdict['why']}")
    outcome: Outcome = "not distinguishable"
    if word in ("helps", "hurts"):
        outcome = "holds" if word == claimed else "does not hold here"
    low, high = test["interval"]
    return Finding(
        value=test["mean"],
        interval=(low, high),
        seeds=seeds,
        found=verdict["detectable_difference"],
        outcome=outcome,
    )


def of_values(
    values: Sequence[float], *, against: float = 0.0, claimed: Literal["above", "below"]
) -> Finding:
    """Mean over independent draws or seeds with Student's interval.

    Args:
        values: one of each seed, three or more.
        against: what the claim says the mean is above or below.
        claimed: which of the two.
    """
    num, mean = len(values), statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(num)
    half = critical(_LEVEL, num - 1) * error
    low, high = mean - half, mean + half
    outcome: Outcome = "not distinguishable"
    if low > against or high < against:
        outcome = "holds" if (low > against) == (claimed == "above") else "does not hold here"
    return Finding(
        value=mean,
        interval=(low, high),
        seeds=num,
        found=detectable_difference(error, num_seeds=num, level=_LEVEL, chance=_POWER),
        outcome=outcome,
    )


def judged(
    folder: Path,
    values: Mapping[str, Mapping[int, float]],
    *,
    against: str,
    metric: str,
    better: Literal["higher", "lower"],
) -> dict[str, dict[str, Any]]:
    """Arm -> verdict of `curate compare FILE.csv`, with one arm in the place of random.

    Every arm must have drawn its data anew with each seed.

    Args:
        folder: where the file is written.
        values: arm -> seed -> value.
        against: the arm that the others are compared with.
        metric: its name.
        better: its good direction.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"against-{against.replace(' ', '-')}.csv"
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["arm", "seed", "metric", "value"])
        for arm, own in values.items():
            name = "random" if arm == against else arm
            lines.writerows([name, seed, metric, value] for seed, value in own.items())
    arms = tuple(arm for arm in values if arm != against)
    found = judge_results(path, metric=metric, better=better, redrawn=arms)
    return {verdict["arm"]: verdict for verdict in found["verdicts"]}


def line(
    claim: str,
    setting: str,
    figure: str,
    finding: Finding,
    *,
    digits: int = 3,
    signed: bool = True,
) -> str:
    """A row of the table, without the paper's name; `signed` for differences."""
    form = f"{'+' if signed else ''}.{digits}f"
    low, high = finding.interval
    number = f"{finding.value:{form}} ({low:{form}} to {high:{form}})"
    return (
        f"| {claim} | {setting} | {figure}: {number} | {finding.seeds}"
        f" | {finding.found:.{digits}f} | scaled-down check: **{finding.outcome}** |"
    )


def data_folder(name: str) -> Path:
    """A data set's folder under `CURATE_DATA`, or a skipped test."""
    if "CURATE_DATA" not in os.environ:
        pytest.skip("set CURATE_DATA to the folder of the data sets")
    return Path(os.environ["CURATE_DATA"]) / name
