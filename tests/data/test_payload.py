from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.data.payload import Payload
from curate.data.storage import local_stamp
from curate.errors import InputError


def partition(path: Path, rows: int) -> Partition:
    return Partition(
        name="part-0",
        source="a",
        file=path.name,
        address=str(path),
        first_row=0,
        num_rows=rows,
        stamp=local_stamp(path),
    )


def stored(path: Path, *, rows: int = 300, group: int = 70) -> Partition:
    table = pa.table(
        {
            "n": range(rows),
            "text": pa.array([f"row {i}" for i in range(rows)]),
            "kind": pa.array([f"k{i // 50}" for i in range(rows)]).dictionary_encode(),
        }
    )
    pq.write_table(table, path, row_group_size=group)
    return partition(path, rows)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sets(st.integers(0, 299), min_size=1, max_size=60), min_size=1, max_size=5),
    st.integers(1, 400),
)
def test_any_rows_come_back_in_any_order_of_calls(
    tmp_path: Path, calls: list[set[int]], batch_rows: int
):
    part = stored(tmp_path / "x.parquet")
    with Payload(RunFolder(tmp_path)) as payload:
        for wanted in calls:
            rows = np.array(sorted(wanted))
            batches = payload.batches(part, rows, batch_rows=batch_rows)
            assert all(batch.num_rows <= batch_rows or len(calls) > 1 for _, batch in batches)
            assert all(np.isin(rows, np.arange(s, s + b.num_rows)).any() for s, b in batches)
            numbers = np.concatenate([np.arange(s, s + b.num_rows) for s, b in batches])
            table = pa.Table.from_batches([batch for _, batch in batches]).take(
                pa.array(np.searchsorted(numbers, rows))
            )
            assert table.column("n").to_pylist() == rows.tolist()
            assert table.column("text").to_pylist() == [f"row {i}" for i in rows]
            assert table.column("kind").to_pylist() == [f"k{i // 50}" for i in rows]


def test_reading_on_decodes_each_row_group_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    part = stored(tmp_path / "x.parquet", group=100)
    opened: list[list[int]] = []
    original = pq.ParquetFile.iter_batches

    def counting(self: pq.ParquetFile, **options: object) -> object:
        opened.append(options["row_groups"])  # pyright: ignore[reportArgumentType]
        return original(self, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counting)
    with Payload(RunFolder(tmp_path)) as payload:
        for first in range(0, 300, 30):
            payload.batches(part, np.arange(first, first + 30), batch_rows=30)
    assert opened == [[0], [1], [2]]


def test_a_file_that_changed_since_it_was_indexed_is_refused(tmp_path: Path):
    part = stored(tmp_path / "x.parquet")
    stored(tmp_path / "x.parquet", rows=200)
    with (
        Payload(RunFolder(tmp_path)) as payload,
        pytest.raises(InputError, match=r"x\.parquet has changed since it was indexed"),
    ):
        payload.batches(part, np.array([3]), batch_rows=10)


def test_a_damaged_page_is_reported_with_the_file(tmp_path: Path):
    path = tmp_path / "x.parquet"
    stored(path, rows=300, group=300)
    data = bytearray(path.read_bytes())
    data[8:200] = b"\xff" * 192
    path.write_bytes(bytes(data))
    part = partition(path, 300)
    with (
        Payload(RunFolder(tmp_path)) as payload,
        pytest.raises(InputError, match=r"x\.parquet is damaged"),
    ):
        payload.batches(part, np.arange(300), batch_rows=100)
