"""What `curate evaluate-attribution` prints."""

from collections.abc import Mapping
from typing import Any

from curate.cli.colour import Paint, plain
from curate.cli.text import place_text, table
from curate.errors import counted, on_one_line


def evaluation_lines(
    summary: Mapping[str, Any], run: str, *, paint: Paint = plain, width: int | None = None
) -> list[str]:
    """Tables, ceiling, notes.

    Args:
        summary: what `jobs.evaluate_attribution.evaluate_attribution_run` returned.
        run: the run folder.
        paint: colours.
        width: of the terminal.
    """
    lines: list[str] = []
    rows = summary["rows"]
    for measure in dict.fromkeys(row["measure"] for row in rows):
        own = [row for row in rows if row["measure"] == measure]
        lines += [*_table(measure, own, paint, width), ""]
    if summary["subsets"]:
        lines += [_how(summary), *_ceiling(summary)]
    lines += [f"{paint('note', 'yellow')}: {on_one_line(note)}" for note in summary["notes"]]
    return [*lines, f"in {place_text(run)}/attribution: table.parquet, evaluation.json"]


def _table(
    measure: str, rows: list[Mapping[str, Any]], paint: Paint, width: int | None
) -> list[str]:
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
    right = frozenset(range(1, len(head)))
    return table([head, *body], right=right, width=width, paint=paint)


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
