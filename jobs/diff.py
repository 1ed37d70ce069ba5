"""`curate diff`: what changed between two plans, or between two folders of shards.

Files of both runs are read side by side, a stretch of each at a time, however they are cut into
partitions; only rows that do not meet there are kept, on disk where they are many.
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from curate.data.buckets import Buckets
from curate.data.counts import read_counts
from curate.data.example import KEY
from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.data.reading import read_fields
from curate.data.tables import meet, read_examples, read_table
from curate.errors import CurateError, InputError
from curate.plan.difference import (
    COUNTS,
    FACTS,
    KEYED,
    MATCHES,
    Stretch,
    Tally,
    aligned,
    same_rows,
    unmatched_pairs,
)
from jobs.contents import content_text
from jobs.diff_shards import Folder, compare_shards, open_folder
from jobs.opening import flat, load_settings, saved_values
from jobs.plan_tables import read_summary
from jobs.settings import Settings
from jobs.store import at_hand
from jobs.write_tasks import is_planned

_TEXT_CHARS = 2000

_OF_EXAMPLES = ("rows", "kept", "only", "effective_size")
"""What is counted by example; `copies` are rows of shards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What `curate diff` tells."""

    a: str
    b: str
    kind: str
    """`plans` or `shards`."""
    same: bool
    """Whether the same examples are kept in the same way."""
    keyed: bool
    """Whether both sides say which example each row is. Where not, only files, rows and tokens are
    known: `kept` and `examples` are empty, and so is what needs them in `totals` and `domains`."""
    notes: list[str]
    settings: list[dict[str, Any]]
    """`key`, and its value in `a` and in `b`."""
    unit: str
    """tokens, characters, or rows where there are neither."""
    totals: dict[str, dict[str, Any]]
    """Side -> `rows`, `kept`, `copies`, `tokens`, `effective_size`."""
    kept: dict[str, int]
    """Examples kept in `both`, in `only_a`, in `only_b`."""
    examples: dict[str, int]
    """Of all examples: `same`, `moved`, `changed`, `added`, `removed`."""
    kinds: dict[str, int]
    """What happened -> number of examples; one may be in several."""
    reasons: list[dict[str, Any]]
    """`a`, `b`, `rows`: what the plans say of the same examples; `absent` where it is not there."""
    files: list[dict[str, Any]]
    """Input files whose rows differ: `source`, `file`, rows in `a` and `b`, the `same` in both."""
    domains: list[dict[str, Any]]
    """`domain`, and for `a` and `b` `rows`, `kept`, `copies`, `tokens`, `only`, `share`."""
    shown: dict[str, list[dict[str, Any]]]
    """Kind -> some examples: `match`, and for `a` and `b` key, domain, copies, weight, reason,
    text. As they are: escape them before they reach a terminal."""
    shards: dict[str, Any] = field(default_factory=dict[str, Any])
    """Of shards: files that are the `same`, `renamed`, `changed`, in `only_a` and `only_b`, and
    what the manifests say differently."""


def difference(a: Path, b: Path, *, examples: int = 3) -> Difference:
    """Compare two runs by their plans, or two data sets by their shards.

    Args:
        a: a run, or a folder of shards.
        b: another; `only_b` is what is new in it.
        examples: how many of each kind are shown.

    Raises:
        InputError: one of them has neither a plan nor shards, or they have nothing in common to be
            compared by.
        CurateError: tables of a run are damaged or do not belong together.
    """
    a, b = (at_hand(path, shards=True) for path in (a, b))
    runs = [_planned(path) for path in (a, b)]
    if runs[0] is not None and runs[1] is not None:
        return _of_plans((a, runs[0]), (b, runs[1]), examples)
    folders = [open_folder(path) for path in (a, b)]
    for path, folder, run in zip((a, b), folders, runs, strict=True):
        if folder is None:
            other = " or write them, as the other side has shards only" if run else ""
            raise InputError(
                f"{path} has no {'shards' if run else 'complete plan and no shards'}",
                fix=f"name a run folder with a plan, or a folder of shards{other}",
            )
    assert folders[0] is not None
    assert folders[1] is not None
    return _of_shards((a, folders[0]), (b, folders[1]), examples)


def _planned(path: Path) -> RunFolder | None:
    """The run at a path, if there is one with a complete plan."""
    if not path.is_dir():
        raise InputError(f"there is no folder {path}", fix="check the path")
    if saved_values(path) is None:
        return None
    run = RunFolder(path.absolute())
    return run if is_planned(run) else None


# -- plans ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Side:
    """One of the two runs."""

    run: RunFolder
    summary: Mapping[str, Any]
    partitions: list[Partition]

    @property
    def by_file(self) -> dict[tuple[str, str], list[tuple[int, Partition]]]:
        """(source, file) -> its partitions in order, each with its number."""
        found: dict[tuple[str, str], list[tuple[int, Partition]]] = {}
        for number, part in enumerate(self.partitions):
            found.setdefault((part.source, part.file), []).append((number, part))
        return found

    def stretches(self, parts: Iterable[tuple[int, Partition]]) -> Iterator[Stretch]:
        for number, part in parts:
            frame = _facts(self.run, part, self.summary["tokenizer"])
            yield (
                part.first_row + part.num_rows,
                frame.with_columns(place=pl.lit(number, pl.Int64)).select(FACTS.names()),
            )


def _facts(run: RunFolder, part: Partition, tokenizer: str | None) -> pl.DataFrame:
    plan = read_table(run.planned(part).path)
    examples = read_examples(run, part, [*KEY, "domain", "content"])
    meet(plan, examples)
    tokens: Any = pl.lit(None, pl.Int64)
    if tokenizer is not None:
        lengths = read_counts(run, part, tokenizer)
        meet(plan, lengths)
        tokens = lengths["num_tokens"]
    keep = pl.col("keep").fill_null(value=False)
    return examples.hstack(plan.drop(KEY)).with_columns(
        keep=keep,
        copies=pl.when(keep).then("copies").otherwise(0).fill_null(0).cast(pl.Int64),
        weight=pl.when(keep).then("weight").otherwise(0).fill_null(0).cast(pl.Float64),
        tokens=tokens,
    )


def _of_plans(a: tuple[Path, RunFolder], b: tuple[Path, RunFolder], examples: int) -> Difference:
    sides = tuple(_Side(run, read_summary(run) or {}, run.partitions()) for run in (a[1], b[1]))
    tally = Tally(examples)
    for pairs in _plan_pairs(sides[0], sides[1]):
        tally.add(pairs)
    notes: list[str] = []
    units = [_unit(side.summary["tokenizer"]) for side in sides]
    if sides[0].summary["tokenizer"] != sides[1].summary["tokenizer"]:
        notes.append(
            f"lengths are counted by different tokenizers ({units[0]}, {units[1]}): token counts"
            " of A and B cannot be compared, shares can"
        )
    unit = units[0] if units[0] == units[1] else "tokens"
    shown = _Texts(dict(zip("ab", sides, strict=True)))
    return _result(
        tally,
        (a[0], b[0]),
        kind="plans",
        keyed=True,
        same=tally.is_same,
        unit=unit,
        notes=notes,
        settings=_settings(a[0], b[0]),
        shown={kind: [shown.entry(kind, row) for row in frame.to_dicts()]
               for kind, frame in _ordered(tally)},
    )  # fmt: skip


def _plan_pairs(left: _Side, right: _Side) -> Iterator[pl.DataFrame]:
    files = (left.by_file, right.by_file)
    with tempfile.TemporaryDirectory(prefix="curate-diff-") as folder:
        places = [Path(folder, name) for name in ("content", "key")]
        for place in places:
            place.mkdir()
        content = Buckets(places[0], "content", (FACTS, FACTS))
        keys = Buckets(places[1], "key", (KEYED, KEYED))
        for name in sorted(files[0].keys() | files[1].keys()):
            for frames in aligned(
                left.stretches(files[0].get(name, ())), right.stretches(files[1].get(name, ()))
            ):
                pairs, *rest = same_rows(*frames)
                yield pairs
                for side, frame in enumerate(rest):
                    content.add(side, frame)
        yield from unmatched_pairs(content, keys)


def _unit(tokenizer: str | None) -> str:
    return {None: "rows", "characters": "characters"}.get(tokenizer, "tokens")


def _settings(a: Path, b: Path) -> list[dict[str, Any]]:
    """Settings that differ; where the run lies is none."""
    before, after = (flat(saved_values(path) or {}) for path in (a, b))
    return [
        {"key": key, "a": before.get(key), "b": after.get(key)}
        for key in sorted(before.keys() | after.keys())
        if key != "run" and before.get(key) != after.get(key)
    ]


class _Texts:
    """Reads the examples that are shown from the inputs of their runs."""

    def __init__(self, sides: Mapping[str, _Side]) -> None:
        self._sides = sides
        self._settings: dict[str, Settings] = {}

    def entry(self, kind: str, row: Mapping[str, Any]) -> dict[str, Any]:
        wanted = "a" if row["source_b"] is None or kind == "kept in A only" else "b"
        texts = ("a", "b") if row["match"] == "changed" else (wanted,)
        return {
            "match": row["match"],
            **{
                side: shown_side(row, side, self._text(row, side) if side in texts else None)
                for side in "ab"
            },
        }

    def _text(self, row: Mapping[str, Any], side: str) -> str:
        found = self._sides[side]
        part = found.partitions[row[f"place_{side}"]]
        try:
            if side not in self._settings:
                self._settings[side] = load_settings(found.run.root)
            source = self._settings[side].sources[part.source]
            at = read_examples(found.run, part, ["row"])["row"].index_of(row[f"row_{side}"])
            assert at is not None
            fields = read_fields(found.run, part, source).row(at, named=True)
        except CurateError as error:
            return f"(cannot be read: {error.what})"
        return content_text(fields)[:_TEXT_CHARS]


def shown_side(row: Mapping[str, Any], side: str, text: str | None) -> dict[str, Any] | None:
    """What is shown of a pair on one side; None where it is not there."""
    if row[f"source_{side}"] is None:
        return None
    names = ("source", "file", "row", "domain", "copies", "weight", "reason")
    return {**{name: row[f"{name}_{side}"] for name in names}, "text": text}


# -- shards ---------------------------------------------------------------------------------------


def _of_shards(a: tuple[Path, Folder], b: tuple[Path, Folder], examples: int) -> Difference:
    found = compare_shards(a[1], b[1], examples)

    def entry(row: Mapping[str, Any]) -> dict[str, Any]:
        side, folder = ("a", a[1]) if row["source_b"] is None else ("b", b[1])
        text = folder.text(row[f"place_{side}"], _TEXT_CHARS)
        texts = {side: text}
        return {
            "match": row["match"],
            **{side: shown_side(row, side, texts.get(side)) for side in "ab"},
        }

    return _result(
        found.tally,
        (a[0], b[0]),
        kind="shards",
        keyed=found.keyed,
        same=found.same,
        unit=found.unit,
        notes=found.notes,
        settings=found.settings,
        shown={kind: [entry(row) for row in frame.to_dicts()]
               for kind, frame in _ordered(found.tally) if kind not in ("added", "removed")},
        shards=found.files,
    )  # fmt: skip


# -- the result -----------------------------------------------------------------------------------


def _ordered(tally: Tally) -> list[tuple[str, pl.DataFrame]]:
    return [(kind, tally.shown[kind]) for kind in tally.kinds if kind in tally.shown]


def _result(
    tally: Tally, places: tuple[Path, Path], *, unit: str, keyed: bool,
    shards: Mapping[str, Any] | None = None, **more: Any,
) -> Difference:  # fmt: skip
    measure = "copies" if unit == "rows" else "tokens"
    totals: dict[str, dict[str, Any]] = {
        side: {
            **{name: tally.total(side, name) for name in COUNTS},
            "effective_size": round(tally.effective(side), 3),
        }
        for side in "ab"
    }
    domains: list[dict[str, Any]] = [
        {
            "domain": domain,
            **{
                side: {
                    **counts,
                    "share": counts[measure] / totals[side][measure]
                    if totals[side][measure]
                    else 0.0,
                }
                for side, counts in entry.items()
            },
        }
        for domain, entry in sorted(tally.domains.items())
    ]
    only = {f"only_{side}": totals[side].pop("only") for side in "ab"}
    if not keyed:  # rows with copies cannot be told from examples
        totals = {side: _without_examples(entry) for side, entry in totals.items()}
        domains = [
            {**entry, **{side: _without_examples(entry[side]) for side in "ab"}}
            for entry in domains
        ]
    return Difference(
        a=str(places[0]),
        b=str(places[1]),
        unit=unit,
        keyed=keyed,
        totals=totals,
        kept={"both": tally.kept_in_both, **only} if keyed else {},
        examples={match: tally.matches[match] for match in MATCHES} if keyed else {},
        kinds=dict(tally.kinds),
        reasons=[
            {"a": a, "b": b, "rows": rows}
            for (a, b), rows in sorted(tally.reasons.items(), key=lambda item: (-item[1], item[0]))
        ],
        files=[
            {"source": source, "file": file, **rows}
            for (source, file), rows in sorted(tally.files.items())
            if not rows["a"] == rows["b"] == rows["same"]
        ],
        domains=domains,
        shards=dict(shards or {}),
        **more,
    )


def _without_examples(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in _OF_EXAMPLES}
