"""What `curate score` says at the end, from its tables and their marks."""

from collections.abc import Iterable, Mapping, Sequence

import polars as pl

from curate.data.example import KEY
from curate.data.layout import RunFolder
from curate.data.tables import damage_named
from jobs.chosen import Chosen
from jobs.measurers import Measurer
from jobs.run import Task

_TOLD = ("mean", "sd", "min", "max", "nulls")

Described = dict[str, dict[str, float | None]]
"""Column -> mean, sd, min, max and number of nulls."""


def describe_scores(
    run: RunFolder, chosen: Iterable[Chosen], tasks: Sequence[Task]
) -> dict[str, Described]:
    """Every column of each scorer's tables.

    Raises:
        InputError: a table is damaged.
    """
    found: dict[str, Described] = {}
    for entry in chosen:
        folder = run.root / "scores" / entry.folder
        paths = [t.output.path for t in tasks if t.output.path.parent == folder]
        paths = [path for path in paths if path.exists()]
        if paths:
            with damage_named(paths):
                found[entry.folder] = _described(pl.scan_parquet(paths, glob=False))
    return found


def _described(table: pl.LazyFrame) -> Described:
    columns = [name for name in table.collect_schema().names() if name not in KEY]
    wide = (
        table.select(
            expression
            for column in columns
            for expression in (
                pl.col(column).cast(pl.Float64).mean().alias(f"{column}/mean"),
                pl.col(column).cast(pl.Float64).std().alias(f"{column}/sd"),
                pl.col(column).min().alias(f"{column}/min"),
                pl.col(column).max().alias(f"{column}/max"),
                pl.col(column).null_count().alias(f"{column}/nulls"),
            )
        )
        .collect(engine="streaming")
        .row(0, named=True)
    )
    return {
        column: {key: wide[f"{column}/{key}"] for key in _TOLD}
        for column in columns
        # With a single seed there is no spread to speak of.
        if not (column.endswith("_std") and wide[f"{column}/mean"] is None)
    }


def counts_of_passes(
    run: RunFolder, used: Sequence[Measurer], passes: Sequence[Task]
) -> Mapping[str, int]:
    """What went wrong or was cut, from the marks, so that a rerun says the same."""
    marks = [mark for task in passes if (mark := task.output.mark())]
    counts = {"halved": sum(mark.get("halved", 0) for mark in marks)}
    if used:
        folder = run.root / "quantities" / used[0].slug
        first = [task.output.mark() or {} for task in passes if task.output.path.parent == folder]
        for name in ("unscored", "truncated"):
            counts[name] = sum(mark.get(name, 0) for mark in first)
    return counts


def sayings(tasks: Sequence[Task]) -> dict[str, list[str]]:
    """`says`: a sentence from each mark that has one; nothing where there is none."""
    marks = [mark for task in tasks if (mark := task.output.mark()) if task.is_done()]
    found = [str(mark["says"]) for mark in marks if "says" in mark]
    return {"says": found} if found else {}
