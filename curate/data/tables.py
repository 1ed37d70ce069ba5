"""The tables of a run: their columns, how they are written, and how they meet.

All tables of a run exist once per partition, with the same rows in the same order, so that they
meet by position. The key stands first in each of them and is compared wherever two meet.
"""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from curate.data.example import KEY
from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.errors import CurateError, InputError

SCHEMA_VERSION = 1

REASONS = (
    "unparsable",
    "missing_text",
    "wrong_type",
    "invalid_utf8",
    "empty",
    "label_out_of_range",
    "unreadable_file",
)
"""Why a row, or with `unreadable_file` a whole file, was set aside."""

_KEY_TYPES: dict[str, pl.DataType] = {
    "source": pl.String(),
    "file": pl.String(),
    "row": pl.Int64(),
}

SCHEMAS: dict[str, dict[str, pl.DataType]] = {
    "examples": {
        **_KEY_TYPES,
        "id": pl.String(),
        "domain": pl.String(),
        "label": pl.Int64(),
        "num_chars": pl.Int64(),
        "content": pl.UInt64(),
        "split": pl.String(),
    },
    "quarantine": {**_KEY_TYPES, "reason": pl.String(), "detail": pl.String()},
    "lengths": {**_KEY_TYPES, "num_tokens": pl.Int64()},
    "plan": {
        **_KEY_TYPES,
        "keep": pl.Boolean(),
        "weight": pl.Float32(),
        "copies": pl.UInt32(),
        "reason": pl.String(),
    },
}
"""Table -> its columns. Scores and quantities have the key and one Float32 column each."""


def write_table(frame: pl.DataFrame, path: Path) -> None:
    """Write `frame` as Parquet; equal frames give equal bytes."""
    # Chunks and the number of threads would otherwise show in the pages.
    frame.rechunk().write_parquet(
        path,
        compression="zstd",
        statistics=True,
        row_group_size=1 << 17,
        metadata={"curate_schema_version": str(SCHEMA_VERSION)},
    )


def read_examples(
    run: RunFolder, part: Partition, columns: Sequence[str] | None = None
) -> pl.DataFrame:
    """The index of one partition.

    Raises:
        InputError: the partition has not been indexed.
    """
    path = run.examples(part).path
    if not path.exists():
        raise InputError(
            f"{path} is missing: {part.source}/{part.file} has not been indexed",
            fix=f"run `curate index {run.root}`",
        )
    return read_table(path, columns)


def read_table(path: Path, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """A table of the run.

    Raises:
        InputError: it is damaged; names the file.
    """
    try:
        return pl.read_parquet(path, columns=list(columns) if columns is not None else None)
    except (pl.exceptions.ComputeError, FileNotFoundError) as error:
        raise InputError(
            f"{path} is missing or damaged: {error}",
            fix="remove what is left of it and run the same command again, which makes it anew",
        ) from error


def meet(left: pl.DataFrame, right: pl.DataFrame) -> None:
    """Check that two tables hold the same examples in the same order.

    Raises:
        CurateError: they do not; names the first key that differs.
    """
    if left.height != right.height:
        raise CurateError(
            f"two tables of one partition have {left.height} and {right.height} rows",
            fix="run the stage that made the older one again",
        )
    for column in reversed(KEY):  # the row differs most often
        differs = left[column].ne_missing(right[column])
        if differs.any():
            at = differs.arg_max() or 0
            raise CurateError(
                f"two tables of one partition differ at row {at}:"
                f" {left.select(KEY).row(at)} against {right.select(KEY).row(at)}",
                fix="run the stage that made the older one again",
            )


def scan(run: RunFolder, folder: str) -> pl.LazyFrame:
    """One table of all partitions, in canonical order, read lazily.

    Args:
        run: the run folder.
        folder: of the table: `examples`, `plan`, `scores/el2n` ...

    Raises:
        InputError: a partition's table is missing: the stage has not finished.
    """
    paths = [run.root / folder / f"{part.name}.parquet" for part in run.partitions()]
    missing = [path for path in paths if not path.exists()]
    if missing or not paths:
        raise InputError(
            f"{run.root / folder} is not complete:"
            f" {len(missing)} of {len(paths)} tables are missing",
            fix=f"finish the stage first: `curate status {run.root}` says what is due",
        )
    return pl.scan_parquet(paths, glob=False)
