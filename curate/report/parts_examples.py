"""The part of the page with examples to read."""

import re
from collections.abc import Sequence

from curate.report.blocks import Block, Card, Examples, Paragraph, Section
from curate.report.document import Document, Example, Mark
from curate.report.wording import missing, number, whole

_PICTURE = re.compile(r"data:image/(png|jpeg|webp|gif);base64,[A-Za-z0-9+/=]+")
_ALIGNED = re.compile(r"\n(?: {2,}|\t)|\S(?: {3,}|\t)\S")
_LONG_LINES = 10
"""A text of more has a scroll bar of its own, which a keyboard must reach."""
_LINE_CHARS = 45
"""Of a line on a narrow screen."""
_WHY = {"leakage": "stands in an evaluation example too"}


def examples_section(document: Document) -> Section:
    """The ends of every score, random ones, those that were left out."""
    samples = document.samples
    blocks: list[Block] = []
    if samples is None:
        blocks.append(missing(document, "samples"))
    else:
        titles = {c.name: c.title for c in document.scores.columns} if document.scores else {}
        lists = [(pick.title, pick.examples) for pick in samples.picks]
        if document.leakage is not None and document.leakage.examples:
            lists.append(("holds evaluation examples", document.leakage.examples))
        several = len({example.domain for example in samples.examples}) > 1
        cards = [_card(example, titles, with_domain=several) for example in samples.examples]
        blocks += [Paragraph(text=note, tone="quiet") for note in samples.notes]
        blocks.append(
            Examples(
                lists=lists,
                cards=cards,
                domains=sorted({card.domain for card in cards}),
                labels=sorted({card.label for card in cards}),
                reasons=sorted({card.reason for card in cards}, key=lambda r: (r != "kept", r)),
            )
        )
    return Section(
        name="examples",
        tab="Examples",
        title="Examples to read",
        blocks=blocks,
        lead="The ends of each score, and some at random. Read them before you trust a number."
        " A place is source, file:row; rows count from 0.",
    )


def pieces(text: str, marks: Sequence[Mark]) -> list[tuple[str, str]]:
    """The text cut at its marks: (piece, why it is highlighted or nothing).

    Marks that overlap an earlier one, or that lie outside, lose what is not theirs.
    """
    parts: list[tuple[str, str]] = []
    end = 0
    for mark in sorted(marks, key=lambda mark: mark.start):
        start, stop = max(mark.start, end), min(mark.end, len(text))
        if start < stop:
            parts += [(text[end:start], ""), (text[start:stop], _WHY.get(mark.kind, mark.kind))]
            end = stop
    parts.append((text[end:], ""))
    return [part for part in parts if part[0]]


def _lines(text: str) -> int:
    """How many lines a text takes on a narrow screen."""
    return sum(1 + len(line) // _LINE_CHARS for line in text.split("\n"))


def _card(example: Example, titles: dict[str, str], *, with_domain: bool) -> Card:
    tags = [("domain", example.domain)] if with_domain else []
    if example.label is not None:
        tags.append(("label", example.label))
    if example.likely_label is not None and example.likely_label != example.label:
        tags.append(("likely label", example.likely_label))
    if example.num_tokens is not None:
        tags.append(("tokens", whole(example.num_tokens)))
    if example.copies is not None and example.copies > 1:
        tags.append(("copies", whole(example.copies)))
    if example.weight is not None and example.weight not in (0.0, 1.0):
        tags.append(("weight", number(example.weight, 3)))
    picture = example.picture or ""
    short = {name: titles.get(name, name) for name in example.scores}
    alone = len(set(short.values())) == len(short)
    return Card(
        key=f"{example.source} {example.file}:{example.row}",
        domain=example.domain,
        label=example.label or "",
        reason=example.reason or "",
        tags=tags,
        numbers=[
            (short[name] if alone else name, number(value))
            for name, value in example.scores.items()
        ],
        parts=pieces(example.text, example.marks),
        is_cut=example.is_cut,
        is_code=len(_ALIGNED.findall(example.text)) > 2,
        is_long=_lines(example.text) > _LONG_LINES,
        remarks=[(fact.name, fact.value) for fact in example.facts],
        # Nothing but a picture may stand where a picture's address is expected.
        picture=picture if _PICTURE.fullmatch(picture) else "",
    )
