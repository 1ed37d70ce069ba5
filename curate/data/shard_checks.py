"""Whether the rows of shards are those that were to be written, whatever their digests say.

Only the `curate_` columns are read. Every row has a key, each example stands as often as the plan
(or, without the run, the manifest) says, with its weight and in its domain, and rows come in the
order that the manifest states. Rows meet by their keys in buckets, on disk where they are many.

Shapes: N rows of a batch.
"""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from curate.data.buckets import Buckets
from curate.data.shard_keys import COLUMNS, READABLE, Problems, key_rows
from curate.data.shard_layout import Component
from curate.data.shard_order_checks import order_watch
from curate.errors import counted

_NAMED = 3
ROW = pl.Schema(
    {
        "hash": pl.UInt64(),
        "file": pl.Int32(),
        "row": pl.Int64(),
        "phase": pl.Int32(),
        "domain": pl.Int32(),
        "copies": pl.Int64(),
        "weight": pl.Float32(),
    }
)
"""A row of a shard, or an example of a plan; names are numbers of `Names`."""

_EXAMPLE = ["file", "row", "phase", "domain"]


@dataclass(slots=True)
class Names:
    """Numbers for files (with their sources) and domains, given as they are met."""

    files: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    domains: dict[str, int] = field(default_factory=dict[str, int])

    def numbered(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Rows with `source`, `file`, `domain` as text -> with the columns `ROW`."""
        pairs = frame.select("source", "file").unique(maintain_order=True)
        for pair in pairs.rows():
            self.files.setdefault(pair, len(self.files))
        domains = frame.select("domain").unique(maintain_order=True)
        for (domain,) in domains.rows():
            self.domains.setdefault(domain, len(self.domains))
        pairs = pairs.with_columns(
            number=pl.Series([self.files[pair] for pair in pairs.rows()], dtype=pl.Int32)
        )
        file = frame.join(pairs, on=["source", "file"], how="left", maintain_order="left")["number"]
        number = pl.col("domain").replace_strict(self.domains, return_dtype=pl.Int32)
        return frame.with_columns(number, file=file).with_columns(_hash()).select(ROW.names())

    def example(self, file: int, row: int) -> str:
        """A key as text."""
        names = {number: pair for pair, number in self.files.items()}
        source, name = names[file]
        return f"{source}/{name}:{row}"

    def domain(self, number: int) -> str:
        return next(name for name, own in self.domains.items() if own == number)


Planned = tuple[str, str, Component, Any, Any, Any]
"""Source, file, component, and of each example row number, copies and weight, (N,)."""


def check_contents(
    folder: Path, manifest: Mapping[str, Any], plan: Iterable[Planned] | None = None
) -> list[str]:
    """Look at the rows of the shards.

    Args:
        folder: of the shards; files and their digests have been checked.
        manifest: its `manifest.json`.
        plan: what was to be written, in any order; None where the run is not at hand.

    Returns:
        A sentence for each thing that is wrong; those of one shard begin with its name, others with
        `rows`.
    """
    form = next((name for name in manifest["formats"] if name in READABLE), None)
    if form is None:
        return []
    shards = [shard for shard in manifest["shards"] if shard["format"] == form]
    names = Names()
    problems = list[str]()
    watch = order_watch(manifest, folder, shards)
    with tempfile.TemporaryDirectory(prefix="curate-verify-") as place:
        buckets = Buckets(Path(place), "hash", (ROW, ROW))
        for shard in shards:
            of_shard = Problems()
            for frame in key_rows(folder / shard["file"], form, of_shard):
                _check_values(frame, shard, manifest, of_shard)
                whole = frame.drop_nulls()
                watch.see(shard, whole, of_shard)
                counts = whole.with_columns(
                    phase=pl.lit(shard["phase"], pl.Int32), copies=pl.lit(1, pl.Int64)
                )
                buckets.add(1, names.numbered(counts))
            problems += [f"{shard['file']}: {text}" for text in of_shard.found]
        for entry in plan or ():
            buckets.add(0, names.numbered(_planned(*entry)))
        found = list[str]()
        if plan is not None:
            found = _against_plan(buckets, names)
        elif "copies" in manifest:
            found = _against_counts(buckets, names, manifest["copies"])
    return problems + [f"rows: {text}" for text in found]


def _hash() -> pl.Expr:
    """Spreads keys over the buckets."""
    mixed = pl.col("row").cast(pl.UInt64, strict=False).fill_null(0) * (1 << 24) + pl.col(
        "file"
    ).cast(pl.UInt64)
    return mixed.hash().alias("hash")


# -- one shard ------------------------------------------------------------------------------------


def _check_values(
    frame: pl.DataFrame, shard: Mapping[str, Any], manifest: Mapping[str, Any], found: Problems
) -> None:
    for name in COLUMNS:
        missing = frame[name].null_count()
        if missing:
            found.add(f"null {name}", f"curate_{name} is missing in {counted(missing, 'row')}")
    weight = pl.col("weight")
    strange = frame.filter(~weight.is_finite() | (weight < 0))
    if strange.height:
        value = strange["weight"][0]
        found.add("weight", f"curate_weight is {value} in row {strange['row'][0]} of its file")
    if manifest.get("weights") == "copies" and (frame["weight"] != 1).any():
        found.add("weight", "curate_weight is not 1, though weights are written as copies")
    elsewhere = frame.filter(pl.col("domain") != shard["domain"])
    if shard["domain"] and elsewhere.height:
        what = f"{counted(elsewhere.height, 'row')} of another domain"
        found.add("domain", f"{what}, such as {elsewhere['domain'][0]!r}")


# -- all rows -------------------------------------------------------------------------------------


def _planned(
    source: str, file: str, component: Component, rows: Any, copies: Any, weights: Any
) -> pl.DataFrame:
    """Examples of a plan, without those that are not written."""
    return pl.DataFrame(
        {"row": rows, "copies": copies, "weight": weights},
        schema={name: ROW[name] for name in ("row", "copies", "weight")},
    ).filter(pl.col("copies") > 0).with_columns(
        source=pl.lit(source),
        file=pl.lit(file),
        phase=pl.lit(component.phase, pl.Int32),
        domain=pl.lit(component.domain),
    )  # fmt: skip


@dataclass(slots=True)
class _Kind:
    """One thing that is wrong with some examples."""

    number: int = 0
    named: list[str] = field(default_factory=list[str])

    def add(self, rows: pl.DataFrame, names: Names) -> None:
        self.number += rows.height
        for row in rows.head(_NAMED - len(self.named)).to_dicts():
            said = f" ({row['said']})" if row.get("said") else ""
            self.named.append(names.example(row["file"], row["row"]) + said)


def _written(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows of one example together."""
    weight = pl.col("weight")
    return rows.group_by(_EXAMPLE).agg(
        copies=pl.col("copies").sum(), weight=weight.min(), most=weight.max()
    )


def _against_plan(buckets: Buckets, names: Names) -> list[str]:
    """Each kept example with its copies and its weight, and no other."""
    kinds = {
        text: _Kind()
        for text in (
            "that the plan does not keep",
            "that the plan keeps, but which are not there",
            "with another number of copies than the plan says",
            "with another weight than the plan says",
        )
    }
    foreign, absent, copies, weights = kinds.values()
    for planned, rows in buckets:
        met = planned.select(*_EXAMPLE, "copies", "weight").join(
            _written(rows), on=_EXAMPLE, how="full", coalesce=True, suffix="_there"
        )
        is_new, is_gone = pl.col("copies").is_null(), pl.col("copies_there").is_null()
        foreign.add(met.filter(is_new), names)
        absent.add(met.filter(is_gone), names)
        both = met.filter(~is_new & ~is_gone)
        said = pl.format("{} in place of {}", "copies_there", "copies")
        copies.add(
            both.filter(pl.col("copies") != pl.col("copies_there")).with_columns(said=said), names
        )
        differs = (pl.col("weight") != pl.col("weight_there")) | (
            pl.col("weight") != pl.col("most")
        )
        weights.add(both.filter(differs), names)
    return _sentences(kinds)


def _sentences(kinds: Mapping[str, _Kind]) -> list[str]:
    return [
        f"{counted(kind.number, 'example')} {text}, such as {', '.join(kind.named)}"
        for text, kind in kinds.items()
        if kind.number
    ]


def _against_counts(
    buckets: Buckets, names: Names, counts: Sequence[Mapping[str, Any]]
) -> list[str]:
    """As many examples with each number of copies as the manifest says."""
    wanted = {
        (entry["phase"], entry["domain"], nth + 1): number
        for entry in counts
        for nth, number in enumerate(entry["examples"])
        if number
    }
    most: dict[tuple[int, str], int] = {}
    for phase, domain, copies in wanted:
        most[phase, domain] = max(copies, most.get((phase, domain), 0))
    found: dict[tuple[int, str, int], int] = {}
    repeated, uneven = _Kind(), _Kind()
    for _, rows in buckets:
        examples = _written(rows)
        uneven.add(examples.filter(pl.col("weight") != pl.col("most")), names)
        for (phase, number), mine in examples.partition_by("phase", "domain", as_dict=True).items():
            domain = names.domain(number)
            limit = most.get((phase, domain), 0)
            said = pl.format("{} times", "copies")
            more = mine.filter(pl.col("copies") > limit).with_columns(said=said)
            repeated.add(more, names)
            for copies, times in mine["copies"].value_counts().rows():
                found[phase, domain, copies] = found.get((phase, domain, copies), 0) + times
    problems = _sentences(
        {
            "more often than any is to be written": repeated,
            "with several weights": uneven,
        }
    )
    for phase, domain, copies in sorted(wanted.keys() | found.keys()):
        there, due = found.get((phase, domain, copies), 0), wanted.get((phase, domain, copies), 0)
        if there != due:
            where = f"domain {domain!r}" + (f" of phase {phase}" if phase else "")
            times = "once" if copies == 1 else f"{copies} times"
            problems.append(
                f"{where}: {counted(there, 'example')} written {times}, not {due:,} as the manifest"
                " says"
            )
    return problems
