"""Two folders of shards, compared by their manifests and, where they are Parquet, by their rows."""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from curate.data.buckets import Buckets, key_hash
from curate.data.files import read_document
from curate.errors import InputError
from curate.plan.difference import COUNTS, FACTS, Tally, remaining_rows, same_rows
from jobs.opening import flat

_BATCH_ROWS = 1 << 16
_PLACE_BITS = 40
_COLUMNS = ("source", "file", "row", "weight", "domain")
_COMPARED = ("formats", "order", "weights", "curriculum", "unit", "columns")
"""What two manifests say of the whole."""

_ROW = pl.Schema({name: FACTS[name] for name in (*_COLUMNS, "content", "place")})


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of shards and its manifest."""

    root: Path
    manifest: Mapping[str, Any]

    @property
    def files(self) -> dict[str, str]:
        """Every file of every shard -> its digest."""
        entries = [
            entry for s in self.manifest["shards"] for entry in (s, *s.get("companions", ()))
        ]
        return {entry["file"]: entry["digest"] for entry in entries}

    @property
    def counted(self) -> list[dict[str, Any]]:
        """The shards in the format that counts: rows of others are the same ones again."""
        first = self.manifest.get("formats", ["parquet"])[0]
        return [s for s in self.manifest["shards"] if s.get("format", "parquet") == first]

    @property
    def tables(self) -> list[str]:
        """Shards whose rows can be told apart: Parquet with our columns."""
        shards = self.manifest["shards"]
        return [s["file"] for s in shards if s.get("format", "parquet") == "parquet"]

    def rows(self) -> Iterator[pl.DataFrame]:
        """What our columns say of every row, with its place."""
        names = [f"curate_{name}" for name in _COLUMNS]
        for number, name in enumerate(self.tables):
            place = number << _PLACE_BITS
            path = self.root / name
            try:
                with pq.ParquetFile(path) as file:
                    for batch in file.iter_batches(_BATCH_ROWS, columns=names, use_threads=False):
                        frame = pl.DataFrame(batch).rename(lambda column: column[len("curate_") :])
                        places = pl.int_range(place, place + frame.height, dtype=pl.Int64)
                        place += frame.height
                        yield (
                            frame.with_columns(
                                key_hash().alias("content"), places.alias("place")
                            ).select(pl.col(name).cast(kind) for name, kind in _ROW.items())
                        )
            except (pa.ArrowException, OSError, pl.exceptions.PolarsError) as error:
                raise InputError(
                    f"{path} cannot be read: {error}",
                    fix=f"`curate verify {self.root}` names all that is damaged",
                ) from error

    def text(self, place: int | None, most: int) -> str | None:
        """The texts of a row, one after the other, cut."""
        if place is None:
            return None
        path = self.root / self.tables[place >> _PLACE_BITS]
        at = place & ((1 << _PLACE_BITS) - 1)
        with pq.ParquetFile(path) as file:
            names = [
                field.name
                for field in file.schema_arrow
                if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
            ]
            own = [name for name in names if not name.startswith("curate_")]
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if at < size:
                    row = file.read_row_group(group, columns=own).slice(at, 1).to_pylist()[0]
                    return "\n".join(text for text in row.values() if text)[:most]
                at -= size
        return None


@dataclass(frozen=True, slots=True)
class Compared:
    """What was found."""

    tally: Tally
    keyed: bool
    same: bool
    files: dict[str, Any]
    settings: list[dict[str, Any]]
    unit: str
    notes: list[str]


def open_folder(path: Path) -> Folder | None:
    """The shards at a path or in the run there; None where there are none."""
    for root in (path / "shards", path):
        manifest = read_document(root / "manifest.json")
        if manifest is not None and isinstance(manifest.get("shards"), list):
            return Folder(root, manifest)
    return None


def compare_shards(left: Folder, right: Folder, examples: int) -> Compared:
    """Files by their digests, rows by their keys, counts by domain."""
    files = _files(left, right)
    tally, notes = Tally(examples), list[str]()
    units = [str(folder.manifest.get("unit")) for folder in (left, right)]
    if units[0] != units[1]:
        notes.append(f"A counts {units[0]}, B counts {units[1]}: counts cannot be compared")
    has_keys = bool(left.tables and right.tables)
    if has_keys:
        for pairs in _pairs(left, right):
            tally.add(pairs)
    else:
        notes.append("rows have keys in Parquet shards only: only files and counts are compared")
    for side, folder in (("a", left), ("b", right)):
        _count_domains(tally, side, folder, with_rows=not has_keys)
    unchanged = not any(files[name] for name in ("changed", "only_a", "only_b"))
    return Compared(
        tally,
        has_keys,
        tally.is_same if has_keys else unchanged,
        files,
        _settings(left.manifest, right.manifest),
        units[0] if units[0] == units[1] else "rows",
        notes,
    )


def _files(left: Folder, right: Folder) -> dict[str, Any]:
    a, b = left.files, right.files
    of_digest = {digest: file for file, digest in b.items() if a.get(file) != digest}
    renamed = {
        file: of_digest[digest]
        for file, digest in a.items()
        if b.get(file) != digest and digest in of_digest
    }
    targets = set(renamed.values())
    return {
        "same": sum(b.get(file) == digest for file, digest in a.items()),
        "renamed": [{"a": file, "b": target} for file, target in renamed.items()],
        "changed": [
            file
            for file in a
            if file in b and a[file] != b[file] and file not in renamed and file not in targets
        ],
        "only_a": [file for file in a if file not in b and file not in renamed],
        "only_b": [file for file in b if file not in a and file not in targets],
    }


def _settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the manifests say differently of the whole."""
    before, after = (
        flat({name: values[name] for name in _COMPARED if name in values}) for values in (a, b)
    )
    return [
        {"key": key, "a": before.get(key), "b": after.get(key)}
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _pairs(left: Folder, right: Folder) -> Iterator[pl.DataFrame]:
    with tempfile.TemporaryDirectory(prefix="curate-diff-") as place:
        buckets = Buckets(Path(place), "content", (_ROW, _ROW))
        for side, folder in enumerate((left, right)):
            for frame in folder.rows():
                buckets.add(side, frame)
        for frames in buckets:
            a, b = (_examples(frame) for frame in frames)
            pairs, *rest = same_rows(a, b)
            yield pairs
            yield from remaining_rows(*rest)


def _examples(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows of the same key as one example with so many copies."""
    found = rows.group_by("source", "file", "row", maintain_order=True).agg(
        pl.col("content", "domain", "place").first(),
        copies=pl.len().cast(pl.Int64),
        weight=pl.col("weight").mean(),
    )
    return found.with_columns(
        keep=pl.lit(value=True), reason=pl.lit("kept"), tokens=pl.lit(None, pl.Int64)
    ).select(FACTS.names())


def _count_domains(tally: Tally, side: str, folder: Folder, *, with_rows: bool) -> None:
    """Tokens of each domain, and rows where they have not been looked at, from the manifest."""
    for shard in folder.counted:
        entry = tally.domains.setdefault(
            shard["domain"], {s: dict.fromkeys(COUNTS, 0) for s in "ab"}
        )[side]
        entry["tokens"] += int(shard["tokens"] or 0)
        if with_rows:
            for name in ("rows", "kept", "copies"):
                entry[name] += int(shard["rows"])
