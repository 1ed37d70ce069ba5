"""Partitions: stable names, cutting by footers, marks."""

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.data.cutting import Footer, Group, cut
from curate.data.partitions import (
    Output,
    Partition,
    load_partitions,
    partition_name,
    remove_strays,
    save_partitions,
)


def cut_groups(groups: list[tuple[int, int]], partition_rows: int) -> list[Partition]:
    footer = Footer(pa.schema([]), tuple(Group(*group) for group in groups))
    return cut("s", "f", "f.parquet", "x", footer, partition_rows=partition_rows)


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 1 << 33)), max_size=30),
       st.integers(1, 2000))  # fmt: skip
def test_partitions_cover_every_row_once_and_in_order(
    groups: list[tuple[int, int]], partition_rows: int
) -> None:
    parts = cut_groups(groups, partition_rows)
    position = 0
    for part in parts:
        assert part.first_row == position
        assert 0 < part.num_rows <= 1.5 * partition_rows
        position += part.num_rows
    assert position == sum(rows for rows, _ in groups)
    assert [part.name for part in parts] == [
        partition_name("s", "f", at) for at in range(len(parts))
    ]


def test_small_row_groups_are_joined_and_large_ones_cut() -> None:
    rows = [part.num_rows for part in cut_groups([(400, 0)] * 5 + [(2500, 0), (10, 0)], 1000)]
    assert rows == [800, 800, 400, 833, 833, 834, 10]


def test_rows_of_many_bytes_make_shorter_partitions() -> None:
    rows = [part.num_rows for part in cut_groups([(100, 1 << 30), (10, 200 << 20)] * 1, 1000)]
    assert rows == [25, 25, 25, 25, 10]
    assert [p.num_rows for p in cut_groups([(10, 200 << 20)] * 3, 1000)] == [10, 10, 10]


def test_names_depend_on_source_file_and_ordinal_only() -> None:
    assert partition_name("s", "a/b.parquet", 3) == partition_name("s", "a/b.parquet", 3)
    names = {partition_name(*key) for key in
             (("s", "f", 0), ("s", "f", 1), ("s", "g", 0), ("t", "f", 0))}  # fmt: skip
    assert len(names) == 4


def test_the_list_of_partitions_comes_back_as_it_was(tmp_path: Path) -> None:
    parts = cut_groups([(10, 0), (2000, 0)], 100)
    save_partitions(tmp_path / "p.json", parts)
    assert load_partitions(tmp_path / "p.json") == parts
    assert load_partitions(tmp_path / "none.json") == []


def test_an_output_is_done_only_whole_and_with_its_own_fingerprint(tmp_path: Path) -> None:
    output = Output(tmp_path / "part-a.parquet")
    assert not output.is_done("x")
    mark = output.write(lambda path: path.write_text("hello"), "x", rows=3)
    assert (mark["rows"], output.is_done("x"), output.is_done("y")) == (3, True, False)
    output.path.write_text("hell")
    assert not output.is_done("x")
    output.write(lambda path: path.write_text("hello"), "x")
    output.path.unlink()
    assert output.mark() is None
    assert not output.is_done("x")


def test_a_failed_write_is_never_done(tmp_path: Path) -> None:
    output = Output(tmp_path / "part-a.parquet")
    output.write(lambda path: path.write_text("old"), "x")

    def fail(_: Path) -> None:
        raise ValueError

    with pytest.raises(ValueError):
        output.write(fail, "x")
    assert not output.is_done("x")


def test_tables_of_partitions_that_are_gone_are_removed_with_their_marks(tmp_path: Path) -> None:
    for name in ("part-a.parquet", "part-b.parquet", "part-b.npy", "part-b.vectors"):
        Output(tmp_path / name).write(lambda path: path.write_text("x"), "x")
    (tmp_path / "summary.json").write_text("{}")
    assert remove_strays(tmp_path, {"part-a"}) == 3
    left = sorted(p.name for p in tmp_path.rglob("*") if p.is_file())
    assert left == ["part-a.parquet", "part-a.parquet.json", "summary.json"]


def test_a_torn_mark_reads_as_not_done(tmp_path: Path) -> None:
    output = Output(tmp_path / "part.parquet")
    output.write(lambda path: path.write_bytes(b"table"), "f")
    assert output.is_done("f")
    text = output.mark_path.read_text()
    for torn in ("", text[:40], "[]"):
        output.mark_path.write_text(torn)
        assert output.mark() is None
        assert not output.is_done("f")


@pytest.mark.parametrize(
    ("rows", "row_bytes", "longest"),
    [
        (9_000, 500, 9_000),  # a small file is one partition
        (100_000, 500, 10_000),
        (400_000, 500, 25_000),  # a sixteenth of a larger one
        (4_000_000, 500, 50_000),
        (400_000, 2_000, 16_000),  # some 32 MB
        (4_000_000, 100_000, 10_000),
    ],
)
def test_automatic_partitions_grow_with_their_file(rows: int, row_bytes: int, longest: int) -> None:
    groups = [Group(1_000, 1_000 * row_bytes)] * (rows // 1_000)
    parts = cut("s", "f", "f.parquet", "x", Footer(pa.schema([]), tuple(groups)),
                partition_rows="auto")  # fmt: skip
    assert sum(part.num_rows for part in parts) == rows
    # Very large rows are cut by their bytes all the same.
    assert max(part.num_rows for part in parts) == min(
        longest, (256 << 20) // row_bytes // 1_000 * 1_000
    )
