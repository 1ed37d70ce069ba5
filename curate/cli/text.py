"""Results as text for people; plain, so that they can be piped and pasted."""

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from curate.cli.colour import Paint, plain
from curate.errors import on_one_line

if TYPE_CHECKING:
    from jobs.dry_run import Forecast

_GAP = "  "
_NARROWEST_COLUMN = 12
_HEADER = "bold"


def table(
    rows: Sequence[Sequence[str]],
    *,
    right: frozenset[int] = frozenset(),
    width: int | None = None,
    paint: Paint = plain,
    style: Callable[[int, str], str] = lambda *_: "",
) -> list[str]:
    """Rows as aligned lines; the first is the header.

    What is wider than the terminal loses the middle of its longest texts first, no number of its
    own; then columns go below the others, the first being repeated.

    Args:
        rows: of equal length; control characters are escaped.
        right: columns that are aligned to the right, as numbers are; they are never cut.
        width: of the terminal; None for as wide as it gets.
        paint: how the header and `style` are shown.
        style: column and cell -> style, empty for none.
    """
    rows = [[on_one_line(cell) for cell in row] for row in rows]
    widths = [max(cells(row[i]) for row in rows) for i in range(len(rows[0]))]
    if width is not None:
        titles = [max(_NARROWEST_COLUMN, cells(title)) for title in rows[0]]
        _narrow(widths, titles, [i for i in range(len(widths)) if i not in right], width)

    def line(number: int, columns: Sequence[int]) -> str:
        shown: list[str] = []
        for i in columns:
            text = _cut(rows[number][i], widths[i])
            blank = " " * (widths[i] - cells(text))
            text = blank + text if i in right else text + blank
            its = style(i, rows[number][i]) if number else _HEADER
            shown.append(paint(text, its) if its else text)
        return _GAP.join(shown).rstrip()

    lines: list[str] = []
    for columns in _groups(widths, width):
        lines += [""] * bool(lines)
        lines += [line(number, columns) for number in range(len(rows))]
    return lines


def cells(text: str) -> int:
    """Columns that a text takes on a terminal: Chinese characters take two, accents none."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def cut_end(text: str, width: int) -> str:
    """The text, or its beginning and three dots, in at most `width` columns."""
    if cells(text) <= width:
        return text
    kept = text[: width - 3]
    while cells(kept) > width - 3:
        kept = kept[:-1]
    return f"{kept}..."


def _cut(text: str, width: int) -> str:
    """The text without its middle: what tells names apart stands at their end more often."""
    if cells(text) <= width:
        return text
    head, tail = text[: (width - 2) // 2], text[-((width - 3) // 2) :]
    while cells(head) + cells(tail) > width - 3:
        head, tail = (head[:-1], tail) if cells(head) >= cells(tail) else (head, tail[1:])
    return f"{head}...{tail}"


def _narrow(widths: list[int], least: Sequence[int], texts: Sequence[int], width: int) -> None:
    """Take from the widest of the columns of text until the rows fit, as far as that goes."""
    over = sum(widths) + len(_GAP) * (len(widths) - 1) - width
    while over > 0:
        wide = [i for i in texts if widths[i] > least[i]]
        if not wide:
            return
        widths[max(wide, key=lambda i: widths[i])] -= 1
        over -= 1


def _groups(widths: Sequence[int], width: int | None) -> list[list[int]]:
    """Columns that stand side by side; the first begins each group."""
    groups = [[0]]
    room = (width or 0) - widths[0]
    left = room
    for i in range(1, len(widths)):
        left -= widths[i] + len(_GAP)
        if width is not None and left < 0 and len(groups[-1]) > 1:
            groups.append([0])
            left = room - widths[i] - len(_GAP)
        groups[-1].append(i)
    return groups


def duration_text(seconds: float) -> str:
    """A time for people, in its two largest units: `2 h 5 min`, `3 min 20 s`, `4 s`."""
    whole = max(0, round(seconds))
    days, rest = divmod(whole, 86_400)
    hours, rest = divmod(rest, 3_600)
    minutes, rest = divmod(rest, 60)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    first = next((i for i, (number, _) in enumerate(parts) if number), 3)
    shown = [f"{number} {unit}" for number, unit in parts[first : first + 2] if number]
    return " ".join(shown) or "0 s"


def rate_text(per_second: float | None) -> str:
    """A rate for people: `12,340`, `9.5`, `0.021`; nothing where it is not known."""
    if per_second is None:
        return ""
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.2g}"


def dry_run_lines(
    forecast: "Forecast", *, details: bool, paint: Paint = plain, width: int | None = None
) -> list[str]:
    """What `--dry-run` prints.

    Args:
        forecast: what was found.
        details: every value, the defaults included.
        paint: colours.
        width: of the terminal.
    """
    lines = [f"run folder {place_text(forecast.run)} (nothing is written)", ""]
    measured = forecast.measured
    finish = datetime.now().astimezone()
    rows = [["stage", "outputs", "done", "due", *(("hours", "disk", "finish") if measured else ())]]
    for name, entry in forecast.stages.items():
        # Before an earlier stage has run nobody knows what it will change here.
        due = f"after {', '.join(entry['after'])}" if entry["after"] else str(entry["due"])
        row = [name, str(entry["total"]), str(entry["done"]), due]
        if "seconds" in entry:
            finish += timedelta(seconds=entry["seconds"])
            row += [f"{entry['seconds'] / 3600:.3f}", size_text(entry.get("size_bytes")),
                    finish.strftime("%Y-%m-%d %H:%M")]  # fmt: skip
        elif measured:
            row += ["not measured" if entry["due"] or entry["after"] else "0", "", ""]
        rows.append(row)
    lines += table(rows, right=frozenset({1, 2, 3, 4, 5}), width=width, paint=paint)
    if measured:
        lines.append(f"free on this disk: {size_text(forecast.free_bytes)}")
    if forecast.hint:
        lines.append(forecast.hint)
    for name, entry in forecast.stages.items():
        lines += [f"{name}: {on_one_line(why)}" for why in entry["why"]]
    lines += [f"changed: {on_one_line(line)}" for line in forecast.changes]
    shown = {
        key: entry
        for key, entry in forecast.settings.items()
        if details or entry["origin"] != "default"
    }
    rows = [["setting", "value", "from"]]
    rows += [[key, str(entry["value"]), entry["origin"]] for key, entry in shown.items()]
    lines += ["", *table(rows, width=width, paint=paint)]
    if not details:
        lines.append("(-v lists the defaults too)")
    return lines


def size_text(size_bytes: float | None) -> str:
    """Bytes for people: `1.2 GB`; nothing where it is not known."""
    if size_bytes is None:
        return ""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


def place_text(path: str) -> str:
    """A path as one would type it: relative where it lies below the working folder."""
    here = Path.cwd()
    full = Path(path)
    return on_one_line(str(full.relative_to(here)) if full.is_relative_to(here) else path)


def number_text(value: float) -> str:
    """A number for people: thousands set off, few digits."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4g}"
