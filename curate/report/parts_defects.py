"""The part of the page about defects: duplicates, leakage, rows set aside."""

from curate.report.blocks import Block, Cell, Column, Facts, Heading, Paragraph, Section, Table
from curate.report.document import Document, Duplicates, Leakage, Quarantine
from curate.report.wording import count_cell, missing, number_cell, share, whole, words


def defects_section(document: Document) -> Section:
    """Duplicates, leakage and rows that were set aside."""
    blocks: list[Block] = [Heading(text="Duplicates")]
    blocks += (
        _duplicates(document.duplicates)
        if document.duplicates is not None
        else [missing(document, "duplicates")]
    )
    blocks.append(Heading(text="Leakage: evaluation examples in the training data"))
    blocks += (
        _leakage(document.leakage)
        if document.leakage is not None
        else [missing(document, "leakage")]
    )
    blocks.append(Heading(text="Rows set aside"))
    blocks += (
        _quarantine(document.quarantine)
        if document.quarantine is not None
        else [missing(document, "quarantine")]
    )
    return Section(
        name="defects", tab="Defects", title="Duplicates, leakage, rows set aside", blocks=blocks
    )


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
