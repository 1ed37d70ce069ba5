"""A folder of JSON Lines alone, as `datasets` loads it from its card."""

import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from data.planned_run import Row, planned_run
from datasets import load_dataset

from jobs.cluster import open_pool
from jobs.write import write_run

ROWS = 30
TABLES = {
    "a": {
        "x.parquet": pa.table(
            {
                "body": [f"text {n}" for n in range(ROWS)],
                "marks": [[{"at": n, "words": ["a", "b"]}] for n in range(ROWS)],
                "day": [datetime.date(2026, 1, 1 + n % 28) for n in range(ROWS)],
                "price": [Decimal(n) for n in range(ROWS)],
                "half": pa.array([n / 2 for n in range(ROWS)], pa.float32()),
                "pairs": pa.array([[("k", n)] for n in range(ROWS)], pa.map_("string", "int64")),
            }
        )
    },
    "b": {"y.parquet": pa.table({"text": [f"text {n}" for n in range(ROWS)]})},
}


def written(root: Path, decide: Any, tables: Any = None) -> Path:
    settings = planned_run(root, tables or TABLES, decide, shards={"format": "jsonl"})
    with open_pool(settings.cluster) as pool:
        write_run(settings, pool=pool)
    return Path(settings.run) / "shards"


@pytest.mark.parametrize("streaming", [False, True])
def test_sources_of_different_columns_load_together(tmp_path: Path, streaming: bool):
    """Everything, a domain of one source, and one that two of them share."""
    folder = written(tmp_path / "run", lambda s, _f, row: Row(s if row % 2 else "both"))
    for config, rows in ((None, 60), ("a", 15), ("b", 15), ("both", 30)):
        cache = str(tmp_path / "cache")
        loaded: Any = load_dataset(
            str(folder), config, split="train", streaming=streaming, cache_dir=cache
        )
        found = list(loaded)
        assert len(found) == rows
        for row in found:
            n = row["curate_row"]
            if row["curate_source"] == "b":
                assert (row["body"], row["marks"], row["text"]) == (None, None, f"text {n}")
                continue
            assert (row["body"], row["text"]) == (f"text {n}", None)
            assert row["marks"] == [{"at": n, "words": ["a", "b"]}]
            assert (row["half"], row["pairs"]) == (n / 2, [{"key": "k", "value": n}])
            assert row["day"][:10] == f"2026-01-{1 + n % 28:02d}"
            assert float(row["price"]) == n


def test_sources_whose_types_conflict_load_one_by_one(tmp_path: Path):
    """`more` is a number here and a text there; of a domain's own rows `rest` may be all null."""
    rest = [None] * 20 + ["late"] * 10
    tables = {
        "a": {"x.parquet": pa.table({"more": range(ROWS), "rest": rest})},
        "b": {"y.parquet": pa.table({"more": ["text"] * ROWS, "rest": rest})},
    }
    folder = written(tmp_path / "run", lambda s, _f, row: Row(f"{s}{row // 20}"), tables)
    for config, rows in (("a", 30), ("b", 30), ("a0", 20), ("b1", 10)):
        loaded: Any = load_dataset(
            str(folder), config, split="train", cache_dir=str(tmp_path / "cache")
        )
        assert len(loaded) == rows
        assert loaded.features["rest"].dtype == "string"
        assert loaded.features["more"].dtype == ("int64" if config[0] == "a" else "string")
