"""From the numbers of all arms and seeds to table, verdicts, JSON and plot."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl

from curate.data.files import replace, write_json
from curate.data.tables import write_table
from curate.errors import ConfigError
from curate.evaluate.paired import differences, luck_factor, paired_test
from curate.evaluate.verdict import Arm, Verdict, judge
from jobs.compare_outside import REPORTED, Result, known
from jobs.compare_settings import is_random

SCHEMA_VERSION = 1

_DIRECTIONS: dict[str, Literal["higher", "lower"]] = {
    "accuracy": "higher",
    "loss": "lower",
    "bits_per_byte": "lower",
    "perplexity": "lower",
}

_WHERE = {
    "held_out": " on held-out examples",
    "target": " on the target",
    "worst_domain": " in the worst domain",
    "worst_class": " in the worst class",
    "reported": "",
}

_SCHEMA = {
    "arm": pl.String,
    "seed": pl.Int64,
    "step": pl.Int64,
    "tokens": pl.Int64,
    "part": pl.String,
    "metric": pl.String,
    "value": pl.Float64,
    "num_examples": pl.Int64,
    "note": pl.String,
}


@dataclass(frozen=True, slots=True)
class Question:
    """What the verdict stands on."""

    metric: str
    part: str
    better: Literal["higher", "lower"]

    @property
    def told(self) -> str:
        """In words: `accuracy on the target`."""
        return self.metric + _WHERE.get(self.part, f" on {self.part}")


@dataclass(frozen=True, slots=True)
class Trained:
    """One arm with one seed."""

    arm: str
    seed: int
    result: Mapping[str, Any]
    """What the worker wrote down."""


def table_of(trained: Sequence[Trained]) -> pl.DataFrame:
    """One row for each number; a run that diverged has one row, without a value."""
    rows: list[dict[str, Any]] = []
    for each in trained:
        common = {"arm": each.arm, "seed": each.seed}
        if each.result["diverged"]:
            rows.append({**common, "note": f"diverged: {each.result['diverged']}"})
        for point in each.result["points"]:
            rows += [
                {**common, "step": point["step"], "tokens": point["tokens"], **entry}
                for entry in point["measured"]
            ]
    return pl.DataFrame(rows, schema=_SCHEMA)


def results_table(results: Sequence[Result]) -> pl.DataFrame:
    """The same for numbers from elsewhere."""
    rows = [
        {
            "arm": result.arm,
            "seed": result.seed,
            "part": REPORTED,
            "metric": result.metric,
            "value": known(result.value),
        }
        for result in results
    ]
    return pl.DataFrame(rows, schema=_SCHEMA)


def last_points(table: pl.DataFrame) -> pl.DataFrame:
    """The numbers at the end of training."""
    last = pl.col("step").max().over("arm", "seed")
    return table.filter(pl.col("step").is_null() | (pl.col("step") == last))


def question_of(
    table: pl.DataFrame,
    *,
    metric: str | None,
    better: Literal["higher", "lower"] | None,
    on: str | None,
) -> Question:
    """What is judged: as asked for, or by the rule.

    Accuracy, or else the loss; on the target, or else on what was held out.

    Raises:
        ConfigError: there is no such number, or its good direction is not known.
    """
    there = table.filter(pl.col("metric").is_not_null())
    parts = set(there["part"].to_list())
    part = on or next((p for p in ("target", "held_out", "reported") if p in parts), "held_out")
    metrics = sorted(set(there.filter(pl.col("part") == part)["metric"].to_list()))
    if not metrics:  # what a command or a CSV reports stands for the part that is asked for
        metrics = sorted(set(there.filter(pl.col("part") == REPORTED)["metric"].to_list()))
    if not metrics and parts:
        there_are = ", ".join(sorted(p for p in parts if p in _WHERE))
        raise ConfigError(
            f"nothing was measured{_WHERE.get(part, f' on {part}')}",
            fix=f"leave compare.on out, or set it to one of {there_are}",
        )
    if not metrics:  # every run diverged
        metrics = [metric or "loss"]
    name = metric or next((m for m in ("accuracy", "loss") if m in metrics), None)
    if name is None and len(metrics) == 1:
        name = metrics[0]
    if name is None or name not in metrics:
        what = (
            f"there is no {name}{_WHERE.get(part, f' on {part}')}"
            if name
            else "it is open which metric is judged"
        )
        raise ConfigError(what, fix=f"set compare.metric (--metric) to one of {', '.join(metrics)}")
    direction = better or _DIRECTIONS.get(name)
    if direction is None:
        raise ConfigError(
            f"it is not known which direction of {name} is good",
            fix="set compare.better (--better) to higher or lower",
        )
    return Question(name, part, direction)


def values_of(
    table: pl.DataFrame, arms: Sequence[str], question: Question
) -> dict[str, dict[int, float]]:
    """Arm -> seed -> value; not a number where the run diverged."""
    found: dict[str, dict[int, float]] = {arm: {} for arm in arms}
    table = last_points(table.filter(pl.col("arm").is_in(list(arms))))
    for arm, seed, note in table.select("arm", "seed", "note").unique().sort("seed").iter_rows():
        if note is not None:
            found[arm][seed] = math.nan
    named = table.filter(pl.col("metric") == question.metric)
    # What a command or a CSV reports stands for the part that is asked for.
    for part in dict.fromkeys(("reported", question.part)):
        own = named.filter(pl.col("part") == part)
        for arm, seed, value in own.select("arm", "seed", "value").sort("seed").iter_rows():
            found[arm][seed] = math.nan if value is None else value
    return found


def verdicts_of(
    table: pl.DataFrame,
    arms: Sequence[str],
    question: Question,
    luck: Mapping[str, float],
    same: Mapping[str, str],
) -> list[Verdict]:
    """The verdict on every arm but random.

    The plan gets three quarters of the correction's level, the others share the rest: it is the
    question, they are the background.
    Arms that train on the same data are one hypothesis.
    """
    values = values_of(table, arms, question)
    asked = [arm for arm in arms if not is_random(arm)]
    others = [arm for arm in asked if same.get(arm) not in asked]
    judged = {
        arm: Arm(
            values=values[arm],
            luck=luck.get(arm, 1.0),
            weight=3.0 * max(1, len(others) - 1) if arm == "plan" else 1.0,
        )
        for arm in others
    }
    random = [Arm(values=values[arm], luck=luck.get(arm, 0.0)) for arm in arms if is_random(arm)]
    verdicts = judge(judged, random=random, metric=question.told, better=question.better)
    found = {verdict.arm: verdict for verdict in verdicts}
    return [
        found[arm] if arm in found else dataclasses.replace(found[same[arm]], arm=arm)
        for arm in asked
    ]


def parts_of(
    table: pl.DataFrame, luck: Mapping[str, float], arms: Sequence[str]
) -> list[dict[str, Any]]:
    """Every number of every part by arm: mean, spread, difference to random; without verdicts.

    Args:
        table: of `table_of`, at the end of training.
        luck: arm -> how far the sets of its seeds share their luck.
        arms: those that get a verdict; the others are the points of a curve, each compared with
            random at its own share of the tokens.
    """
    found: list[dict[str, Any]] = []
    named = table.filter(pl.col("metric").is_not_null())
    # A run that diverged has no numbers, but it stays among those that a mean would be taken of.
    broken = table.filter(pl.col("metric").is_null())
    diverged = {
        str(arm): dict.fromkeys(rows["seed"].to_list())
        for (arm,), rows in broken.group_by("arm", maintain_order=True)
    }
    for (part, metric), own in named.group_by("part", "metric", maintain_order=True):
        by_arm = {
            str(arm): {row["seed"]: row["value"] for row in rows.iter_rows(named=True)}
            | diverged.get(str(arm), {})
            for (arm,), rows in own.group_by("arm", maintain_order=True)
        }
        for arm, values in by_arm.items():
            entry: dict[str, Any] = {"part": part, "metric": metric, "arm": arm}
            entry |= _summary(values)
            random = {other: by_arm[other] for other in by_arm if _is_yardstick(other, arm, arms)}
            if arm not in random:
                shared = luck.get(arm, 1.0), max((luck.get(a, 0.0) for a in random), default=0.0)
                entry |= _difference(values, list(random.values()), shared)
            found.append(entry)
    return found


def _is_yardstick(other: str, arm: str, judged: Sequence[str]) -> bool:
    """Whether an arm is compared with this other one: random, at the same share of the tokens."""
    if arm in judged:
        return other in judged and is_random(other)
    name, _, share = other.partition("@")
    return is_random(name) and share == arm.partition("@")[2]


def _summary(values: Mapping[int, float | None]) -> dict[str, Any]:
    """Mean and spread over the seeds; null where one of them has no value."""
    numbers = [value for value in values.values() if value is not None]
    if len(numbers) < len(values) or not numbers:
        return {"seeds": len(numbers), "mean": None, "spread": None}
    spread = statistics.stdev(numbers) if len(numbers) > 1 else None
    return {"seeds": len(numbers), "mean": statistics.fmean(numbers), "spread": spread}


def _difference(
    values: Mapping[int, float | None],
    random: Sequence[Mapping[int, float | None]],
    shared: tuple[float, float],
) -> dict[str, Any]:
    """Mean difference to random and its interval; null where a value is missing."""
    nothing = {"difference": None, "interval": None}
    own, *draws = (
        {seed: value for seed, value in each.items() if value is not None}
        for each in (values, *random)
    )
    if not draws or len(values) < 2 or any(set(each) != set(values) for each in (own, *draws)):
        return nothing
    is_fixed = shared[0] >= 1
    taken = differences(own, draws, is_fixed=is_fixed)
    mean = statistics.fmean(taken)
    if max(taken) == min(taken) or sum(shared) >= 2:
        return {"difference": mean, "interval": None}
    factor = luck_factor(len(taken), *shared, num_draws=1 if is_fixed else len(draws))
    return {"difference": mean, "interval": list(paired_test(taken, factor=factor).interval)}


def verdict_json(verdict: Verdict, luck: float) -> dict[str, Any]:
    """All of a verdict as JSON values."""
    return {
        "arm": verdict.arm,
        "word": verdict.word,
        "sentence": verdict.sentence(),
        "why": verdict.why,
        "metric": verdict.metric,
        "mean_arm": verdict.mean_arm,
        "mean_random": verdict.mean_random,
        "test": None if verdict.test is None else asdict(verdict.test),
        "corrected_p": verdict.corrected_p,
        "detectable_difference": verdict.detectable,
        "shared_luck": luck,
    }


def write_results(folder: Path, table: pl.DataFrame, value: Mapping[str, Any]) -> None:
    """`table.parquet` and `comparison.json`."""
    replace(folder / "table.parquet", lambda path: write_table(table, path))
    write_json(folder / "comparison.json", value)
