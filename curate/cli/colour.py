"""Colours and width of the terminal; where stdout is none, lines are plain and as long as they are.

A line is laid out first and painted then, so that the codes of a terminal count for nothing in
tables, and what is piped has none.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterable
from typing import TextIO

Paint = Callable[[str, str], str]
"""A text, and a style of rich such as `bold` or `red`, to the text as a terminal shows it."""

_NARROWEST = 40


def plain(text: str, _: str) -> str:
    """No colours."""
    return text


def painter(stream: TextIO | None = None) -> Paint:
    """Colours for a terminal; `plain` for pipes and files, with NO_COLOR, and on dumb terminals.

    Args:
        stream: where the text goes; stdout by default.
    """
    if not has_colours(stream):
        return plain
    from rich.color import ColorSystem
    from rich.style import Style

    def paint(text: str, style: str) -> str:
        # Blanks stay blank: a title that is underlined to the end of its column is ugly.
        shown = text.rstrip(" ")
        return (
            Style.parse(style).render(shown, color_system=ColorSystem.STANDARD) + text[len(shown) :]
        )

    return paint


def has_colours(stream: TextIO | None = None) -> bool:
    """Whether colours may be used there."""
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return wanted and is_terminal(stream)


def is_terminal(stream: TextIO | None = None) -> bool:
    """Whether somebody reads `stream`, stdout by default, as it comes."""
    stream = stream or sys.stdout
    return stream is not None and stream.isatty()  # pyright: ignore[reportUnnecessaryComparison]


def show(lines: Callable[[Paint, int | None], Iterable[str]]) -> None:
    """Print lines on stdout, painted and folded where it is a terminal.

    Args:
        lines: made for colours and a width; None is as wide as they get.
    """
    print("\n".join(lines(painter(), width_of())))


def width_of(stream: TextIO | None = None) -> int | None:
    """Columns of the terminal, None where there is none: what is piped is not folded."""
    return max(_NARROWEST, shutil.get_terminal_size().columns) if is_terminal(stream) else None
