"""What `curate evaluate-attribution` prints."""

from collections.abc import Mapping
from typing import Any

from curate.cli.text import place_text, table
from curate.errors import counted


def evaluation_lines(summary: Mapping[str, Any], run: str) -> list[str]:
    """Tables, ceiling, notes.

    Args:
        summary: what `jobs.evaluate_attribution.evaluate_attribution_run` returned.
        run: the run folder.
    """
    lines: list[str] = []
    rows = summary["rows"]
    for measure in dict.fromkeys(row["measure"] for row in rows):
        lines += [*_table(measure, [row for row in rows if row["measure"] == measure]), ""]
    if summary["subsets"]:
        lines += [_how(summary), *_ceiling(summary)]
    lines += [f"note: {note}" for note in summary["notes"]]
    return [*lines, f"in {place_text(run)}/attribution: table.parquet, evaluation.json"]


def _table(measure: str, rows: list[Mapping[str, Any]]) -> list[str]:
    has_ceiling = any(row["ceiling"] is not None for row in rows)
    last = "wrong" if measure.startswith("auc") else "queries"
    head = ["method", measure, "95 % interval", *(["ceiling"] if has_ceiling else []), last]
    body = [
        [
            row["method"],
            _short(row["value"]),
            "" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}",
            *([_short(row["ceiling"])] if has_ceiling else []),
            f"{row['num']:,}" + (f" ({row['missing']:,} without)" if row["missing"] else ""),
        ]
        for row in rows
    ]
    return table([head, *body], right=frozenset(range(1, len(head))))


def _how(summary: Mapping[str, Any]) -> str:
    return (
        f"{counted(summary['subsets'], 'subset')} of {summary['share']:g} of the training examples,"
        f" {counted(summary['models'], 'model')} on each; the output is minus the loss"
    )


def _ceiling(summary: Mapping[str, Any]) -> list[str]:
    top = summary["ceiling"]
    if top is None or top["value"] is None:
        return ["ceiling: not known; it takes two models on each subset"]
    return [
        f"ceiling: {top['value']:.3f} ({top['low']:.3f} to {top['high']:.3f}) is what the same"
        " trainings with other seeds would reach, from halves;"
        f" a prediction can reach about {summary['reachable']:.3f}"
    ]


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
