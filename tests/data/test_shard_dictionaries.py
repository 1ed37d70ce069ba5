"""Which columns of a shard are written with a dictionary."""

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.data.shard_dictionaries import compared_columns, repeating_columns

ROWS = 5000
NUMBERS = np.random.default_rng(0).standard_normal(3 * ROWS).astype(np.float32)

TABLE = pa.table(
    {
        "text": [f"a text of its own {row}" for row in range(ROWS)],
        "kind": [f"kind {row % 6}" for row in range(ROWS)],
        "with.dot": ["same"] * ROWS,
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(NUMBERS), 3),
        "tags": [[f"tag {row % 3}"] * (row % 2) for row in range(ROWS)],
        "meta": [
            {"number": row, "turns": [{"role": "user", "id": f"{row}"}]} for row in range(ROWS)
        ],
        "map": pa.array([[("key", row)] for row in range(ROWS)], pa.map_(pa.string(), pa.int64())),
        "coded": pa.array(["x"] * ROWS).dictionary_encode(),
        "nothing": pa.nulls(ROWS),
        "few": pa.array([None] * (ROWS - 1) + [1]),
    }
)
REPEATING = {"kind", "with.dot", "tags.list.element", "meta.turns.list.element.role",
             "map.key_value.key", "coded", "nothing", "few"}  # fmt: skip
DIFFERENT = {"text", "vector.list.element", "meta.number", "meta.turns.list.element.id",
             "map.key_value.value"}  # fmt: skip


def with_dictionary(table: pa.Table, **options: Any) -> dict[str, bool]:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    group = pq.read_metadata(io.BytesIO(sink.getvalue())).row_group(0)
    columns = [group.column(number) for number in range(group.num_columns)]
    return {column.path_in_schema: column.has_dictionary_page for column in columns}


def test_values_that_repeat_get_a_dictionary_and_others_do_not():
    found = with_dictionary(TABLE, use_dictionary=repeating_columns(TABLE))
    assert found.keys() == REPEATING | DIFFERENT  # the paths are Parquet's own
    assert {path for path, has in found.items() if has} == REPEATING


def test_extremes_are_noted_of_numbers_and_of_texts_that_repeat():
    sink = io.BytesIO()
    options: dict[str, Any] = {"write_statistics": compared_columns(TABLE)}
    pq.write_table(TABLE, sink, **options)
    group = pq.read_metadata(io.BytesIO(sink.getvalue())).row_group(0)
    columns = [group.column(number) for number in range(group.num_columns)]
    noted = {column.path_in_schema for column in columns if column.is_stats_set}
    assert noted == {"kind", "with.dot", "meta.number", "coded", "few"}
    for column in columns:
        if column.path_in_schema == "meta.number":
            assert (column.statistics.min, column.statistics.max) == (0, ROWS - 1)


@pytest.mark.parametrize("rows", [0, 1])
def test_short_tables_are_looked_at_too(rows: int):
    short = TABLE.slice(0, rows)
    options: dict[str, Any] = {
        "use_dictionary": repeating_columns(short),
        "write_statistics": compared_columns(short),
    }
    sink = io.BytesIO()
    pq.write_table(short, sink, **options)
    assert pq.read_table(io.BytesIO(sink.getvalue())).equals(short.cast(TABLE.schema))


def test_how_a_table_is_cut_into_chunks_does_not_matter():
    parts = [TABLE.slice(start, 700) for start in range(0, ROWS, 700)]
    assert repeating_columns(pa.concat_tables(parts)) == repeating_columns(TABLE)
