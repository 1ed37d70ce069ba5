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
from typing import Any, NamedTuple

import polars as pl

from curate.data.buckets import Buckets
from curate.data.example import KEY
from curate.data.shard_keys import COLUMNS, Problems, key_rows, readable_format
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


_TOGETHER = 1 << 16
"""Rows that are numbered at a time: shards of a few rows each would cost more one by one."""


@dataclass(slots=True)
class Names:
    """Numbers for files (with their sources) and domains, given as they are met."""

    files: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    domains: dict[str, int] = field(default_factory=dict[str, int])

    def numbered(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Rows with `source`, `file`, `domain` as text -> with the columns `ROW`."""
        pairs = frame.select("source", "file").unique(maintain_order=True)
        files = [self.files.setdefault(pair, len(self.files)) for pair in pairs.rows()]
        names = frame.select("domain").unique(maintain_order=True)
        domains = [self.domains.setdefault(name, len(self.domains)) for (name,) in names.rows()]
        for known, numbers, column in ((pairs, files, "file"), (names, domains, "domain")):
            series = pl.Series("number", numbers, dtype=pl.Int32)
            met = frame.join(
                known.with_columns(series), on=known.columns, how="left", maintain_order="left"
            )
            frame = frame.with_columns(met["number"].alias(f"{column}_number"))
        return frame.with_columns(
            file=pl.col("file_number"), domain=pl.col("domain_number")
        ).with_columns(_hash()).select(ROW.names())  # fmt: skip

    def example(self, file: int, row: int) -> str:
        """A key as text."""
        source, name = next(pair for pair, number in self.files.items() if number == file)
        return f"{source}/{name}:{row}"

    def of_domains(self) -> list[str]:
        """The domains, by their numbers."""
        return list(self.domains)


class Planned(NamedTuple):
    """What a plan wants of the examples of one file, in one phase; N of them."""

    source: str
    file: str
    phase: int
    rows: Any
    """(N,) their numbers in the file."""
    domains: Any
    """(N,) numbers of `names`."""
    names: Sequence[str]
    copies: Any
    """(N,) how often each is written; 0 is not at all."""
    weights: Any
    """(N,)"""


class _Numbering:
    """Brings rows to one side of the buckets, many at a time."""

    def __init__(self, buckets: Buckets, side: int, names: Names) -> None:
        self._buckets, self._side, self._names = buckets, side, names
        self._held = list[pl.DataFrame]()
        self._rows = 0

    def add(self, frame: pl.DataFrame) -> None:
        """Take rows with the columns of `ROW` but for the hash, and with their source."""
        self._held.append(frame)
        self._rows += frame.height
        if self._rows >= _TOGETHER:
            self.flush()

    def flush(self) -> None:
        if self._held:
            self._buckets.add(self._side, self._names.numbered(pl.concat(self._held)))
        self._held, self._rows = [], 0


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
    form = readable_format(manifest["formats"])
    if form is None:
        return []
    shards = [shard for shard in manifest["shards"] if shard["format"] == form]
    names = Names()
    problems = list[str]()
    watch = order_watch(manifest, folder, shards)
    with tempfile.TemporaryDirectory(prefix="curate-verify-") as place:
        buckets = Buckets(Path(place), "hash", (ROW, ROW))
        written = _Numbering(buckets, 1, names)
        for shard in shards:
            of_shard = Problems()
            for frame in key_rows(folder / shard["file"], form, of_shard):
                _check_values(frame, shard, manifest, of_shard)
                whole = frame.drop_nulls()
                watch.see(shard, whole, of_shard)
                counts = whole.select(
                    *KEY,
                    pl.lit(shard["phase"], pl.Int32).alias("phase"),
                    "domain",
                    pl.lit(1, pl.Int64).alias("copies"),
                    "weight",
                )
                written.add(counts)
            problems += [f"{shard['file']}: {text}" for text in of_shard.found]
        written.flush()
        wanted = _Numbering(buckets, 0, names)
        for entry in plan or ():
            wanted.add(_planned(entry))
        wanted.flush()
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


def _planned(entry: Planned) -> pl.DataFrame:
    """Examples of a plan, without those that are not written."""
    columns = {"row": entry.rows, "copies": entry.copies, "weight": entry.weights}
    frame = pl.DataFrame(columns, schema={name: ROW[name] for name in columns})
    names = pl.Series(entry.names, dtype=pl.String)
    return frame.with_columns(
        source=pl.lit(entry.source),
        file=pl.lit(entry.file),
        phase=pl.lit(entry.phase, pl.Int32),
        domain=names.gather(entry.domains),
    ).filter(pl.col("copies") > 0).select(*KEY, "phase", "domain", "copies", "weight")  # fmt: skip


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
    domains = names.of_domains()
    most: dict[tuple[int, int], int] = {}
    for phase, domain, copies in wanted:
        number = names.domains.get(domain, -1)
        most[phase, number] = max(copies, most.get((phase, number), 0))
    limits = pl.DataFrame(
        [(*component, limit) for component, limit in most.items()],
        schema={"phase": pl.Int32, "domain": pl.Int32, "limit": pl.Int64},
        orient="row",
    )
    found: dict[tuple[int, str, int], int] = {}
    repeated, uneven = _Kind(), _Kind()
    for _, rows in buckets:
        examples = _written(rows)
        uneven.add(examples.filter(pl.col("weight") != pl.col("most")), names)
        limited = examples.join(limits, on=["phase", "domain"], how="left")
        more = limited.filter(pl.col("copies") > pl.col("limit").fill_null(0))
        repeated.add(more.with_columns(said=pl.format("{} times", "copies")), names)
        for phase, number, copies, times in (
            examples.group_by("phase", "domain", "copies").len().rows()
        ):
            key = (phase, domains[number], copies)
            found[key] = found.get(key, 0) + times
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
