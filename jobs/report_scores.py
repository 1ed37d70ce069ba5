"""The second pass: how scores, lengths and weights are spread, by domain and label; and agreement.

Shapes: N training rows of a partition, K columns of scores.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from curate.evaluate.agreement import rank_correlations
from curate.report.document import (
    Agreement,
    Distribution,
    Group,
    Lengths,
    ScoreColumn,
    Scores,
    Weights,
)
from jobs.report_best import Place
from jobs.report_bins import Bins, Codes, Tally, bins_for, length_bins, rounded
from jobs.report_labels import REST, Names
from jobs.report_survey import Survey
from jobs.report_tables import planned_column, titles

MOST_GROUPS = 24
"""Domains, and labels, that are told of one by one."""

_FACTS = ["domain", "label", "num_tokens", "keep", "weight", "copies", "reason"]


@dataclass(slots=True)
class Counted:
    """What the second pass found."""

    survey: Survey
    domains: Names
    labels: Names
    bins: dict[str, Bins]
    tallies: dict[str, "_Column"] = field(default_factory=dict[str, "_Column"])
    lengths: tuple[Bins, Tally, Tally] | None = None
    """Before and after."""
    weights: tuple[Bins, Tally] | None = None
    rows: dict[Place, dict[str, Any]] = field(default_factory=dict[Place, dict[str, Any]])
    """What the tables say of the examples that are shown."""


@dataclass(slots=True)
class _Column:
    """One column by domain and label; what is kept is counted apart."""

    by_domain: Tally
    by_label: Tally
    kept_by_domain: Tally
    kept_by_label: Tally


def count(survey: Survey, label_names: Mapping[int, str], wanted: Sequence[Place]) -> Counted:
    """Go through all tables again.

    Args:
        survey: of the first pass.
        label_names: number -> name of the classes that have one.
        wanted: examples that are shown.
    """
    found = Counted(
        survey,
        domains=Names.of(survey.domains.table(), MOST_GROUPS),
        labels=Names.of(survey.labels.table(), MOST_GROUPS, shown=label_names),
        bins={n: b for n, spread in survey.columns.items() if (b := bins_for(spread)) is not None},
    )
    for name, bins in found.bins.items():
        sizes = (len(found.domains), len(found.labels))
        found.tallies[name] = _Column(*(Tally(bins, size) for size in (*sizes, *sizes)))
    if survey.tables.unit != "examples" or survey.longest > 1:
        bins = length_bins(survey.longest)
        found.lengths = bins, Tally(bins, 1), Tally(bins, 1)
    if (bins := bins_for(survey.weight_spread)) is not None:
        found.weights = bins, Tally(bins, 1)
    by_part: dict[int, list[Place]] = {}
    for place in wanted:
        by_part.setdefault(place.part, []).append(place)
    for number, _, frame in survey.tables.frames():
        _keep_rows(found, frame, by_part.get(number, []))
        training = frame.filter(pl.col("split") == "train")
        if training.height:
            _add(found, training)
    return found


def _keep_rows(found: Counted, frame: pl.DataFrame, places: list[Place]) -> None:
    tables = found.survey.tables
    names = [n for n in [*_FACTS, *tables.columns, *tables.beside] if n in frame.columns]
    names = ["source", "file", "row", *names]
    rows = frame.select(names)[[place.place for place in places]].to_dicts()
    found.rows.update(zip(places, rows, strict=True))


def _add(found: Counted, training: pl.DataFrame) -> None:
    tables = found.survey.tables
    domain, label = found.domains.codes(training), found.labels.codes(training)
    kept: NDArray[np.bool_] | None = None
    if tables.has_plan:
        kept = training["keep"].to_numpy()
    for name, column in found.tallies.items():
        values = training[name].cast(pl.Float64).to_numpy()
        column.by_domain.add(values, domain)
        column.by_label.add(values, label)
        if kept is not None:
            column.kept_by_domain.add(values[kept], domain[kept])
            column.kept_by_label.add(values[kept], label[kept])
    _add_lengths(found, training, kept)
    if found.weights is not None and kept is not None:
        weight = training["weight"].cast(pl.Float64).to_numpy()[kept]
        found.weights[1].add(weight, np.zeros(len(weight), np.int64))


def _add_lengths(found: Counted, training: pl.DataFrame, kept: NDArray[np.bool_] | None) -> None:
    if found.lengths is None:
        return
    unit = "num_chars" if found.survey.tables.lengths is None else "num_tokens"
    values = training[unit].cast(pl.Float64).to_numpy()
    zeros: Codes = np.zeros(len(values), np.int64)
    found.lengths[1].add(values, zeros)
    if kept is not None:
        times = training["copies"].to_numpy().astype(np.int64)
        found.lengths[2].add(values[kept], zeros[kept], times[kept])


def scores_of(
    counted: Counted,
    measures: Mapping[str, str],
    cuts: Mapping[str, list[float | None]],
    doubts: Mapping[str, list[str]],
) -> Scores | None:
    """The columns of all scorers; None where there is none.

    Args:
        counted: of the second pass.
        measures: column -> one line on its unit and its ends.
        cuts: group of the plan, by name -> where its order is cut.
        doubts: column -> what speaks against the model that measured it.
    """
    tables = counted.survey.tables
    if not tables.columns:
        return None
    planned = planned_column(tables)
    columns = [
        _column(counted, name, measures.get(name, ""), cuts if name == planned else {},
                doubts.get(name, []), is_planned=name == planned)
        for name in tables.columns
    ]  # fmt: skip
    notes: list[str] = []
    if tables.num_columns > len(columns):
        more = tables.num_columns - len(columns)
        notes.append(f"{more:,} more columns are in the tables and not shown here")
    if tables.expression is not None and planned is None:
        notes.append(f"the plan orders by {tables.expression.text}, which could not be worked out")
    return Scores(columns=columns, num_columns=tables.num_columns, notes=notes)


def _column(
    counted: Counted,
    name: str,
    measures: str,
    cuts: Mapping[str, list[float | None]],
    doubts: list[str],
    *,
    is_planned: bool,
) -> ScoreColumn:
    scorer, _, column = name.partition(".")
    title = titles(counted.survey.tables.columns)[name]
    has_plan = counted.survey.tables.has_plan
    bins, tally = counted.bins.get(name), counted.tallies.get(name)
    if bins is None or tally is None:
        return ScoreColumn(
            scorer=scorer, column=column, name=name, title=title, measures=measures, edges=[],
            scale="linear", everything=nothing(counted.survey.training),
            kept=nothing(0) if has_plan else None, by_domain=[], by_label=[],
            is_planned=is_planned, doubts=doubts,
        )  # fmt: skip
    everything = range(len(counted.domains))
    settings = counted.survey.tables.settings
    within = settings.plan.within
    # A mixture gives each domain its share: what is chosen from everything has a cut in each.
    of_domains = within == "domain" or (within == "all" and bool(settings.mix))
    return ScoreColumn(
        scorer=scorer,
        column=column,
        name=name,
        title=title,
        measures=measures,
        edges=bins.edges,
        scale=bins.scale,
        everything=tally.by_domain.distribution(everything),
        kept=tally.kept_by_domain.distribution(everything) if has_plan else None,
        by_domain=_groups(counted.domains, tally.by_domain, tally.kept_by_domain, has_plan,
                          cuts if of_domains else {}),
        by_label=_groups(counted.labels, tally.by_label, tally.kept_by_label, has_plan,
                         cuts if within == "label" else {}),
        is_planned=is_planned,
        cuts=next(iter(cuts.values())) if len(cuts) == 1 else [],
        doubts=doubts,
    )  # fmt: skip


def _groups(
    names: Names,
    tally: Tally,
    kept: Tally,
    has_plan: bool,
    cuts: Mapping[str, list[float | None]],
) -> list[Group]:
    """One for each name, with the rest last; none where all rows have the same."""
    if names.total < 2:
        return []
    return [
        Group(
            name=shown,
            distribution=tally.distribution([code]),
            kept=kept.rows_of(code) if has_plan else None,
            cuts=cuts.get(name, []),
            num_groups=names.num_rest if name == REST else 1,
        )
        for code, (name, shown) in enumerate(names.listed())
    ]


def nothing(missing: int) -> Distribution:
    """Of a column without a value."""
    return Distribution(rows=0, missing=missing, mean=None, std=None, quantiles=[], counts=[])


def lengths_of(counted: Counted) -> Lengths | None:
    """How long the examples are, before and after; None for rows of numbers, and without a plan."""
    tables = counted.survey.tables
    if counted.lengths is None or not tables.has_plan:
        return None
    bins, before, after = counted.lengths
    return Lengths(
        unit="tokens" if tables.unit == "tokens" else "characters",
        edges=bins.edges,
        before=before.distribution([0]),
        after=after.distribution([0]),
    )


def weights_of(counted: Counted) -> Weights | None:
    """How unevenly the kept rows count; None without a plan, or where it keeps nothing."""
    sums = counted.survey.weights
    if counted.weights is None or not sums.rows:
        return None
    bins, tally = counted.weights
    size = sums.total**2 / sums.square if sums.square > 0 else 0.0
    return Weights(
        rows=sums.rows,
        copies=sums.copies,
        effective_size=rounded(size) or 0.0,
        effective_share=rounded(sums.effective_share) or 0.0,
        mean=rounded(sums.mean) or 0.0,
        edges=bins.edges,
        distribution=tally.distribution([0]),
        by_copies=by_power(counted.survey.copies),
        scale=bins.scale,
    )


def by_power(counts: Mapping[int, int], *, single: int = 4) -> list[tuple[str, int]]:
    """Numbers and how often each occurs, the larger ones put together by powers of two.

    Args:
        counts: number (1 and up) -> how often.
        single: numbers below this power of two stand alone.
    """
    found: dict[tuple[int, int], int] = {}
    for number, times in counts.items():
        low = number if number < single else 1 << int(math.log2(number))
        high = number if number < single else 2 * low - 1
        found[low, high] = found.get((low, high), 0) + times
    return [
        (f"{low:,}" if low == high else f"{low:,} to {high:,}", times)
        for (low, high), times in sorted(found.items())
    ]


def agreement_of(survey: Survey) -> Agreement | None:
    """Rank correlations of all columns that have values; None with fewer than two."""
    tables = survey.tables
    used = [at for at, name in enumerate(tables.columns) if survey.columns[name].rows]
    if len(used) < 2:
        return None
    sample = survey.sample[:, used]
    matrix = rank_correlations(sample)
    names = [tables.columns[at] for at in used]
    short = titles(tables.columns)
    return Agreement(
        columns=names,
        titles=[short[name] for name in names],
        matrix=[[rounded(value) for value in row] for row in matrix.tolist()],
        rows=len(sample),
        of_rows=survey.training,
    )
