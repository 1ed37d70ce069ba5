"""The part of the page about the run: stages, cost, versions, how to load and to repeat it."""

from collections.abc import Sequence

from curate.report.blocks import (
    Block,
    Cell,
    Code,
    Column,
    Heading,
    Paragraph,
    Section,
    Table,
)
from curate.report.document import (
    Document,
    Fact,
    Stage,
)
from curate.report.wording import (
    count_cell,
    duration,
    moment,
    words,
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


def _stages(stages: Sequence[Stage]) -> Table:
    def state(stage: Stage) -> Cell:
        tone = {"done": "good", "failed": "bad"}.get(stage.state, "quiet")
        return Cell(text=stage.state, tone=tone)  # type: ignore[arg-type]

    return Table(
        caption="Stages",
        columns=(
            Column(title="stage"),
            Column(title="state"),
            Column(title="files", kind="number", about="Finished files that the stage has made."),
            Column(title="failed tasks", kind="number"),
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
                Cell(text=duration(stage.seconds), sort=stage.seconds),
                Cell(text=moment(stage.finished), tone="quiet"),
                Cell(text=" ".join([stage.summary, *stage.why]).strip(), tone="quiet"),
            )
            for stage in stages
        ],
    )
