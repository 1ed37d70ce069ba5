"""`curate show` as text."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from curate.cli.colour import Paint, plain
from curate.cli.text import cells, cut_end, number_text, place_text, table
from curate.errors import on_one_line

if TYPE_CHECKING:
    from jobs.show import Quarantine, Shown, View

_PREVIEW_CHARS = 96
_PLACE_CHARS = 40
_TEXT_CHARS = 80
_LABEL_CHARS = 60
_BEFORE_PLACE = 28
"""Columns that the score and the reason of an example take."""
_REASONS = {"kept": "green", "unscored": "yellow"}


def shown_lines(view: "View", *, paint: Paint = plain, width: int | None = None) -> Iterator[str]:
    """The whole page.

    Args:
        view: what was found.
        paint: colours.
        width: of the terminal; None for lines as long as they are.
    """
    yield f"run {place_text(view.run)}"
    if view.kept is not None:
        kept, training = view.kept, view.training
        line = f"kept {number_text(kept['rows'])} of {number_text(training['rows'])} examples"
        line += f" ({_share(kept['row_share'])})"
        if view.unit != "examples":
            counts = f"{number_text(kept['tokens'])} of {number_text(training['tokens'])}"
            line += f", {counts} {view.unit}"
            line += f" ({_share(kept['token_share'])})"
        yield line
    yield from (f"{paint('note', 'yellow')}: {on_one_line(note)}" for note in view.notes)
    yield ""
    yield from _domains(view, paint, width)
    if view.yardsticks:
        yield ""
        yield from _yardsticks(view, paint, width)
    if view.score is not None:
        for title, examples in (("highest", view.highest), ("lowest", view.lowest)):
            if examples:
                yield ""
                yield paint(f"{title} {on_one_line(view.score)}", "bold")
                for example in examples:
                    yield from _example(example, paint, width)
        if view.highest or view.lowest:
            yield paint("  (source/file:row; rows count from 0)", "dim")
    if view.set_aside:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in view.set_aside.items())
        yield ""
        yield f"set aside: {counts} (`curate show RUN --quarantine`)"
    if view.load:
        yield ""
        yield paint("load the shards in Python:", "bold")
        yield from (f"    {on_one_line(line)}" for line in view.load)


def quarantine_lines(
    found: "Quarantine", *, paint: Paint = plain, width: int | None = None
) -> Iterator[str]:
    """Counts by reason, then some rows."""
    if not found.counts:
        yield "nothing was set aside"
        return
    yield from table([["reason", "rows"], *([r, f"{n:,}"] for r, n in found.counts.items())],
                     right=frozenset({1}), width=width, paint=paint)  # fmt: skip
    yield ""
    for row in found.rows:
        place = f"{row['source']}/{row['file']}"
        place += "" if row["row"] is None else f" row {row['row']}"
        reason = paint(on_one_line(row["reason"]), "yellow")
        yield f"{reason}: {paint(preview(place), 'dim')}: {preview(row['detail'] or '')}"


def preview(text: str, *, width: int = _PREVIEW_CHARS) -> str:
    """Text of the data on one line; control characters cannot reach the terminal."""
    line = re.sub(r"\s+", " ", text).strip()
    return cut_end(on_one_line(line[: width + 1]), width)


def _domains(view: "View", paint: Paint, width: int | None) -> list[str]:
    has_tokens = view.unit != "examples"
    counted_by = view.unit if has_tokens else ""
    columns = {
        "domain": [preview(d.domain) for d in view.domains],
        "examples": [f"{d.rows:,}" for d in view.domains],
        counted_by: [f"{d.tokens:,}" if has_tokens else "" for d in view.domains],
        "natural": [_share(d.natural_share) for d in view.domains],
        "asked": [_share(d.asked_share) for d in view.domains],
        "kept": [_share(d.kept_share) for d in view.domains],
        "random": [_share(d.random_share) for d in view.domains],
        "kept rows": ["" if d.kept_rows is None else f"{d.kept_rows:,}" for d in view.domains],
        "epochs": ["" if d.epochs is None else f"{d.epochs:.2f}" for d in view.domains],
    }
    filled = {title: cells for title, cells in columns.items() if any(cells)}
    rows = zip(*filled.values(), strict=True)
    return table(
        [list(filled), *map(list, rows)],
        right=frozenset(range(1, len(filled))),
        width=width,
        paint=paint,
        style=lambda i, _: "cyan" if i == 0 else "",
    )


def _yardsticks(view: "View", paint: Paint, width: int | None) -> list[str]:
    rows = [[f"at equal {view.unit}", "examples", "mean score", "in common with the plan"]]
    for name, entry in view.yardsticks.items():
        score = "" if entry["mean_score"] is None else f"{entry['mean_score']:.4g}"
        rows.append([name, f"{entry['rows']:,}", score, _share(entry["overlap"])])
    return table(rows, right=frozenset({1, 2, 3}), width=width, paint=paint)


def _example(example: "Shown", paint: Paint, width: int | None) -> list[str]:
    """Score, reason, key, label and text; on a terminal the text ends where the line does.

    A label that would leave the text little room has a line of its own below.
    """
    room = _PLACE_CHARS if width is None else max(16, min(_PLACE_CHARS, width // 3))
    place = preview(f"{example.source}/{example.file}:{example.row}", width=room)
    place += " " * (room - cells(place))
    rest = _TEXT_CHARS if width is None else max(8, width - _BEFORE_PLACE - room)
    reason = f"{on_one_line(example.reason or ''):<15}"
    reason = paint(reason, _REASONS.get(example.reason or "", "red"))
    score = paint(f"{example.score:<8.4g}", "bold")
    label = _label(example)
    is_below = width is not None and cells(label) > rest // 2
    before = "" if is_below or not label else f"{label}: "
    text = before + preview(example.text, width=max(8, rest - cells(before)))
    lines = [f"  {score} {reason} {paint(place, 'dim')} {text}"]
    if is_below:
        lines.append(" " * 11 + cut_end(label, max(16, (width or 0) - 11)))
    return lines


def _label(example: "Shown") -> str:
    if example.label is None:
        return ""
    label = f"label {preview(example.label, width=_LABEL_CHARS)}"
    if example.likely_label is not None:
        label += f", likely {preview(example.likely_label, width=_LABEL_CHARS)}"
    return label


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
