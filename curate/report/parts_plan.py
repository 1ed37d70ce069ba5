"""The part of the page about the plan: what was kept and why, and how unevenly it counts."""

from curate.report import charts
from curate.report.blocks import (
    Block,
    Cell,
    Column,
    Facts,
    Figure,
    Heading,
    Paragraph,
    Section,
    Table,
)
from curate.report.document import Document, Fact, Removed, Shifts, Weights
from curate.report.parts_run import facts_table
from curate.report.wording import (
    bar_cell,
    count_cell,
    missing,
    number,
    number_cell,
    share,
    whole,
    words,
)


def selection_section(document: Document) -> Section:
    """What became of every row, the rule, and how unevenly the kept rows count."""
    blocks: list[Block] = []
    if document.removed is None:
        blocks.append(missing(document, "removed"))
    else:
        blocks += _removed(document.removed)
    if document.shifts is not None and document.shifts.yardsticks:
        blocks += _yardsticks(document.shifts)
    blocks.append(Heading(text="How unevenly the kept examples count"))
    if document.weights is None:
        blocks.append(missing(document, "weights"))
    else:
        blocks += _weights(document.weights)
    return Section(
        name="selection", tab="Selection", title="What was kept, what not, and why", blocks=blocks
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
    has_tokens = any(one.tokens is not None for one in it.yardsticks)
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
                *([Column(title=it.unit, kind="number")] if has_tokens else []),
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
                    *([count_cell(one.tokens)] if has_tokens else []),
                    number_cell(one.mean_score),
                    bar_cell(one.overlap),
                )
                for one in it.yardsticks
            ],
        ),
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
                spec=charts.histogram(
                    it.edges,
                    series,
                    title="weight",
                    log=it.scale == "log",
                    count="kept examples",
                ),
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
        blocks.append(Paragraph(text="Every kept example has the same weight.", tone="quiet"))
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
