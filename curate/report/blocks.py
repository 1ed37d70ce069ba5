"""What a page is made of: sections of blocks, each block a thing that the template knows to draw.

The document's parts become blocks (`parts_*`), and blocks become HTML (`templates/`). A block holds
plain text and numbers; nothing in it is markup.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from curate.report.document import Fact

Spec = Mapping[str, Any]
"""A Vega-Lite specification. Strings that begin with `@` outside its data name a colour of the
theme: `@accent`, `@quiet`, `@ink`, `@line`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One cell of a table."""

    text: str
    sort: float | None = None
    """What a number is ordered by; None orders by the text."""
    bar: float | None = None
    """Share of the cell's width that a bar fills, 0 to 1."""
    mark: float | None = None
    """Where a tick stands in the bar, 0 to 1: what the bar is to be compared with."""
    tone: Literal["", "good", "bad", "quiet"] = ""
    show: tuple[str, str] | None = None
    """A filter of the examples and its value, that a click on the text sets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """Heading of a column."""

    title: str
    kind: Literal["text", "number", "bar", "code", "said"] = "text"
    """`said`: our own words, in which backticks set code apart."""
    about: str = ""
    """A sentence on what it is, shown at the heading."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows a reader can sort and, where there are many, search."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    quiet: bool = False
    """The caption is for those who do not see the page."""
    narrow: bool = False
    """No wider than its words."""
    kind: Literal["table"] = "table"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A chart with its sentence, and the same numbers as a table."""

    title: str
    spec: Spec
    table: Table
    """What stands in for the chart without scripts, on paper and for screen readers."""
    note: str = ""
    is_open: bool = False
    """Whether the table is shown under the chart from the start."""
    wide: bool = True
    """False: two of them stand side by side where there is room."""
    kind: Literal["figure"] = "figure"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One of several groups of blocks at a time, chosen by name."""

    label: str
    options: Sequence[tuple[str, Sequence["Block"]]]
    kind: Literal["choice"] = "choice"


@dataclass(frozen=True, slots=True, kw_only=True)
class Paragraph:
    """One paragraph; `tone` sets a warning apart."""

    text: str
    tone: Literal["", "warning", "quiet"] = ""
    kind: Literal["paragraph"] = "paragraph"


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading:
    """A heading within a section."""

    text: str
    note: str = ""
    kind: Literal["heading"] = "heading"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """Sentences under each other."""

    lines: Sequence[str]
    kind: Literal["lines"] = "lines"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Key figures side by side."""

    facts: Sequence[Fact]
    kind: Literal["facts"] = "facts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """Something to copy."""

    title: str
    text: str
    kind: Literal["code"] = "code"


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One example."""

    key: str
    """Where it comes from."""
    domain: str
    label: str
    reason: str
    """What the plan says; empty before there is one."""
    tags: Sequence[tuple[str, str]]
    """Short names and values at its head."""
    numbers: Sequence[tuple[str, str]]
    """Names and values of its scores."""
    parts: Sequence[tuple[str, str]]
    """The text in pieces: what it says, and why it is highlighted or nothing."""
    is_cut: bool
    is_long: bool
    """So long that it scrolls."""
    is_code: bool
    """Whether its columns mean something: program text, tables drawn with characters."""
    remarks: Sequence[tuple[str, str]]
    picture: str
    """A data URI or nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Examples that can be filtered and searched."""

    lists: Sequence[tuple[str, Sequence[int]]]
    """Title of a list, places of its cards in order."""
    domains: Sequence[str]
    labels: Sequence[str]
    reasons: Sequence[str]
    cards: Sequence[Card]
    kind: Literal["examples"] = "examples"


Block = Table | Figure | Choice | Paragraph | Heading | Lines | Facts | Code | Examples


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One tab of the page."""

    name: str
    """Its address within the page."""
    tab: str
    title: str
    blocks: Sequence[Block]
    lead: str = ""
    """A sentence under the title."""
