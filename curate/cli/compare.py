"""What `curate compare` prints, and comparisons of numbers that stand in a CSV file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from curate.cli.colour import Paint, plain, show
from curate.cli.text import number_text, table
from curate.errors import on_one_line

_WORDS = {"helps": "green", "hurts": "red"}
"""Verdicts that stand out."""


def comparison_lines(
    summary: Mapping[str, Any],
    run: str | None,
    *,
    paint: Paint = plain,
    width: int | None = None,
) -> list[str]:
    """Table, verdicts, notes, scale and cost.

    Args:
        summary: what `jobs.compare.compare_run` or `judge_file` returned.
        run: the run folder; None where there is none.
        paint: colours.
        width: of the terminal.
    """
    question = summary["question"]
    told = f"{on_one_line(question['told'])}, {question['better']} is better"
    lines = [told, "", *_table(summary, paint, width), ""]
    lines += [
        on_one_line(verdict["sentence"])
        for verdict in summary["verdicts"]
        if not _same(summary["arms"].get(verdict["arm"], {}))
    ]
    if any(verdict["test"] is not None for verdict in summary["verdicts"]):
        lines += ["", "A verdict has at most 5 % risk over all arms; docs/compare.md has the rule."]
    lines += [f"{paint('note', 'yellow')}: {on_one_line(note)}" for note in summary["notes"]]
    if not summary["arms"]:
        return lines
    cost = summary["cost"]
    lines += [
        "",
        f"scale: {summary['scale']}. Nothing is said about another scale.",
        f"cost: {cost['runs']} training runs, {cost['steps']:,} steps,"
        f" {number_text(float(cost['tokens']))} {summary['unit']},"
        f" {number_text(cost['seconds'])} seconds",
    ]
    return [*lines, f"in {on_one_line(run or '')}/compare: table.parquet, comparison.json, plot"]


def judge_file(
    path: Path,
    *,
    metric: str | None,
    better: Literal["higher", "lower"] | None,
    redrawn: tuple[str, ...],
) -> dict[str, Any]:
    """The verdicts on numbers from elsewhere; see `jobs.compare.judge_results`."""
    from jobs.compare import judge_results

    return judge_results(path, metric=metric, better=better, redrawn=redrawn)


def check_alone(given: Mapping[str, Any]) -> None:
    """Refuse the options that numbers in a file have no use for.

    Raises:
        ConfigError: one of them was given; a metric named there would not be the one judged.
    """
    from curate.errors import ConfigError

    for option, value in given.items():
        if value:
            raise ConfigError(
                f"{option} is given, but numbers in a file are judged without settings",
                fix="leave it out; there are --metric, --better and --redrawn",
            )


def print_file(
    path: Path,
    *,
    metric: str | None,
    better: str | None,
    redrawn: tuple[str, ...],
    as_json: bool,
) -> None:
    """Judge a CSV file and print the result."""
    from curate.cli.reporter import print_json
    from curate.errors import ConfigError

    if better not in (None, "higher", "lower"):
        raise ConfigError(f"--better is {better}", fix="write --better higher or --better lower")
    result = judge_file(path, metric=metric, better=better, redrawn=redrawn)
    if as_json:
        print_json("compare", {"planned": False, **result})
    else:
        show(lambda paint, width: comparison_lines(result, None, paint=paint, width=width))


def _table(summary: Mapping[str, Any], paint: Paint, width: int | None) -> list[str]:
    question, arms = summary["question"], summary["arms"]
    tests = {verdict["arm"]: verdict for verdict in summary["verdicts"]}
    own = [
        entry
        for entry in summary["parts"]
        if entry["metric"] == question["metric"] and entry["part"] in (question["part"], "reported")
    ]
    worst = {
        entry["arm"]: entry
        for entry in summary["parts"]
        if entry["metric"] == question["metric"] and entry["part"] == "worst_domain"
    }
    domains = {entry["part"] for entry in summary["parts"] if entry["part"].startswith("domain: ")}
    has_worst = len(domains) > 1 and question["part"] == "held_out"
    head = ["arm", summary["unit"], "passes", "mean", "spread"]
    head += ["worst domain"] if has_worst else []
    rows = [[*head, "to random", "95 % interval", "p", "sign flip", "verdict"]]
    for entry in sorted(own, key=lambda e: not e["arm"].startswith("random")):
        arm = entry["arm"]
        facts, verdict = arms.get(arm, {}), tests.get(arm, {})
        test = verdict.get("test")
        rows.append(
            [
                arm,
                _count(facts.get("tokens")),
                _short(facts.get("epochs")),
                _short(entry["mean"]),
                _short(entry["spread"]),
                *([_short(worst.get(arm, {}).get("mean"))] if has_worst else []),
                _signed(entry.get("difference")),
                _interval(entry.get("interval")),
                "" if test is None else f"{verdict['corrected_p']:.3f}",
                "" if test is None else f"{test['sign_flip_p']:.3f}",
                verdict.get("word", "") + _same(facts),
            ]
        )
    last = len(rows[0]) - 1
    return table(
        rows,
        right=frozenset(range(1, last)),
        width=width,
        paint=paint,
        style=lambda i, cell: _WORDS.get(cell.split(" ")[0], "") if i == last else "",
    )


def _same(facts: Mapping[str, Any]) -> str:
    return f" (the same data as {facts['same_as']})" if facts.get("same_as") else ""


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.3g}"


def _interval(ends: list[float] | None) -> str:
    return "" if ends is None else f"{ends[0]:+.3g} to {ends[1]:+.3g}"
