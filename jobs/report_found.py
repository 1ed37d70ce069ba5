"""Duplicates and rows that were set aside, for the page."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl

from curate.data.example import KEY
from curate.data.files import read_document
from curate.data.tables import damage_named
from curate.errors import CurateError, counted
from curate.report.document import DuplicateGroup, Duplicates, Fact, Quarantine, SetAside
from jobs.contents import content_text, read_contents
from jobs.report_bins import rounded
from jobs.report_scores import by_power
from jobs.report_survey import Survey
from jobs.report_tables import Tables
from jobs.show import quarantined

_GROUPS = 8
_OTHERS = 5
_TEXT_CHARS = 300


def duplicates_of(survey: Survey, *, with_texts: bool) -> Duplicates | None:
    """What repeats; None where nobody looked."""
    tables = survey.tables
    if not any(name.startswith("duplicates.") for name in tables.columns):
        return None
    folder = tables.run.root / "duplicates"
    summary = read_document(folder / "summary.json") or {}
    sizes = survey.duplicate_sizes
    return Duplicates(
        facts=_facts(summary),
        sizes=by_power({size: rows for size, rows in sizes.items() if size > 1}),
        groups=_groups(tables, folder) if with_texts else [],
        held_out=summary.get("like_held_out"),
    )


def _facts(summary: Mapping[str, Any]) -> list[Fact]:
    told = {
        "method": "method",
        "limit": "similar from",
        "training": "training rows",
        "removed": "rows that repeat another one",
        "groups": "groups",
        "largest": "rows in the largest group",
        "like_held_out": "training rows like a held-out one",
        "groups_of_several_labels": "groups of several labels",
        "not_compared": "rows that could not be compared",
    }
    if summary.get("method") == "exact":
        del told["limit"]
    return [
        Fact(name=name, value=f"{summary[key]:,}" if _is_number(summary[key]) else summary[key])
        for key, name in told.items()
        if summary.get(key) is not None
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _groups(tables: Tables, folder: Path) -> list[DuplicateGroup]:
    """The largest groups, with the content of the row that stays."""
    paths = [folder / "groups" / f"{part.name}.parquet" for part in tables.parts]
    if not all(path.is_file() for path in paths):
        return []  # the folder may be removed once the scores are there
    with damage_named(paths):
        rows = pl.scan_parquet(paths, glob=False)
        sizes = rows.group_by("group").len().sort("len", "group", descending=[True, False])
        largest = sizes.head(_GROUPS).collect()
        wanted = rows.filter(pl.col("group").is_in(largest["group"].to_list()))
        # A group may be most of the data: some rows of each are enough.
        few = pl.int_range(pl.len()).over("group") < _OTHERS
        others = wanted.filter(~pl.col("keep")).filter(few).collect()
        stays = wanted.filter(pl.col("keep")).collect()
    return [
        _group(tables, group, size, stays.filter(pl.col("group") == group),
               others.filter(pl.col("group") == group))
        for group, size in largest.iter_rows()
    ]  # fmt: skip


def _group(
    tables: Tables, group: int, size: int, stays: pl.DataFrame, others: pl.DataFrame
) -> DuplicateGroup:
    least: float | None = others["similarity"].min()  # pyright: ignore[reportAssignmentType]
    return DuplicateGroup(
        size=size,
        stays=_key(stays.row(0, named=True)) if stays.height else "",
        others=[_key(row) for row in others.iter_rows(named=True)],
        similarity=rounded(least),
        text=_text_at(tables, group),
    )


def _key(row: Mapping[str, Any]) -> str:
    source, file, number = (row[name] for name in KEY)
    return f"{source}/{file}:{number}"


def _text_at(tables: Tables, place: int) -> str:
    """The text of the row at a place in the run's order; empty where it cannot be read."""
    rows = [int((tables.run.examples(part).mark() or {}).get("rows", 0)) for part in tables.parts]
    starts = [0]
    for count in rows:
        starts.append(starts[-1] + count)
    for part, (start, end) in zip(tables.parts, pairwise(starts), strict=True):
        if start <= place < end:
            source = tables.settings.sources[part.source]
            try:
                (fields,) = read_contents(tables.run, part, source, [place - start])
            except (CurateError, OSError):
                return ""
            return content_text(fields)[:_TEXT_CHARS]
    return ""


def quarantine_of(root: Path, *, count: int) -> Quarantine | None:
    """Rows that were set aside; None where there are none.

    Raises:
        InputError: a table is damaged.
    """
    found = quarantined(root, limit=count)
    if not found.counts:
        return None
    rows = [
        SetAside(
            source=row["source"],
            file=row["file"],
            row=row["row"],
            reason=row["reason"],
            detail=str(row["detail"] or "")[:_TEXT_CHARS],
        )
        for row in found.rows
    ]
    return Quarantine(counts=found.counts, rows=rows)


def aside_told(counts: Mapping[str, int]) -> str:
    """How many rows were set aside, in words; empty where there are none."""
    total = sum(counts.values())
    return f"{counted(total, 'row')} set aside" if total else ""
