"""Results as text for people; plain, so that they can be piped and pasted."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jobs.dry_run import Forecast


def table(rows: Sequence[Sequence[str]], *, right: frozenset[int] = frozenset()) -> list[str]:
    """Rows as aligned lines; the first is the header.

    Args:
        rows: of equal length.
        right: columns that are aligned to the right, as numbers are.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def dry_run_lines(forecast: "Forecast", *, details: bool) -> list[str]:
    """What `--dry-run` prints.

    Args:
        forecast: what was found.
        details: every value, the defaults included.
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
    lines += table(rows, right=frozenset({1, 2, 3, 4, 5}))
    if measured:
        lines.append(f"free on this disk: {size_text(forecast.free_bytes)}")
    if forecast.hint:
        lines.append(forecast.hint)
    for name, entry in forecast.stages.items():
        lines += [f"{name}: {why}" for why in entry["why"]]
    lines += [f"changed: {line}" for line in forecast.changes]
    shown = {
        key: entry
        for key, entry in forecast.settings.items()
        if details or entry["origin"] != "default"
    }
    rows = [["setting", "value", "from"]]
    rows += [[key, str(entry["value"]), entry["origin"]] for key, entry in shown.items()]
    lines += ["", *table(rows)]
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
    return str(full.relative_to(here)) if full.is_relative_to(here) else path


def number_text(value: float) -> str:
    """A number for people: thousands set off, few digits."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4g}"
