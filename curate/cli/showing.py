"""`curate show` as text."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from curate.cli.text import number_text, place_text, table
from curate.errors import on_one_line

if TYPE_CHECKING:
    from jobs.show import Quarantine, Shown, View

_PREVIEW_CHARS = 96


def shown_lines(view: "View") -> Iterator[str]:
    """The whole page."""
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
    yield from (f"note: {note}" for note in view.notes)
    yield ""
    yield from _domains(view)
    if view.yardsticks:
        yield ""
        yield from _yardsticks(view)
    if view.score is not None:
        for title, examples in (("highest", view.highest), ("lowest", view.lowest)):
            if examples:
                yield ""
                yield f"{title} {view.score}"
                yield from (_example(example) for example in examples)
    if view.set_aside:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in view.set_aside.items())
        yield ""
        yield f"set aside: {counts} (`curate show RUN --quarantine`)"
    if view.load:
        yield ""
        yield "load the shards in Python:"
        yield from (f"    {line}" for line in view.load)


def quarantine_lines(found: "Quarantine") -> Iterator[str]:
    """Counts by reason, then some rows."""
    if not found.counts:
        yield "nothing was set aside"
        return
    yield from table([["reason", "rows"], *([r, f"{n:,}"] for r, n in found.counts.items())],
                     right=frozenset({1}))  # fmt: skip
    yield ""
    for row in found.rows:
        place = f"{row['source']}/{row['file']}"
        place += "" if row["row"] is None else f" row {row['row']}"
        yield f"{row['reason']}: {preview(place)}: {preview(row['detail'] or '')}"


def preview(text: str, *, width: int = _PREVIEW_CHARS) -> str:
    """Text of the data on one line; control characters cannot reach the terminal."""
    line = re.sub(r"\s+", " ", text).strip()
    safe = on_one_line(line[: width + 1])
    return safe if len(safe) <= width else f"{safe[: width - 3]}..."


def _domains(view: "View") -> list[str]:
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
    return table([list(filled), *map(list, rows)], right=frozenset(range(1, len(filled))))


def _yardsticks(view: "View") -> list[str]:
    rows = [[f"at equal {view.unit}", "examples", "mean score", "in common with the plan"]]
    for name, entry in view.yardsticks.items():
        score = "" if entry["mean_score"] is None else f"{entry['mean_score']:.4g}"
        rows.append([name, f"{entry['rows']:,}", score, _share(entry["overlap"])])
    return table(rows, right=frozenset({1, 2, 3}))


def _example(example: "Shown") -> str:
    place = preview(f"{example.source}/{example.file}:{example.row}", width=40)
    text = preview(example.text, width=80)
    return f"  {example.score:<8.4g} {example.reason or '':<15} {place:<40} {text}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
