"""The parts of the page about the run: its head, defects, whether it helped, how to repeat it."""

from collections.abc import Sequence

from curate.report import charts
from curate.report.blocks import (
    Block,
    Cell,
    Code,
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
    Comparison,
    Document,
    Duplicates,
    Leakage,
    Quarantine,
    Stage,
    Verdict,
)
from curate.report.parts_plan import facts_table, shift_figure, shift_table
from curate.report.parts_scores import column_figure
from curate.report.wording import (
    count_cell,
    duration,
    number_cell,
    share,
    signed,
    whole,
    words,
)

_GLANCE = 10
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
                columns=(Column(title="part"), Column(title="why")),
                rows=[
                    (words(_TITLES.get(name, name)), Cell(text=why, tone="quiet"))
                    for name, why in document.missing.items()
                ],
            )
        )
    return Section(name="summary", tab="Summary", title="What this run did", blocks=blocks)


def defects_section(document: Document) -> Section:
    """Duplicates, leakage and rows that were set aside."""
    blocks: list[Block] = [Heading(text="Duplicates")]
    blocks += (
        _duplicates(document.duplicates)
        if document.duplicates is not None
        else [_missing(document, "duplicates")]
    )
    blocks.append(Heading(text="Leakage: evaluation examples in the training data"))
    blocks += (
        _leakage(document.leakage)
        if document.leakage is not None
        else [_missing(document, "leakage")]
    )
    blocks.append(Heading(text="Rows set aside"))
    blocks += (
        _quarantine(document.quarantine)
        if document.quarantine is not None
        else [_missing(document, "quarantine")]
    )
    return Section(
        name="defects", tab="Defects", title="Duplicates, leakage, rows set aside", blocks=blocks
    )


def comparison_section(document: Document) -> Section:
    """Does the plan help?"""
    it = document.comparison
    return Section(
        name="comparison",
        tab="Comparison",
        title="Does it help?",
        lead="The same model, trained as long on each choice of data, over several seeds."
        if it is not None
        else "",
        blocks=_comparison(it) if it is not None else [_missing(document, "comparison")],
    )


def run_section(document: Document) -> Section:
    """Stages, cost, versions, how to load and how to repeat."""
    it = document.provenance
    blocks: list[Block] = [
        Paragraph(
            text=f"Seed {it.seed}; all stages together took {duration(it.seconds)}.", tone="quiet"
        ),
        _stages(it.stages),
    ]
    if it.load:
        blocks.append(Code(title="Load the shards", text="\n".join(it.load)))
    if it.reproduce:
        blocks.append(Code(title="Make it again", text="\n".join(it.reproduce)))
    for title, facts in (
        ("Inputs", it.inputs),
        ("Versions and machine", it.software),
        ("On disk", it.disk),
    ):
        if facts:
            blocks += [Heading(text=title), facts_table(title, facts)]
    if it.config:
        blocks.append(Code(title="Resolved settings", text=it.config))
    return Section(name="run", tab="Run", title="Run, cost, versions", blocks=blocks)


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
            rows = rows[:_GLANCE]
            table = shift_table(what, rows)
            figures.append(shift_figure(what, rows, shifts.unit, table, wide=False))
    if document.comparison is not None:
        figures += _forest(document.comparison, wide=not len(figures) % 2)
    return figures


def _missing(document: Document, name: str) -> Paragraph:
    return Paragraph(text=document.missing.get(name, "There is nothing to show."), tone="quiet")


def _duplicates(it: Duplicates) -> list[Block]:
    blocks: list[Block] = [Facts(facts=it.facts)] if it.facts else []
    if it.held_out:
        text = f"{whole(it.held_out)} training rows repeat a held-out one."
        blocks.append(Paragraph(text=text, tone="warning"))
    if it.sizes:
        widest = max(rows for _, rows in it.sizes)
        blocks.append(
            Table(
                caption="Rows by the size of their group",
                narrow=True,
                columns=(Column(title="group of"), Column(title="rows", kind="bar")),
                rows=[
                    (words(name), Cell(text=whole(rows), sort=rows, bar=rows / max(1, widest)))
                    for name, rows in it.sizes
                ],
            )
        )
    if it.groups:
        blocks.append(
            Table(
                caption="The largest groups",
                columns=(
                    Column(title="size", kind="number"),
                    Column(title="similarity", kind="number"),
                    Column(title="text of the one that stays"),
                    Column(title="stays", kind="code"),
                    Column(title="others", kind="code"),
                ),
                rows=[
                    (
                        count_cell(one.size),
                        number_cell(one.similarity),
                        words(one.text),
                        words(one.stays),
                        Cell(text=", ".join(one.others), tone="quiet"),
                    )
                    for one in it.groups
                ],
            )
        )
    return blocks


def _leakage(it: Leakage) -> list[Block]:
    titles = (
        "examples",
        "found, kept",
        "found, left out",
        "word for word, kept",
        "training rows kept",
        "left out",
        "too short",
    )
    return [
        Table(
            caption=f"An evaluation example counts as found from {share(it.found_from)} of its "
            "words on",
            columns=(
                Column(title="evaluation set"),
                *(Column(title=title, kind="number") for title in titles),
            ),
            rows=[
                (
                    words(one.name),
                    count_cell(one.examples),
                    Cell(
                        text=whole(one.found_kept),
                        sort=one.found_kept,
                        tone="bad" if one.found_kept else "",
                    ),
                    count_cell(one.found_left_out),
                    Cell(
                        text=whole(one.exact_kept),
                        sort=one.exact_kept,
                        tone="bad" if one.exact_kept else "",
                    ),
                    count_cell(one.rows_kept),
                    count_cell(one.rows_left_out),
                    count_cell(one.short),
                )
                for one in it.sets
            ],
        )
    ]


def _quarantine(it: Quarantine) -> list[Block]:
    if not it.counts:
        return [Paragraph(text="Every row could be used.", tone="quiet")]
    total = sum(it.counts.values())
    blocks: list[Block] = [
        Table(
            caption=f"{whole(total)} rows set aside",
            narrow=True,
            columns=(Column(title="reason"), Column(title="rows", kind="bar")),
            rows=[
                (words(reason), Cell(text=whole(rows), sort=rows, bar=rows / max(1, total)))
                for reason, rows in it.counts.items()
            ],
        )
    ]
    if it.rows:
        blocks.append(
            Table(
                caption="Some of them",
                columns=(
                    Column(title="reason"),
                    Column(title="detail"),
                    Column(title="where", kind="code"),
                ),
                rows=[
                    (
                        words(one.reason),
                        Cell(text=one.detail, tone="quiet"),
                        words(
                            f"{one.source} {one.file}" + ("" if one.row is None else f":{one.row}")
                        ),
                    )
                    for one in it.rows
                ],
            )
        )
    return blocks


def _comparison(it: Comparison) -> list[Block]:
    blocks: list[Block] = [Lines(lines=[one.sentence for one in it.verdicts if one.sentence])]
    blocks += _forest(it, is_open=True) or [_verdicts(it.verdicts)]
    points = [
        {"name": one.arm, "seed": one.seed, "value": one.value}
        for one in it.points
        if one.value is not None
    ]
    if points:
        blocks.append(
            Figure(
                title=f"Every training run: {it.metric}",
                note="A dot a seed, the tick their mean.",
                spec=charts.strip(points, title=it.metric),
                table=Table(
                    caption="Every training run",
                    quiet=True,
                    columns=(
                        Column(title="arm"),
                        Column(title="seed", kind="number"),
                        Column(title=it.metric, kind="number"),
                    ),
                    rows=[
                        (words(one.arm), count_cell(one.seed), number_cell(one.value))
                        for one in it.points
                    ],
                ),
            )
        )
    blocks += [Paragraph(text=note, tone="quiet") for note in it.notes]
    if it.facts:
        blocks += [Heading(text="How it was compared"), facts_table("The comparison", it.facts)]
    if it.parts:
        blocks += [Heading(text="All that was measured", note="Without verdicts."), _parts(it)]
    return blocks


def _forest(it: Comparison, *, wide: bool = True, is_open: bool = False) -> list[Block]:
    rows = [
        {
            "name": one.arm,
            "estimate": one.difference,
            "low": one.low,
            "high": one.high,
            "word": one.word,
        }
        for one in it.verdicts
        if one.difference is not None and one.low is not None and one.high is not None
    ]
    if not rows:
        return []
    return [
        Figure(
            title=f"Difference to random in {it.metric}",
            note=f"With its 95 % interval; {it.better} is better. Coloured where there is a "
            "verdict.",
            spec=charts.forest(rows, title=f"difference in {it.metric}"),
            table=_verdicts(it.verdicts),
            wide=wide,
            is_open=is_open,
        )
    ]


def _verdicts(verdicts: Sequence[Verdict]) -> Table:
    return Table(
        caption="Verdicts",
        quiet=True,
        columns=(
            Column(title="arm"),
            Column(title="verdict"),
            *(Column(title=t, kind="number") for t in ("arm's", "random's", "difference")),
            Column(title="95 % interval", kind="number"),
            Column(title="p", kind="number", about="Corrected for the number of arms."),
            Column(
                title="would be found",
                kind="number",
                about="The smallest difference that four of five such comparisons find.",
            ),
        ),
        rows=[
            (
                words(one.arm),
                Cell(
                    text=one.word,
                    tone="good" if one.word == "helps" else "bad" if one.word == "hurts" else "",
                ),
                number_cell(one.mean_arm),
                number_cell(one.mean_random),
                Cell(text=signed(one.difference), sort=one.difference),
                Cell(text=_interval(one.low, one.high), sort=one.low),
                number_cell(one.p),
                number_cell(one.detectable),
            )
            for one in verdicts
        ],
    )


def _parts(it: Comparison) -> Table:
    more = it.num_parts - len({(one.part, one.metric) for one in it.parts})
    return Table(
        caption="By part and metric",
        quiet=True,
        columns=(
            Column(title="part"),
            Column(title="metric"),
            Column(title="arm"),
            *(
                Column(title=t, kind="number")
                for t in ("seeds", "mean", "spread", "to random", "95 % interval")
            ),
        ),
        rows=[
            (
                words(one.part),
                words(one.metric),
                words(one.arm),
                count_cell(one.seeds),
                number_cell(one.mean),
                number_cell(one.spread),
                Cell(text=signed(one.difference), sort=one.difference),
                Cell(text=_interval(one.low, one.high), sort=one.low),
            )
            for one in it.parts
        ],
        note=f"{whole(more)} parts more are in the run's tables." if more > 0 else "",
    )


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{signed(low)} to {signed(high)}"


def _stages(stages: Sequence[Stage]) -> Table:
    def state(stage: Stage) -> Cell:
        tone = {"done": "good", "failed": "bad"}.get(stage.state, "quiet")
        return Cell(text=stage.state, tone=tone)  # type: ignore[arg-type]

    return Table(
        caption="Stages",
        columns=(
            Column(title="stage"),
            Column(title="state"),
            Column(title="done", kind="number"),
            Column(title="failed", kind="number"),
            Column(title="to do", kind="number"),
            Column(title="took", kind="number"),
            Column(title="finished"),
            Column(title="what"),
        ),
        rows=[
            (
                words(stage.name),
                state(stage),
                count_cell(stage.done),
                count_cell(stage.failed),
                count_cell(stage.remaining),
                Cell(text=duration(stage.seconds), sort=stage.seconds),
                Cell(text=stage.finished or "", tone="quiet"),
                Cell(text=" ".join([stage.summary, *stage.why]).strip(), tone="quiet"),
            )
            for stage in stages
        ],
    )
