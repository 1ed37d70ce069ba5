"""Numbers as a reader wants them: thousands apart, four digits that count, shares in per cent."""

import math
import re

from curate.report.blocks import Cell, Paragraph
from curate.report.document import Document

_MINUS = "\u2212"
NONE = "–"  # noqa: RUF001 - a dash stands for what was not measured


_MOMENT = re.compile(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(?::\d\d(?:\.\d+)?)?(?:\+00:00|Z)")


def whole(value: float | None) -> str:
    """12,345; a dash where there is none."""
    return NONE if value is None else f"{round(value):,}"


def number(value: float | None, digits: int = 4) -> str:
    """Four digits that count, no trailing zeros; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return NONE
    if value and (abs(value) >= 1e6 or abs(value) < 1e-4):
        text = f"{value:.{digits - 1}g}".replace("e+0", "e").replace("e-0", "e-")
    elif abs(value) >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.{digits}g}"
    return f"{_MINUS}{text[1:]}" if text.startswith("-") else text


def signed(value: float | None) -> str:
    """With a plus where it is one."""
    text = number(value, 3)
    return f"+{text}" if value is not None and value > 0 and math.isfinite(value) else text


def share(value: float | None) -> str:
    """12.3 %; more digits where it is small."""
    if value is None or not math.isfinite(value):
        return NONE
    per_cent = 100 * value
    if 0 < abs(per_cent) < 0.01:
        return "< 0.01 %"
    digits = 0 if abs(per_cent) >= 99.95 else 1 if abs(per_cent) >= 1 else 2
    return f"{per_cent:.{digits}f} %" if per_cent else "0 %"


def duration(seconds: float | None) -> str:
    """3.2 s, 4 min 10 s, 2 h 5 min."""
    if seconds is None:
        return NONE
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def moment(text: str | None) -> str:
    """2026-11-22 18:40 UTC from an ISO time with its zone; anything else as it is."""
    found = _MOMENT.fullmatch(text or "")
    return f"{found[1]} {found[2]} UTC" if found else text or ""


def words(text: str | None) -> Cell:
    """A cell of text."""
    return Cell(text=text or "")


def count_cell(value: float | None) -> Cell:
    """A cell of a whole number."""
    return Cell(text=whole(value), sort=value)


def number_cell(value: float | None) -> Cell:
    """A cell of any number."""
    finite = value if value is None or math.isfinite(value) else None
    return Cell(text=number(value), sort=finite)


def share_cell(value: float | None) -> Cell:
    """A cell of a share, without a bar."""
    return Cell(text=share(value), sort=value)


def bar_cell(value: float | None, *, widest: float = 1.0, mark: float | None = None) -> Cell:
    """A cell of a share with a bar; `widest` fills it, a tick stands at `mark`."""

    def part(of: float | None) -> float | None:
        return None if of is None or widest <= 0 else min(1.0, max(0.0, of / widest))

    return Cell(text=share(value), sort=value, bar=part(value), mark=part(mark))


def missing(document: Document, name: str) -> Paragraph:
    """Why a part of the document is not there."""
    why = document.missing.get(name, "there is nothing to show")
    return Paragraph(text=sentence(why), tone="quiet")


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?", ":")) or not text else f"{text}."
