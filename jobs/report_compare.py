"""What `curate compare` found, for the page."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from curate.data.files import misshapen, read_document
from curate.data.tables import read_table
from curate.errors import counted
from curate.report.document import ComparedPart, ComparedPoint, Comparison, Fact, Verdict
from jobs.compare_results import Question, last_points, values_of
from jobs.report_bins import rounded
from jobs.report_told import stale_comparison
from jobs.settings import Settings
from jobs.train_notes import comparison_notes

_MOST_PARTS = 200
_MOST_POINTS = 500


def comparison_of(root: Path) -> Comparison | None:
    """The verdicts and what they stand on; None where nothing was compared.

    Args:
        root: the run folder.

    Raises:
        InputError: the results are damaged.
    """
    path = root / "compare" / "comparison.json"
    value = read_document(path, question=dict, verdicts=list, parts=list)
    if value is None:
        return None
    try:
        question = value["question"]
        parts = [_part(entry) for entry in value["parts"]]
        doubts = _doubts(value)
        return Comparison(
            metric=question["told"],
            better=question["better"],
            verdicts=[_verdict(entry) for entry in value["verdicts"]],
            points=_points(root / "compare" / "table.parquet", value),
            parts=parts[:_MOST_PARTS],
            num_parts=len(parts),
            facts=_facts(value),
            notes=[note for note in value.get("notes", ()) if note not in doubts],
            doubts=doubts,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise misshapen(path, f"{type(error).__name__}: {error}") from error


def compared(settings: Settings) -> Comparison | None:
    """The same, with a doubt where it was not this plan that was compared.

    Raises:
        InputError: the results are damaged.
    """
    found = comparison_of(Path(settings.run))
    why = stale_comparison(settings) if found is not None else None
    if found is None or why is None:
        return found
    older = f"what was compared is not the plan as it is now: {why}"
    return replace(found, doubts=[older, *found.doubts])


def _doubts(value: Mapping[str, Any]) -> list[str]:
    """From what each arm trained on, so that comparisons made earlier have them too."""
    arms: Mapping[str, Mapping[str, Any]] = value.get("arms") or {}
    # Points of a curve have a share in their name, and are no arms of the verdict.
    return comparison_notes({arm: it.get("steps") for arm, it in arms.items() if "@" not in arm})


def _verdict(entry: Mapping[str, Any]) -> Verdict:
    test = entry["test"] or {}
    low, high = test.get("interval") or (None, None)
    return Verdict(
        arm=entry["arm"],
        word=entry["word"],
        sentence=entry["sentence"],
        mean_arm=rounded(entry["mean_arm"]),
        mean_random=rounded(entry["mean_random"]),
        difference=rounded(test.get("mean")),
        low=rounded(low),
        high=rounded(high),
        p=rounded(entry["corrected_p"]),
        detectable=rounded(entry["detectable_difference"]),
    )


def _part(entry: Mapping[str, Any]) -> ComparedPart:
    low, high = entry.get("interval") or (None, None)
    return ComparedPart(
        part=entry["part"],
        metric=entry["metric"],
        arm=entry["arm"],
        seeds=entry["seeds"],
        mean=rounded(entry["mean"]),
        spread=rounded(entry["spread"]),
        difference=rounded(entry.get("difference")),
        low=rounded(low),
        high=rounded(high),
    )


def _points(path: Path, value: Mapping[str, Any]) -> list[ComparedPoint]:
    """The number of each training run that the verdicts stand on."""
    if not path.is_file():
        return []
    asked = value["question"]
    question = Question(asked["metric"], asked["part"], asked["better"])
    table = last_points(read_table(path))
    arms = table.select(pl.col("arm").unique(maintain_order=True))["arm"].to_list()
    judged = {entry["arm"] for entry in value["verdicts"]}
    # Points of a curve have a share in their name, and are no arms of the verdict.
    arms = [arm for arm in arms if arm in judged or "@" not in arm]
    points = [
        ComparedPoint(arm=arm, seed=seed, value=rounded(number))
        for arm, by_seed in values_of(table, arms, question).items()
        for seed, number in sorted(by_seed.items())
    ]
    return points[:_MOST_POINTS]


def _facts(value: Mapping[str, Any]) -> list[Fact]:
    facts: list[Fact] = []
    if seeds := value.get("seeds"):
        facts.append(Fact(name="seeds", value=", ".join(map(str, seeds))))
    if scale := value.get("scale"):
        facts.append(Fact(name="scale", value=str(scale)))
    cost: Mapping[str, Any] = value.get("cost") or {}
    if runs := cost.get("runs"):
        unit = value.get("unit") or "tokens"
        told = f"{counted(runs, 'training run')}, {cost.get('tokens') or 0:,} {unit}"
        seconds = cost.get("seconds")
        facts.append(Fact(name="cost", value=told + (f", {seconds:,.0f} s" if seconds else "")))
    return facts
