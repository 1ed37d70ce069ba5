"""The `curate_` columns of shards, read without the others."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

COLUMNS = ("source", "file", "row", "weight", "domain")
"""Ours, without their prefix."""

READABLE = ("parquet", "arrow")
"""Formats whose key columns can be read without the others."""

_BATCH_ROWS = 1 << 17


def readable_format(formats: Sequence[str]) -> str | None:
    """The format whose rows are looked at; None where no format can be."""
    return next((name for name in formats if name in READABLE), None)


@dataclass(slots=True)
class Problems:
    """Of one shard, each of them once."""

    found: list[str] = field(default_factory=list[str])
    _kinds: set[str] = field(default_factory=set[str])

    def add(self, kind: str, text: str) -> None:
        if kind not in self._kinds:
            self._kinds.add(kind)
            self.found.append(text)


def key_rows(path: Path, form: str, problems: Problems) -> Iterator[pl.DataFrame]:
    """Batches of our columns, without their prefix."""
    names = [f"curate_{name}" for name in COLUMNS]
    try:
        for batch in _batches(path, form, names):
            frame = pl.DataFrame(pa.Table.from_batches([batch]).select(names))
            yield frame.rename(dict(zip(names, COLUMNS, strict=True))).cast(
                {
                    "source": pl.String,
                    "file": pl.String,
                    "domain": pl.String,
                    "row": pl.Int64,
                    "weight": pl.Float32,
                }
            )
    except KeyError as error:
        problems.add("columns", f"has no column {error.args[0]}")
    except (OSError, pa.ArrowException, pl.exceptions.PolarsError) as error:
        problems.add("columns", f"its keys cannot be read: {error}")


def _batches(path: Path, form: str, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    if form == "parquet":
        with pq.ParquetFile(path) as file:
            _require(file.schema_arrow, names)
            yield from file.iter_batches(_BATCH_ROWS, columns=list(names), use_threads=False)
        return
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
        _require(reader.schema, names)
        for batch in reader:
            yield batch.select(list(names))


def _require(schema: pa.Schema, names: Sequence[str]) -> None:
    for name in names:
        if name not in schema.names:
            raise KeyError(name)
