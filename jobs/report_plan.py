"""What the plan did: before and after, reasons, cuts; for the page."""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from curate.data.files import misshapen, read_document
from curate.data.layout import RunFolder
from curate.plan.positions import number_of
from curate.plan.rules import REASONS
from curate.plan.select import END
from curate.plan.settings import Keep, Plan
from curate.report.document import Fact, Lengths, Reason, Removed, Shift, Shifts, Yardstick
from jobs.report_bins import rounded
from jobs.report_labels import rest_name, shown_name
from jobs.report_survey import Survey
from jobs.report_tables import Tables

_MOST = 200
"""Domains, labels or sources that are told of one by one."""

_TOLD = {
    "kept": "in the plan",
    "held_out": "set apart for evaluation, never trained on",
    "dropped": "the condition plan.drop holds",
    "no_share": "the mixture gives the domain nothing",
    "unscored": "without a score, or without a vector where the draw needs one",
    "dropped_extreme": "at the extreme end that plan.drop_first leaves out",
    "score": "others of the group came first by score",
    "draw": "others of the group were drawn",
}


def removed_of(
    survey: Survey, examples: Mapping[str, list[int]], plan: Plan, mixer: str | None
) -> Removed | None:
    """What became of every row; None without a plan."""
    if not survey.tables.has_plan:
        return None
    counts = survey.reasons
    order = sorted(counts, key=lambda reason: (reason != "kept", -counts[reason], reason))
    return Removed(
        rows=survey.rows,
        reasons=[
            Reason(
                reason=reason,
                what=_TOLD[reason] if reason in REASONS else "",
                rows=counts[reason],
                share=rounded(counts[reason] / max(1, survey.rows)) or 0.0,
                examples=examples.get(reason, []),
            )
            for reason in order
        ],
        rule=rule_of(plan, mixer),
    )


def rule_of(plan: Plan, mixer: str | None) -> list[Fact]:
    """The settings of the plan in words."""
    keep = plan.keep
    kept = f"{100 * keep:g} % of the examples" if isinstance(keep, float | int) else _asked(keep)
    found = [
        ("score", plan.score or "none: at random"),
        ("keep", kept),
        ("order", plan.order if plan.score else ""),
        ("draw", plan.draw if plan.draw != "top" or plan.score else ""),
        ("temperature", f"{plan.temperature:g}" if plan.draw == "sample" else ""),
        ("within", plan.within),
        ("drop", plan.drop or ""),
        ("drop first", f"{plan.drop_first:g}" if plan.drop_first else ""),
        ("mixture", mixer or ""),
        ("most repeats", f"{plan.max_repeats:g}" if mixer else ""),
        ("weights", plan.weights.score if plan.weights else ""),
    ]
    return [Fact(name=name, value=value) for name, value in found if value]


def _asked(keep: Keep) -> str:
    found = {
        "% of the examples": None if keep.share is None else 100 * keep.share,
        "examples": keep.examples,
        "tokens": keep.tokens,
        "% of the tokens": None if keep.token_share is None else 100 * keep.token_share,
    }
    return ", ".join(f"{value:,.10g} {name}" for name, value in found.items() if value is not None)


def shifts_of(
    survey: Survey,
    lengths: Lengths | None,
    label_names: Mapping[int, str],
    summary: Mapping[str, Any] | None,
    yardsticks: Mapping[str, Mapping[str, Any]],
) -> Shifts | None:
    """Before and after; None without a plan.

    Args:
        survey: of the run.
        lengths: from `jobs.report_scores.lengths_of`.
        label_names: number -> name of the classes that have one.
        summary: `plan/summary.json`.
        yardsticks: from `jobs.show`.
    """
    tables = survey.tables
    if not tables.has_plan:
        return None
    random = (summary or {}).get("yardsticks", {}).get("random")
    by_domain: dict[str, float] | None = None
    if random:
        total = max(1, random["tokens"])
        by_domain = {name: entry["tokens"] / total for name, entry in random["domains"].items()}
    return Shifts(
        unit=tables.unit,
        domains=_shifts(survey.domains.table(), tables, {}, by_domain),
        labels=_shifts(survey.labels.table(), tables, label_names, None),
        sources=_shifts(survey.sources.table(), tables, {}, None),
        lengths=lengths,
        yardsticks=[_yardstick(name, entry, tables) for name, entry in yardsticks.items()],
    )


def _shifts(
    sizes: pl.DataFrame,
    tables: Tables,
    names: Mapping[int, str],
    random: Mapping[str, float] | None,
) -> list[Shift]:
    """The largest, and the rest together."""
    rows = sizes.to_dicts()
    total = max(1, sum(row["tokens"] for row in rows))
    kept = max(1, sum(row["kept_tokens"] for row in rows))
    most = _MOST + (len(rows) == _MOST + 1)
    groups = [[row] for row in rows[:most]]
    if rest := rows[most:]:
        groups.append(rest)
    return [_shift(group, tables, names, random, total, kept) for group in groups]


def _shift(
    rows: Sequence[Mapping[str, Any]],
    tables: Tables,
    names: Mapping[int, str],
    random: Mapping[str, float] | None,
    total: int,
    kept: int,
) -> Shift:
    sums = {key: sum(row[key] for row in rows) for key in rows[0] if key != "name"}
    has_tokens = tables.unit != "examples"
    share = None
    if random is not None:
        share = rounded(sum(random.get(row["name"], 0.0) for row in rows))
    return Shift(
        name=shown_name(rows[0]["name"], names) if len(rows) == 1 else rest_name(len(rows)),
        rows=sums["rows"],
        tokens=sums["tokens"] if has_tokens else None,
        kept_rows=sums["kept_rows"],
        kept_tokens=sums["kept_tokens"] if has_tokens else None,
        share=rounded(sums["tokens"] / total) or 0.0,
        kept_share=rounded(sums["kept_tokens"] / kept) or 0.0,
        random_share=share,
        num_names=len(rows),
    )


def _yardstick(name: str, entry: Mapping[str, Any], tables: Tables) -> Yardstick:
    return Yardstick(
        name=name,
        what=entry.get("what", "the plan of this run"),
        rows=entry["rows"],
        tokens=entry.get("tokens") if tables.unit != "examples" else None,
        mean_score=rounded(entry["mean_score"]),
        overlap=rounded(entry["overlap"]),
    )


def cuts_of(run: RunFolder, plan: Plan) -> dict[str, list[float | None]]:
    """Group of the plan -> between which scores it takes rows; only where it cuts.

    Args:
        run: the run folder.
        plan: the settings.

    Raises:
        InputError: the thresholds are damaged.
    """
    path = run.plan / "thresholds.json"
    value = read_document(path, plans=dict)
    if value is None or plan.score is None:
        return {}
    try:
        own = value["plans"]["plan"]
        is_drawn = own["moments"] is not None or plan.is_diverse
        found = {
            " / ".join(filter(None, rule["group"])) or "all": _cut(rule, plan, is_drawn=is_drawn)
            for rule in own["rules"]
        }
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise misshapen(path, f"{type(error).__name__}: {error}") from error
    return {group: cuts for group, cuts in found.items() if any(c is not None for c in cuts)}


def _cut(rule: Mapping[str, Any], plan: Plan, *, is_drawn: bool) -> list[float | None]:
    """The least and the largest score of which rows of a group are taken; None is no bound."""
    dropped = int(rule["drop"], 16)
    _, low, high = rule["windows"][-1]
    first, last = max(dropped, int(low, 16)), int(high, 16)
    # Drawn rows stand in another order, and where every row is used, further copies are cut.
    if is_drawn or rule["kept_rows"] >= rule["eligible_rows"]:
        first, last = dropped, END
    ends = [number_of(at >> 64) if 0 < at < END else None for at in (first, last)]
    if plan.order != "hardest":
        return [rounded(end) for end in ends]
    return [None if end is None else rounded(-end) for end in reversed(ends)]
