"""Rows that are read once and gone through again."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from curate.plan import batches as batches_module
from curate.plan.batches import Batches, Tables
from curate.plan.groups import Cell
from tests.plan.pool import pool, tables_of

FRAME = pool(
    [
        {
            "source": "web" if row % 7 else "books",
            "domain": f"d{row % 3}",
            "label": None if row % 4 == 0 else row % 2,
            "split": "held_out" if row % 5 == 0 else "train",
            "num_tokens": row,
            "el2n.el2n": None if row % 6 == 0 else row / 8,
        }
        for row in range(50)
    ]
)


def counted(tables: Tables) -> tuple[Tables, list[Sequence[str]]]:
    """The same tables, and the columns of every time they are read."""
    asked: list[Sequence[str]] = []

    def frames(columns: Sequence[str]) -> Iterable[pl.DataFrame]:
        asked.append(columns)
        return tables.frames(columns)

    return replace(tables, frames=frames), asked


def everything(batches: Batches) -> list[tuple[object, ...]]:
    """Each training row, its cell by name."""
    found: list[tuple[object, ...]] = []
    for batch in batches:
        cells = [batches.cells.cells[code] for code in batch.cell.tolist()]
        scores = [None if np.isnan(x) else x for x in batch.column("el2n.el2n").tolist()]
        rows = zip(cells, batch.tokens.tolist(), scores, batch.base.tolist(), strict=True)
        found += [*rows, (batch.held_out,)]
    return found


@pytest.mark.parametrize("with_labels", [False, True])
def test_later_passes_see_what_the_tables_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_labels: bool
):
    monkeypatch.setattr(batches_module, "_MEMORY_BYTES", 100)  # nearly all of it in the file
    tables = replace(tables_of(FRAME, 9), folder=tmp_path)
    batches = tables.batches(["el2n.el2n"], with_labels=with_labels, seed=3)
    first = everything(batches)
    training = FRAME.filter(pl.col("split") == "train")
    labels = training["label"].cast(pl.String).fill_null("none").to_list()
    if not with_labels:
        labels = [""] * training.height
    rows = zip(training["source"], training["domain"], labels, training["num_tokens"], strict=True)
    cells = [(Cell(s, d, x), n) for s, d, x, n in rows]
    assert [row[:2] for row in first if len(row) > 1] == cells
    assert sum(row[0] for row in first if len(row) == 1) == 10  # type: ignore[misc]
    scores = training["el2n.el2n"].to_list()
    assert [row[2] for row in first if len(row) > 1] == scores
    assert len({row[3] for row in first if len(row) > 1}) == training.height
    assert everything(batches) == first == everything(batches)
    assert list(tmp_path.iterdir()) == []  # the file has no name


def test_tables_are_read_once_for_all_that_asks_for_no_more():
    tables, asked = counted(tables_of(FRAME, 9))
    both = ["el2n.el2n", "loss.loss"]
    for columns in (both, both, ["loss.loss"], []):
        everything_read = list(tables.batches(columns, with_labels=False, seed=0))
        assert len(everything_read) == 6
    assert asked == [both]
    for columns, with_labels, seed in ((both, True, 0), (both, True, 1), ([], True, 1)):
        list(tables.batches(columns, with_labels=with_labels, seed=seed))
    assert asked == [both, both, both]


def test_a_pass_that_was_broken_off_is_no_whole_one():
    tables, asked = counted(tables_of(FRAME, 9))
    batches = tables.batches(["el2n.el2n"], with_labels=False, seed=0)
    next(iter(batches))
    whole = everything(batches)
    assert everything(batches) == whole
    assert sum(len(row) == 1 for row in whole) == 6
    assert len(asked) == 2
