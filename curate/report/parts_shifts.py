"""The part of the page about what the plan changed: by domain, label, source and length."""

from collections.abc import Sequence

from curate.report import charts, charts_by_name
from curate.report.blocks import (
    Block,
    Column,
    Figure,
    Section,
    Table,
)
from curate.report.document import (
    Document,
    Lengths,
    Shift,
)
from curate.report.parts_scores import quantiles_table
from curate.report.wording import (
    bar_cell,
    count_cell,
    missing,
    number_cell,
    share_cell,
    whole,
    words,
)

_DRAWN = 30
"""Names in a figure; its table has all that there are."""


def shifts_section(document: Document) -> Section:
    """Before and after, by domain, label, source and length."""
    it = document.shifts
    blocks: list[Block] = []
    if it is None:
        blocks.append(missing(document, "shifts"))
    else:
        # Where each source is a domain, the two say the same.
        sources = it.sources if _counts(it.sources) != _counts(it.domains) else []
        for what, rows in (("domain", it.domains), ("label", it.labels), ("source", sources)):
            if rows:
                blocks += _shift(what, rows, it.unit)
        if it.lengths is not None:
            blocks += _lengths(it.lengths)
    return Section(
        name="shifts",
        tab="Before and after",
        title="What the plan changed",
        blocks=blocks,
        lead=""
        if it is None
        else f"Shares are of {it.unit}; what random keeps at the same "
        "budget stands beside, where it is known.",
    )


def single(rows: Sequence[Shift]) -> list[Shift]:
    """Those that are one name; not the sum of the rest."""
    return [row for row in rows if row.num_names == 1]


def shift_figure(
    what: str,
    rows: Sequence[Shift],
    unit: str,
    table: Table,
    *,
    most: int = _DRAWN,
    wide: bool = True,
    is_open: bool = False,
) -> Figure:
    """Shares before and after, a line per name.

    Names without a line of their own are not drawn: their sum would be far longer than any line.
    """
    drawn = single(rows)[:most]
    named = [{"name": row.name, "before": row.share, "after": row.kept_share} for row in drawn]
    total = sum(row.num_names for row in rows)
    note = "Hollow: before. Filled: kept."
    if len(drawn) < total:
        note += f" The {whole(len(drawn))} largest of {whole(total)} {what}s."
    return Figure(
        title=f"Shares of {unit} by {what}",
        note=note,
        spec=charts_by_name.before_after(named, title=f"share of {unit}"),
        table=table,
        wide=wide,
        is_open=is_open,
    )


def shift_table(what: str, rows: Sequence[Shift], unit: str) -> Table:
    """Rows, tokens and shares before and after."""
    has_tokens = any(row.tokens is not None for row in rows)
    has_random = any(row.random_share is not None for row in rows)
    widest = max(max(row.share, row.kept_share) for row in rows)
    columns = [
        Column(title=what),
        Column(title="examples", kind="number"),
        Column(title="kept", kind="number"),
        Column(title="share kept", kind="number"),
    ]
    if has_tokens:
        columns += [
            Column(title=unit, kind="number"),
            Column(title=f"kept {unit}", kind="number"),
        ]
    columns += [Column(title="before", kind="number"), Column(title="after", kind="bar")]
    if has_random:
        columns.append(Column(title="random", kind="number"))
    return Table(
        caption=f"By {what}; the tick in a bar is the share before",
        columns=columns,
        rows=[
            (
                words(row.name),
                count_cell(row.rows),
                count_cell(row.kept_rows),
                share_cell(row.kept_rows / row.rows if row.rows else None),
                *((count_cell(row.tokens), count_cell(row.kept_tokens)) if has_tokens else ()),
                share_cell(row.share),
                bar_cell(row.kept_share, widest=widest, mark=row.share),
                *((share_cell(row.random_share),) if has_random else ()),
            )
            for row in rows
        ],
    )


def _shift(what: str, rows: Sequence[Shift], unit: str) -> list[Block]:
    table = shift_table(what, rows, unit)
    if len(rows) == 1:
        return [table]
    return [shift_figure(what, rows, unit, table, is_open=True)]


def _counts(rows: Sequence[Shift]) -> list[tuple[int, int]]:
    return [(row.rows, row.kept_rows) for row in rows]


def _lengths(it: Lengths) -> list[Block]:
    before, after = (
        [count / max(1, side.rows) for count in side.counts] for side in (it.before, it.after)
    )
    title = f"{it.unit} in an example"
    table = Table(
        caption="Examples by length",
        quiet=True,
        columns=(
            Column(title="from", kind="number"),
            Column(title="to", kind="number"),
            Column(title="before", kind="number"),
            Column(title="after", kind="number"),
        ),
        rows=[
            (number_cell(it.edges[i]), number_cell(it.edges[i + 1]), share_cell(a), share_cell(b))
            for i, (a, b) in enumerate(zip(before, after, strict=True))
        ],
    )
    return [
        Figure(
            title=f"How long the examples are, in {it.unit}",
            note="A logarithmic axis.",
            spec=charts.overlay(it.edges, before, after, title=title, log=True),
            table=table,
        ),
        quantiles_table("Lengths: figures", (("before", it.before), ("after", it.after))),
    ]
