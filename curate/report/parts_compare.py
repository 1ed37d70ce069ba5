"""The part of the page about the comparison: does the plan help?"""

from collections.abc import Sequence

from curate.report import charts_by_name as charts
from curate.report.blocks import (
    Block,
    Cell,
    Column,
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
    Verdict,
)
from curate.report.parts_run import facts_table
from curate.report.wording import (
    count_cell,
    missing,
    number_cell,
    sentence,
    signed,
    whole,
    words,
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
        blocks=_comparison(it) if it is not None else [missing(document, "comparison")],
    )


def forest_of(it: Comparison, *, wide: bool = True, is_open: bool = False) -> list[Block]:
    """The differences to random with their intervals, where there are any."""
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


def _comparison(it: Comparison) -> list[Block]:
    blocks: list[Block] = [Paragraph(text=text, tone="warning") for text in it.doubts]
    blocks.append(Lines(lines=[sentence(one.sentence) for one in it.verdicts if one.sentence]))
    blocks += forest_of(it, is_open=True) or [_verdicts(it.verdicts)]
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
    more = it.num_parts - len(it.parts)
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
        note=f"{whole(more)} more are in the run's tables." if more > 0 else "",
    )


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{signed(low)} to {signed(high)}"
