"""The part of the page about the mixture: the share of each domain, and how it came about."""

from collections.abc import Sequence

from curate.report import charts, charts_by_name
from curate.report.blocks import (
    Block,
    Cell,
    Choice,
    Column,
    Facts,
    Figure,
    Heading,
    Paragraph,
    Section,
    Table,
)
from curate.report.document import (
    Document,
    Line,
    Mixture,
    MixturePath,
)
from curate.report.wording import (
    bar_cell,
    count_cell,
    missing,
    number_cell,
    share,
    share_cell,
    words,
)


def mixture_section(document: Document) -> Section:
    """The share that each domain gets, and how it came about."""
    it = document.mixture
    blocks: list[Block] = []
    lead = ""
    if it is None:
        blocks.append(missing(document, "mixture"))
    else:
        lead = f"Found by {it.mixer}. Shares are of {document.unit}."
        blocks += _mixture(it)
    return Section(
        name="mixture", tab="Mixture", title="The mixture of domains", lead=lead, blocks=blocks
    )


def _mixture(it: Mixture) -> list[Block]:
    blocks: list[Block] = [Paragraph(text=note, tone="quiet") for note in it.notes]
    if it.facts:
        blocks.append(Facts(facts=it.facts))
    drawn = [one for one in it.domains if one.num_domains == 1]
    rows = [{"name": one.domain, "before": one.natural, "after": one.asked} for one in drawn]
    total = sum(one.num_domains for one in it.domains)
    note = "Hollow: in the pool. Filled: in the mixture."
    if len(drawn) < total:
        note += f" The {len(drawn)} largest of {total:,} domains."
    blocks.append(
        Figure(
            title="From the pool's shares to the mixture's",
            note=note,
            spec=charts_by_name.before_after(rows, title="share"),
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
