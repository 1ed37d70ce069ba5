"""`duplicates` by vectors, against every pair of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file

from curate.data.layout import RunFolder
from jobs.duplicates import num_cells
from jobs.index import index_run
from scorers.duplicates import Duplicates
from tests.jobs.duplicates_pool import (
    COLUMN,
    INLINE,
    groups_of,
    scored,
    sentence,
    settings_of,
    summary_of,
    write,
    write_clouds,
)


@pytest.fixture
def clouds(tmp_path: Path) -> np.ndarray:
    return write_clouds(tmp_path)


def published(vectors: np.ndarray, order: Sequence[int]) -> dict[int, float]:
    """Row -> largest cosine with any row before it: SemDeDup's code, every pair in float64."""
    ordered = list(order)
    wide = vectors[ordered].astype(np.float64)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    products = np.triu(wide @ wide.T, k=1)
    return dict(zip(ordered, products.max(axis=0).tolist(), strict=True))


@pytest.mark.parametrize("keep_by", [None, "first", "central", "num_chars"])
@pytest.mark.parametrize("threshold", [0.99, 0.95, 0.8])
def test_similar_rows_give_way_as_published(
    tmp_path: Path, clouds: np.ndarray, keep_by: str | None, threshold: float
):
    settings = settings_of(
        tmp_path, more=COLUMN, method="semantic", threshold=threshold, keep_by=keep_by
    )
    found = scored(settings)
    rows = [row for row in range(90) if row not in (10, 11)]
    wide = clouds[rows].astype(np.float64)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    centre = wide.mean(axis=0) / np.linalg.norm(wide.mean(axis=0))
    distance = dict(zip(rows, (-(wide @ centre)).tolist(), strict=True))
    chars = found["num_chars"].to_list()
    before: Callable[[int], Any] = {
        None: lambda row: (-round(distance[row], 5), row),
        "first": lambda row: row,
        "central": lambda row: (round(distance[row], 5), row),
        "num_chars": lambda row: (-chars[row], row),
    }[keep_by]
    largest = published(clouds, sorted(rows, key=before))
    similarity = found["duplicate_similarity"].to_list()
    assert [similarity[row] for row in rows] == pytest.approx(
        [max(0, largest[row]) for row in rows], abs=1e-5
    )
    assert similarity[10:12] == [None, None]
    keep = found["duplicate_keep"].to_list()
    assert [keep[row] for row in rows] == [largest[row] <= threshold for row in rows]
    assert keep[10:12] == [1, 1]
    groups = groups_of(settings)
    sizes = groups.group_by("group").agg(pl.len(), pl.col("keep").sum())
    assert (sizes["keep"] == 1).all()
    stays = found.filter((pl.col("duplicate_keep") == 1) & (pl.col("duplicate_size") > 1))
    assert sorted(sizes["len"]) == sorted(stays["duplicate_size"].cast(pl.Int64))
    facts = summary_of(settings)
    assert facts["not_compared"] == 2
    assert facts["removed"] == keep.count(0)


def test_another_threshold_needs_no_other_pass(tmp_path: Path, clouds: np.ndarray):
    """The similarities of one run tell what any threshold removes, exact copies too."""
    loose = scored(settings_of(tmp_path, more=COLUMN, method="semantic", threshold=0.5))
    for threshold in (0.8, 0.9, 0.97):
        settings = settings_of(tmp_path, more=COLUMN, method="semantic", threshold=threshold)
        marks = [p.stat().st_mtime_ns for p in Path(settings.run).glob("duplicates/pairs/*.saf*")]
        strict = scored(settings)
        removed = (loose["duplicate_similarity"] > threshold).fill_null(False)
        assert (strict["duplicate_keep"] == 0).equals(removed.alias("duplicate_keep"))
        assert marks == [
            p.stat().st_mtime_ns for p in Path(settings.run).glob("duplicates/pairs/*.saf*")
        ]


def test_rows_are_compared_within_their_cells(tmp_path: Path, clouds: np.ndarray):
    settings = settings_of(tmp_path, more=COLUMN, method="semantic", cells=6, keep_by="first")
    found = scored(settings)
    run = RunFolder(Path(settings.run))
    cells = np.concatenate(
        [
            load_file(run.root / "duplicates" / "cells" / f"{part.name}.safetensors")["cells"]
            for part in run.partitions()
        ]
    )
    assert set(cells.tolist()) == {-1, 0, 1, 2, 3, 4, 5}
    assert np.flatnonzero(cells == -1).tolist() == [10, 11]
    for cell in range(6):
        rows = np.flatnonzero(cells == cell).tolist()
        largest = published(clouds, rows)
        assert [found["duplicate_similarity"][row] for row in rows] == pytest.approx(
            [max(0, largest[row]) for row in rows], abs=1e-5
        )


def test_more_cells_than_rows_and_a_single_row(tmp_path: Path, clouds: np.ndarray):
    found = scored(settings_of(tmp_path, more=COLUMN, method="semantic", cells=4000))
    assert found["duplicate_keep"].to_list()[50] == 0  # copies give way wherever they lie
    write(tmp_path / "one" / "a" / "x.parquet", ["a single row"], v=[[1.0, 0.0]])
    several: list[dict[str, Any]] = [{}, {"method": "near"}, {"method": "semantic", "cells": 3}]
    for options in several:
        settings = settings_of(
            tmp_path / "one", f"run{len(options)}", more=COLUMN if len(options) == 2 else None,
            **options,
        )  # fmt: skip
        found = scored(settings)
        assert found["duplicate_keep"].to_list() == [1]
        assert found["duplicate_similarity"].to_list() == [0]


def test_vectors_that_are_all_missing_leave_contents(tmp_path: Path):
    texts = [sentence(1), sentence(2), sentence(1)]
    write(tmp_path / "a" / "one.parquet", texts, v=[[0.0, 0.0]] * 3)
    for cells in (None, 2):
        settings = settings_of(tmp_path, more=COLUMN, method="semantic", cells=cells)
        found = scored(settings)
        assert found["duplicate_keep"].to_list() == [1, 1, 0]
        assert found["duplicate_similarity"].to_list() == [None, None, 1]


def test_cells_follow_the_size_of_the_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "a" / "one.parquet", ["x"])
    settings = settings_of(tmp_path)
    index_run(settings, pool=INLINE)
    run = RunFolder(Path(settings.run))
    for rows, cells in ((1, 1), (20_000, 1), (20_001, 2), (1_000_000, 100)):
        monkeypatch.setattr("jobs.duplicates.num_rows", lambda *_, rows=rows: rows)
        assert num_cells(run, Duplicates(method="semantic")) == cells
    assert num_cells(run, Duplicates(method="semantic", cells=7)) == 7
