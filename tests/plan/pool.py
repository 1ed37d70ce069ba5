"""A small pool of examples for the tests of the planner."""

from collections.abc import Iterable, Sequence
from typing import Any

import polars as pl

from curate.plan.batches import Tables

SCHEMA: dict[str, Any] = {
    "source": pl.String,
    "file": pl.String,
    "row": pl.Int64,
    "domain": pl.String,
    "label": pl.Int64,
    "split": pl.String,
    "num_chars": pl.Int64,
    "num_tokens": pl.Int64,
    "el2n.el2n": pl.Float32,
    "loss.loss": pl.Float32,
}


def pool(rows: Sequence[dict[str, Any]]) -> pl.DataFrame:
    """Rows with every column that is not given filled in."""
    whole = {
        "source": "web",
        "file": "a.parquet",
        "domain": "web",
        "label": None,
        "split": "train",
        "num_chars": 40,
        "num_tokens": 10,
        "el2n.el2n": None,
        "loss.loss": None,
    }
    return pl.DataFrame(
        [{"row": row, **whole, **given} for row, given in enumerate(rows)], schema=SCHEMA
    )


def tables_of(frame: pl.DataFrame, size: int = 1000) -> Tables:
    """The pool cut into partitions of `size` rows."""

    def frames(columns: Sequence[str]) -> Iterable[pl.DataFrame]:
        index = [name for name in SCHEMA if "." not in name]
        return (part.select(*index, *columns) for part in frame.iter_slices(size))

    return Tables({"el2n": ("el2n",), "loss": ("loss",)}, frames)
