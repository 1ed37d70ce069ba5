"""`curate diff` as text."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.cli.colour import Paint, plain, show
from curate.cli.reporter import print_json, start_logging
from curate.cli.showing import preview
from curate.cli.text import cells, number_text, table
from curate.errors import counted, on_one_line

if TYPE_CHECKING:
    from jobs.diff import Difference

Lay = Callable[..., list[str]]
"""`curate.cli.text.table` for the terminal's colours and width."""

_LINES = 20
"""Of files, domains, reasons and settings; all are in `--json`."""


def print_difference(a: Path, b: Path, *, examples: int, as_json: bool) -> None:
    """`curate diff`."""
    from jobs.diff import difference

    start_logging(quiet=True, verbose=False)
    found = difference(a, b, examples=examples)
    if as_json:
        print_json("diff", asdict(found))
    else:
        show(lambda paint, width: difference_lines(found, paint=paint, width=width))


def difference_lines(
    found: "Difference", *, paint: Paint = plain, width: int | None = None
) -> Iterator[str]:
    """The whole page; one line where nothing differs.

    Args:
        found: what differs.
        paint: colours.
        width: of the terminal; None for lines as long as they are.
    """
    lay = partial(table, width=width, paint=paint)
    what = "plans keep" if found.kind == "plans" else "shards hold"
    files = found.shards
    differ = files and any(files[name] for name in ("renamed", "changed", "only_a", "only_b"))
    if found.same:
        line = f"the same: both {what} the same {_held(found)}"
        yield f"{line}, in different files" if differ else line
    else:
        yield f"A {preview(found.a)}"
        yield f"B {preview(found.b)}"
    yield from (f"{paint('note', 'yellow')}: {preview(note, width=400)}" for note in found.notes)
    if found.settings:
        yield ""
        yield from _settings(found, lay)
    if differ:
        yield ""
        yield from _shard_files(files)
    if found.same:
        return
    if found.files:
        yield ""
        yield from _files(found, lay)
    yield ""
    yield from _totals(found, lay)
    yield ""
    yield from _domains(found, lay)
    changed = [entry for entry in found.reasons if entry["a"] != entry["b"]]
    if changed:
        yield ""
        rows = [["reason in A", "reason in B", "examples"]]
        rows += [[e["a"], e["b"], f"{e['rows']:,}"] for e in changed[:_LINES]]
        yield from lay(rows, right=frozenset({2}))
    for kind, shown in found.shown.items():
        yield ""
        yield f"{paint(kind, 'bold')}: {found.kinds[kind]:,}"
        yield from (f"  {line}" for entry in shown for line in _example(kind, entry, paint, width))


def _held(found: "Difference") -> str:
    if not found.keyed:
        return counted(found.totals["b"]["copies"], "row")
    return f"{counted(found.totals['b']['kept'], 'example')} in the same way"


def _settings(found: "Difference", lay: Lay) -> Iterator[str]:
    rows = [["setting" if found.kind == "plans" else "manifest", "A", "B"]]
    rows += [
        [preview(entry["key"]), *(_value(entry[side]) for side in "ab")]
        for entry in found.settings[:_LINES]
    ]
    yield from lay(rows)
    yield from _more(found.settings)


def _value(value: Any) -> str:
    return "none" if value is None else preview(str(value), width=40)


def _shard_files(files: Mapping[str, Any]) -> Iterator[str]:
    names = {"renamed": "renamed", "changed": "changed", "only_a": "in A only",
             "only_b": "in B only"}  # fmt: skip
    told = [f"{len(files[key]):,} {text}" for key, text in names.items() if files[key]]
    yield f"files: {files['same']:,} the same, {', '.join(told)}"


def _files(found: "Difference", lay: Lay) -> Iterator[str]:
    rows = [["input file", "rows in A", "rows in B", "the same"]]
    for entry in found.files[:_LINES]:
        place = preview(f"{entry['source']}/{entry['file']}", width=60)
        rows.append([place, *(f"{entry[name]:,}" for name in ("a", "b", "same"))])
    yield from lay(rows, right=frozenset({1, 2, 3}))
    yield from _more(found.files)


def _totals(found: "Difference", lay: Lay) -> Iterator[str]:
    rows = [["", "A", "B"]]
    a, b = found.totals["a"], found.totals["b"]
    names = {"rows": "training examples", "kept": "kept", "copies": "kept, with copies"}
    if found.unit != "rows":
        names["tokens"] = f"kept {found.unit}" if found.keyed else found.unit
    if found.kind == "shards":
        del names["rows"]
    names["effective_size"] = "effective examples"
    if not found.keyed:
        names = {name: text for name, text in names.items() if name in a} | {"copies": "rows"}
    rows += [[text, number_text(a[name]), number_text(b[name])] for name, text in names.items()]
    yield from lay(rows, right=frozenset({1, 2}))
    if not found.keyed:
        return
    told = [f"{found.kept[key]:,} {text}" for key, text in
            (("both", "in both"), ("only_a", "in A only"), ("only_b", "in B only"))]  # fmt: skip
    yield f"kept: {', '.join(told)}"
    others = {name: count for name, count in found.examples.items() if name != "same" and count}
    if others:
        line = ", ".join(f"{count:,} {name}" for name, count in others.items())
        yield f"examples: {found.examples['same']:,} the same, {line}"


def _domains(found: "Difference", lay: Lay) -> Iterator[str]:
    """Those whose share changes most come first."""
    measure = "tokens" if found.unit != "rows" else "copies"
    head = [f"kept {found.unit} in A", "in B"] if measure == "tokens" else ["rows in A", "in B"]
    counts = ["kept in A", "in B", "A only", "B only"]
    if not found.keyed:
        head = [head[0].removeprefix("kept "), "in B"]
        counts = ["rows in A", "in B"] if measure == "tokens" else []
    rows = [["domain", *counts, *head, "share in A", "in B"]]
    order = sorted(
        found.domains, key=lambda e: (-abs(e["a"]["share"] - e["b"]["share"]), e["domain"])
    )
    for entry in order[:_LINES]:
        a, b = entry["a"], entry["b"]
        numbers = [a[measure], b[measure]]
        if found.keyed:
            numbers = [a["kept"], b["kept"], a["only"], b["only"], *numbers]
        elif counts:
            numbers = [a["copies"], b["copies"], *numbers]
        shares = [f"{100 * side['share']:.1f} %" for side in (a, b)]
        name = preview(entry["domain"], width=40)
        rows.append([name, *(f"{number:,}" for number in numbers), *shares])
    yield from lay(rows, right=frozenset(range(1, len(rows[0]))))
    yield from _more(order)


def _more(entries: list[Any]) -> Iterator[str]:
    if len(entries) > _LINES:
        yield f"and {len(entries) - _LINES:,} more (--json has them all)"


def _example(kind: str, entry: Mapping[str, Any], paint: Paint, width: int | None) -> Iterator[str]:
    a, b = entry["a"], entry["b"]
    there = b or a
    room = 40 if width is None else max(16, min(40, width // 3))
    rest = 72 if width is None else max(16, width - room - 32)
    place = preview(f"{there['source']}/{there['file']}:{there['row']}", width=room)
    place = paint(place + " " * (room - cells(place)), "dim")
    said = _said(kind, a, b)
    texts = [side["text"] for side in (a, b) if side and side["text"] is not None]
    yield f"{place} {said:<28} {preview(texts[0], width=rest) if texts else ''}".rstrip()
    if len(texts) > 1:
        yield f"{'':<{room}} {'now':<28} {preview(texts[1], width=rest)}"


def _said(kind: str, a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> str:
    """What is different, in a few words."""
    if a is None or b is None:
        return on_one_line(str((a or b or {})["reason"]))
    name = {"copies changed": "copies", "weight changed": "weight", "domain changed": "domain"}
    if kind in name:
        key = name[kind]
        before, after = (
            f"{side[key]:.4g}" if key == "weight" else str(side[key]) for side in (a, b)
        )
    elif kind == "moved":
        return preview(f"from {a['file']}:{a['row']}", width=28)
    else:
        before, after = a["reason"], b["reason"]
    return preview(before if before == after else f"{before} -> {after}", width=28)
