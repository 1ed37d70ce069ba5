"""The parts of the page about decisions: the mixture, what was kept and why, what that changed."""

from collections.abc import Sequence

from curate.report import charts
from curate.report.blocks import (
    Block,
    Cell,
    Choice,
    Column,
    Facts,
    Figure,
    Heading,
    Lines,
    Paragraph,
    Section,
    Table,
)
from curate.report.document import (
    Document,
    Fact,
    Lengths,
    Line,
    Mixture,
    MixturePath,
    Removed,
    Shift,
    Shifts,
    Weights,
)
from curate.report.parts_scores import quantiles_table
from curate.report.wording import (
    bar_cell,
    count_cell,
    number,
    number_cell,
    share,
    share_cell,
    whole,
    words,
)


def mixture_section(document: Document) -> Section:
    """The share that each domain gets, and how it came about."""
    it = document.mixture
    blocks: list[Block] = []
    lead = ""
    if it is None:
        text = document.missing.get("mixture", "No mixture was asked for.")
        blocks.append(Paragraph(text=text, tone="quiet"))
    else:
        lead = f"Found by {it.mixer}. Shares are of {document.unit}."
        blocks += _mixture(it)
    return Section(
        name="mixture", tab="Mixture", title="The mixture of domains", lead=lead, blocks=blocks
    )


def selection_section(document: Document) -> Section:
    """What became of every row, the rule, and how unevenly the kept rows count."""
    blocks: list[Block] = []
    if document.removed is None:
        blocks.append(Paragraph(text=document.missing.get("removed", "No plan."), tone="quiet"))
    else:
        blocks += _removed(document.removed)
    if document.shifts is not None and document.shifts.yardsticks:
        blocks += _yardsticks(document.shifts)
    blocks.append(Heading(text="How unevenly the kept examples count"))
    if document.weights is None:
        text = document.missing.get("weights", "There are no weights.")
        blocks.append(Paragraph(text=text, tone="quiet"))
    else:
        blocks += _weights(document.weights)
    return Section(
        name="selection", tab="Selection", title="What was kept, what not, and why", blocks=blocks
    )


def shifts_section(document: Document) -> Section:
    """Before and after, by domain, label, source and length."""
    it = document.shifts
    blocks: list[Block] = []
    if it is None:
        blocks.append(Paragraph(text=document.missing.get("shifts", "No plan."), tone="quiet"))
    else:
        for what, rows in (("domain", it.domains), ("label", it.labels), ("source", it.sources)):
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


def facts_table(caption: str, facts: Sequence[Fact], *, kind: str = "text") -> Table:
    """Names and values under each other."""
    value = Column(title="value", kind="code" if kind == "code" else "text")
    return Table(
        caption=caption,
        narrow=True,
        quiet=True,
        columns=(Column(title="what"), value),
        rows=[(Cell(text=fact.name, tone="quiet"), words(fact.value)) for fact in facts],
    )


def _mixture(it: Mixture) -> list[Block]:
    blocks: list[Block] = [Paragraph(text=note, tone="quiet") for note in it.notes]
    if it.facts:
        blocks.append(Facts(facts=it.facts))
    rows = [{"name": one.domain, "before": one.natural, "after": one.asked} for one in it.domains]
    blocks.append(
        Figure(
            title="From the pool's shares to the mixture's",
            note="Hollow: in the pool. Filled: in the mixture.",
            spec=charts.before_after(rows, title="share"),
            table=_mixture_table(it),
            is_open=True,
        )
    )
    if it.paths:
        blocks.append(Heading(text="Its path over the steps"))
        blocks += (
            [Choice(label="Proxy", options=[(path.run, _path(path)) for path in it.paths])]
            if len(it.paths) > 1
            else _path(it.paths[0])
        )
    return blocks


def _mixture_table(it: Mixture) -> Table:
    widest = max([one.asked for one in it.domains] + [one.natural for one in it.domains])
    phases = [f"phase {i + 1} ({share(part)})" for i, part in enumerate(it.phases)]
    phases = phases if len(phases) > 1 else []
    return Table(
        caption="Shares by domain; the tick in a bar is the pool's share",
        columns=(
            Column(title="domain"),
            Column(title="pool", kind="number"),
            Column(title="mixture", kind="bar"),
            Column(title="kept", kind="number"),
            Column(title="random", kind="number", about="Kept by random at an equal budget."),
            Column(title="epochs", kind="number", about="Passes through the domain's own."),
            *(Column(title=phase, kind="number") for phase in phases),
            Column(title="why"),
        ),
        rows=[
            (
                words(one.domain),
                share_cell(one.natural),
                bar_cell(one.asked, widest=widest, mark=one.natural),
                share_cell(one.kept),
                share_cell(one.random),
                number_cell(one.epochs),
                *(share_cell(part) for part in one.by_phase[: len(phases)]),
                Cell(text=one.why, tone="quiet"),
            )
            for one in it.domains
        ],
    )


def _path(path: MixturePath) -> list[Block]:
    blocks = [_curves("Weight of each domain", path.steps, path.weights, "weight", percent=True)]
    if path.losses:
        blocks.append(_curves("Loss of each domain", path.steps, path.losses, "loss, nats"))
    return list(blocks)


def _curves(
    title: str, steps: Sequence[int], curves: Sequence[Line], y: str, *, percent: bool = False
) -> Figure:
    points = [
        {"name": curve.name, "x": step, "y": value}
        for curve in curves
        for step, value in zip(steps, curve.values, strict=True)
        if value is not None
    ]
    every = max(1, len(steps) // 20)
    at = sorted({*range(0, len(steps), every), len(steps) - 1}) if steps else []
    cell = share_cell if percent else number_cell
    return Figure(
        title=title,
        spec=charts.lines(
            points, x="step", y=y, names=[curve.name for curve in curves], percent=percent
        ),
        table=Table(
            caption=title,
            quiet=True,
            columns=(
                Column(title="step", kind="number"),
                *(Column(title=curve.name, kind="number") for curve in curves),
            ),
            rows=[(count_cell(steps[i]), *(cell(curve.values[i]) for curve in curves)) for i in at],
        ),
    )


def _removed(it: Removed) -> list[Block]:
    table = Table(
        caption=f"All {whole(it.rows)} rows of the index, by what became of them",
        columns=(
            Column(title="reason"),
            Column(title="what it means"),
            Column(title="rows", kind="number"),
            Column(title="share", kind="bar"),
        ),
        rows=[
            (
                Cell(
                    text=one.reason,
                    tone="good" if one.reason == "kept" else "",
                    show=("reason", f"*{one.reason}") if one.examples else None,
                ),
                Cell(text=one.what, tone="quiet"),
                count_cell(one.rows),
                bar_cell(one.share),
            )
            for one in it.reasons
        ],
    )
    blocks: list[Block] = [table]
    blocks += [Paragraph(text=note, tone="warning") for note in it.notes]
    if it.rule:
        blocks += [Heading(text="The rule"), facts_table("The settings of the plan", it.rule)]
    return blocks


def _yardsticks(it: Shifts) -> list[Block]:
    return [
        Heading(
            text="Beside other choices",
            note="Each keeps as much as the plan. That a set differs does not say it is better.",
        ),
        Table(
            caption="Choices at an equal budget",
            quiet=True,
            columns=(
                Column(title="choice"),
                Column(title="what"),
                Column(title="rows", kind="number"),
                Column(title="tokens", kind="number"),
                Column(title="mean score", kind="number", about="Of the plan's score."),
                Column(
                    title="in the plan too",
                    kind="bar",
                    about="Share of the plan's rows that it keeps as well.",
                ),
            ),
            rows=[
                (
                    words(one.name),
                    Cell(text=one.what, tone="quiet"),
                    count_cell(one.rows),
                    count_cell(one.tokens),
                    number_cell(one.mean_score),
                    bar_cell(one.overlap),
                )
                for one in it.yardsticks
            ],
        ),
    ]


def shift_figure(
    what: str,
    rows: Sequence[Shift],
    unit: str,
    table: Table,
    *,
    wide: bool = True,
    is_open: bool = False,
) -> Figure:
    """Shares before and after, a line per name."""
    named = [{"name": row.name, "before": row.share, "after": row.kept_share} for row in rows]
    return Figure(
        title=f"Shares of {unit} by {what}",
        note="Hollow: before. Filled: kept.",
        spec=charts.before_after(named, title=f"share of {unit}"),
        table=table,
        wide=wide,
        is_open=is_open,
    )


def shift_table(what: str, rows: Sequence[Shift]) -> Table:
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
            Column(title="tokens", kind="number"),
            Column(title="kept tokens", kind="number"),
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
    table = shift_table(what, rows)
    if len(rows) == 1:
        return [table]
    return [shift_figure(what, rows, unit, table, is_open=True)]


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


def _weights(it: Weights) -> list[Block]:
    blocks: list[Block] = [
        Facts(
            facts=[
                Fact(name="kept rows", value=whole(it.rows)),
                Fact(name="with copies", value=whole(it.copies)),
                Fact(name="effective sample size", value=whole(it.effective_size)),
                Fact(name="of the kept rows", value=share(it.effective_share)),
                Fact(name="mean weight", value=number(it.mean)),
            ]
        ),
        Paragraph(
            text="The effective sample size is the number of equally weighted examples that carry "
            "as much; far below the kept rows, few examples speak for all.",
            tone="quiet",
        ),
    ]
    if len(it.edges) > 2:
        series = [("examples", it.distribution.counts)]
        blocks.append(
            Figure(
                title="Weights for the loss",
                spec=charts.histogram(it.edges, series, title="weight", count="kept examples"),
                table=Table(
                    caption="Weights in bins",
                    quiet=True,
                    columns=tuple(Column(title=t, kind="number") for t in ("from", "to", "rows")),
                    rows=[
                        (number_cell(it.edges[i]), number_cell(it.edges[i + 1]), count_cell(n))
                        for i, n in enumerate(it.distribution.counts)
                    ],
                ),
            )
        )
    else:
        blocks.append(Lines(lines=["Every kept example has the same weight."]))
    if len(it.by_copies) > 1:
        widest = max(rows for _, rows in it.by_copies)
        blocks.append(
            Table(
                caption="Copies",
                narrow=True,
                columns=(Column(title="copies"), Column(title="rows", kind="bar")),
                rows=[
                    (words(name), Cell(text=whole(rows), sort=rows, bar=rows / max(1, widest)))
                    for name, rows in it.by_copies
                ],
            )
        )
    return blocks
