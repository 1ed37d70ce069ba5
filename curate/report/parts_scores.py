"""The parts of the page about scores: how they are spread, whether they agree and hold."""

from collections.abc import Sequence

from curate.report import charts, charts_by_name
from curate.report.blocks import (
    Block,
    Cell,
    Choice,
    Column,
    Figure,
    Heading,
    Paragraph,
    Section,
    Table,
)
from curate.report.document import (
    QUANTILES,
    Agreement,
    Distribution,
    Document,
    Group,
    ScoreColumn,
    Stability,
)
from curate.report.wording import (
    NONE,
    bar_cell,
    count_cell,
    missing,
    number,
    number_cell,
    share_cell,
    whole,
    words,
)

_BOX = {
    name: QUANTILES.index(at)
    for name, at in {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}.items()
}


def scores_section(document: Document) -> Section:
    """Every column of every scorer, one at a time."""
    blocks: list[Block] = []
    if document.scores is None:
        blocks.append(missing(document, "scores"))
    else:
        scores = document.scores
        blocks += [Paragraph(text=note, tone="quiet") for note in scores.notes]
        if scores.columns:
            options = [(_name(column), _column(column)) for column in scores.columns]
            blocks.append(Choice(label="Score", options=options))
    return Section(
        name="scores",
        tab="Scores",
        title="How the scores are spread",
        blocks=blocks,
        lead="One number per example from each scorer. A score measures; the plan decides.",
    )


def agreement_section(document: Document) -> Section:
    """Rank correlations of the columns, and of the seeds of one column."""
    blocks: list[Block] = []
    if document.agreement is None:
        blocks.append(missing(document, "agreement"))
    else:
        blocks.append(_heatmap(document.agreement))
    blocks.append(Heading(text="Would another seed give the same order?"))
    if document.stability is None:
        blocks.append(missing(document, "stability"))
    else:
        blocks += _stability(document.stability)
    return Section(
        name="agreement",
        tab="Agreement",
        title="Do the scores agree?",
        blocks=blocks,
        lead="Two scores that order the examples alike say the same thing twice.",
    )


def column_figure(column: ScoreColumn, *, wide: bool = True) -> Figure:
    """How one column is spread over all examples, what is kept in colour."""
    everything, kept = column.everything, column.kept
    series = [("examples", everything.counts)]
    if kept is not None:
        rest = [max(0, a - b) for a, b in zip(everything.counts, kept.counts, strict=True)]
        series = [("kept", kept.counts), ("left out", rest)]
    cuts = cuts_of(column.cuts)
    inside = [cut for cut in cuts if column.edges[0] <= cut <= column.edges[-1]]
    return Figure(
        title=f"{column.title} over all examples",
        note=_outside(everything, cuts),
        spec=charts.histogram(
            column.edges, series, title=column.title, log=column.scale == "log", cuts=inside
        ),
        table=_bins_table(column.title, column.edges, series),
        wide=wide,
    )


def cuts_of(cuts: Sequence[float | None]) -> list[float]:
    """The cuts there are."""
    return [cut for cut in cuts if cut is not None]


def quantiles_table(caption: str, named: Sequence[tuple[str, Distribution]]) -> Table:
    """Rows, mean and quantiles of some distributions."""
    shown = (0, 2, 4, 6, 8)
    return Table(
        caption=caption,
        quiet=True,
        columns=(
            Column(title="examples"),
            *(
                Column(title=t, kind="number")
                for t in (
                    "scored",
                    "no score",
                    "mean",
                    "std",
                    "least",
                    "5 %",
                    "median",
                    "95 %",
                    "most",
                )
            ),
        ),
        rows=[
            (
                words(name),
                count_cell(it.rows),
                count_cell(it.missing),
                number_cell(it.mean),
                number_cell(it.std),
                *(number_cell(it.quantiles[at] if it.quantiles else None) for at in shown),
            )
            for name, it in named
        ],
    )


def _name(column: ScoreColumn) -> str:
    return f"{column.name} (the plan's)" if column.is_planned else column.name


def _column(column: ScoreColumn) -> list[Block]:
    blocks: list[Block] = []
    if column.measures:
        blocks.append(Paragraph(text=f"{column.title}: {column.measures}."))
    blocks += [Paragraph(text=text, tone="warning") for text in column.doubts]
    if not column.edges:
        return [*blocks, Paragraph(text="No row has a value.", tone="quiet")]
    named = [("everything", column.everything)]
    if column.kept is not None:
        named.append(("kept", column.kept))
    blocks.append(column_figure(column))
    blocks.append(quantiles_table(f"{column.title}: figures", named))
    for groups, what in ((column.by_domain, "domain"), (column.by_label, "label")):
        if groups:
            blocks += _groups(column, groups, what)
    return blocks


def _outside(it: Distribution, cuts: Sequence[float]) -> str:
    told: list[str] = []
    if it.below or it.above:
        told.append(f"{whole(it.below)} below and {whole(it.above)} above lie outside the picture.")
    if cuts:
        told.append(f"The plan cuts at {' and '.join(number(cut) for cut in cuts)}.")
    return " ".join(told)


def _bins_table(
    title: str, edges: Sequence[float], series: Sequence[tuple[str, Sequence[float]]]
) -> Table:
    return Table(
        caption=f"{title} in bins",
        quiet=True,
        columns=(
            Column(title="from", kind="number"),
            Column(title="to", kind="number"),
            *(Column(title=name, kind="number") for name, _ in series),
        ),
        rows=[
            (
                number_cell(edges[at]),
                number_cell(edges[at + 1]),
                *(count_cell(counts[at]) for _, counts in series),
            )
            for at in range(len(edges) - 1)
            if any(counts[at] for _, counts in series)
        ],
    )


def _groups(column: ScoreColumn, groups: Sequence[Group], what: str) -> list[Block]:
    rows = [
        {
            "name": group.name,
            "count": group.distribution.rows,
            **{name: group.distribution.quantiles[at] for name, at in _BOX.items()},
        }
        for group in groups
        if group.distribution.quantiles
    ]
    if not rows:
        return []
    # A cut that all rows share is a line over the whole chart.
    shared = cuts_of(column.cuts)
    own = [] if shared else [{"name": g.name, "at": c} for g in groups for c in cuts_of(g.cuts)]
    note = "The middle half thick, 5 to 95 % thin, the median a tick."
    return [
        Figure(
            title=f"{column.title} by {what}",
            note=f"{note} In colour where the plan cuts." if own else note,
            spec=charts_by_name.boxes(rows, title=column.title, cuts=shared, own_cuts=own),
            table=_groups_table(column, groups, what),
        )
    ]


def _groups_table(column: ScoreColumn, groups: Sequence[Group], what: str) -> Table:
    def row(group: Group) -> tuple[Cell, ...]:
        it = group.distribution
        kept = None if group.kept is None or not it.rows else group.kept / it.rows
        at = [number_cell(it.quantiles[i] if it.quantiles else None) for i in _BOX.values()]
        cuts = " and ".join(number(cut) for cut in cuts_of(group.cuts))
        return (
            words(group.name),
            count_cell(it.rows),
            share_cell(kept),
            number_cell(it.mean),
            *at,
            Cell(text=cuts),
        )

    titles = ("scored", "kept", "mean", "5 %", "25 %", "median", "75 %", "95 %", "cut")
    return Table(
        caption=f"{column.title} by {what}",
        quiet=True,
        columns=(Column(title=what), *(Column(title=t, kind="number") for t in titles)),
        rows=[row(group) for group in groups],
    )


def _heatmap(agreement: Agreement) -> Figure:
    names = _distinct(agreement.titles, agreement.columns)
    cells = [
        {"a": a, "b": b, "value": agreement.matrix[i][j]}
        for i, a in enumerate(names)
        for j, b in enumerate(names)
        if agreement.matrix[i][j] is not None
    ]
    rows = whole(agreement.rows)
    sample = agreement.rows < agreement.of_rows
    return Figure(
        title="Rank correlation of every two scores",
        note=(
            f"Spearman's, on {rows} examples"
            + (f" drawn from {whole(agreement.of_rows)}. " if sample else ". ")
            + "1 is the same order, -1 the opposite one, 0 none."
        ),
        spec=charts.heatmap(cells, names, title="rank correlation"),
        table=Table(
            caption="Rank correlations",
            quiet=True,
            columns=(Column(title="score"), *(Column(title=n, kind="number") for n in names)),
            rows=[
                (words(name), *(_correlation(value) for value in agreement.matrix[i]))
                for i, name in enumerate(names)
            ],
        ),
    )


def _correlation(value: float | None) -> Cell:
    return Cell(text=NONE if value is None else f"{value:.2f}", sort=value)


def _distinct(titles: Sequence[str], names: Sequence[str]) -> list[str]:
    """Short names where no two columns share one."""
    return list(titles) if len(set(titles)) == len(titles) else list(names)


def _stability(stability: Stability) -> list[Block]:
    table = Table(
        caption=f"On {whole(stability.rows)} examples",
        columns=(
            Column(title="score"),
            Column(title="seeds", kind="number", about="Independently trained models."),
            Column(
                title="rank correlation",
                kind="bar",
                about="Spearman's between two seeds, mean over the pairs.",
            ),
            Column(title="lowest", kind="number", about="Of the pairs."),
            Column(
                title="reliability",
                kind="bar",
                about="Share of the mean score's variance that the seeds do not explain.",
            ),
            Column(title="std over seeds", kind="number", about="Mean over the examples."),
            Column(title="std over examples", kind="number"),
        ),
        rows=[
            (
                words(it.name),
                count_cell(it.seeds),
                Cell(
                    text=number(it.rank_correlation, 3),
                    sort=it.rank_correlation,
                    bar=None if it.rank_correlation is None else max(0.0, it.rank_correlation),
                ),
                number_cell(it.lowest),
                bar_cell(it.reliability),
                number_cell(it.mean_std),
                number_cell(it.spread),
            )
            for it in stability.columns
        ],
    )
    return [table, *(Paragraph(text=note, tone="quiet") for note in stability.notes)]
