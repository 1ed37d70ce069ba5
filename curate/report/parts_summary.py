"""The head of the page: what the run did, in five lines, and what a reader must not miss."""

from curate.report.blocks import (
    Block,
    Cell,
    Column,
    Facts,
    Heading,
    Lines,
    Paragraph,
    Section,
    Table,
)
from curate.report.document import Document
from curate.report.parts_compare import forest_of
from curate.report.parts_scores import column_figure
from curate.report.parts_shifts import shift_figure, shift_table, single
from curate.report.wording import sentence, words

_GLANCE = 12
"""Domains in the figure of the summary."""


_TITLES = {
    "scores": "scores",
    "agreement": "agreement of scores",
    "samples": "examples",
    "mixture": "a mixture",
    "shifts": "before and after",
    "removed": "a plan",
    "duplicates": "duplicates",
    "leakage": "leakage",
    "quarantine": "rows set aside",
    "weights": "weights",
    "stability": "stability over seeds",
    "comparison": "a comparison",
}


def summary_section(document: Document) -> Section:
    """What was done in five lines, the figures, what a reader must not miss."""
    blocks: list[Block] = []
    if document.facts:
        blocks.append(Facts(facts=document.facts))
    if document.summary:
        blocks.append(Lines(lines=document.summary))
    blocks += [Paragraph(text=note, tone="warning") for note in document.notes]
    blocks += _at_a_glance(document)
    if document.missing:
        blocks.append(Heading(text="Not in this report"))
        blocks.append(
            Table(
                caption="What this run has not done, and what would give it",
                quiet=True,
                columns=(Column(title="part"), Column(title="why", kind="said")),
                rows=[
                    (words(_TITLES.get(name, name)), Cell(text=sentence(why), tone="quiet"))
                    for name, why in document.missing.items()
                ],
            )
        )
    return Section(name="summary", tab="Summary", title="What this run did", blocks=blocks)


def _at_a_glance(document: Document) -> list[Block]:
    """The plan's score, the domains before and after, the verdicts: where there are such."""
    figures: list[Block] = []
    planned = [
        column
        for column in (document.scores.columns if document.scores is not None else [])
        if column.is_planned and column.edges
    ]
    figures += [column_figure(column, wide=False) for column in planned[:1]]
    shifts = document.shifts
    if shifts is not None:
        several = [("domain", shifts.domains), ("label", shifts.labels)]
        what, rows = next(((w, r) for w, r in several if len(r) > 1), ("", []))
        if rows:
            table = shift_table(what, single(rows)[:_GLANCE], shifts.unit)
            figures.append(shift_figure(what, rows, shifts.unit, table, most=_GLANCE, wide=False))
    if document.comparison is not None:
        figures += forest_of(document.comparison, wide=not len(figures) % 2)
    return figures
