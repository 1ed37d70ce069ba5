"""Characters of every kind of example, where no tokenizer is set."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import curate
from curate.data.counts import read_counts
from curate.data.layout import RunFolder
from curate.data.reading import read_fields
from curate.models.tokens import count_tokens
from jobs.cluster import open_pool
from jobs.index import index_run
from jobs.lengths import lengths_run
from jobs.settings import Settings, parse_settings

TURNS = [{"role": "user", "content": "né?"}, {"role": "assistant", "content": "ünd 😀"}]
KINDS: dict[str, tuple[dict[str, str], list[dict[str, Any]]]] = {
    "text": ({"text": "t"}, [{"t": "naïve 😀"}, {"t": "x\r\n y"}]),
    "pairs": (
        {"prompt": "p", "response": "r"},
        [{"p": "a?", "r": "b"}, {"p": "", "r": "ddd"}],
    ),
    "chats": ({"messages": "m"}, [{"m": TURNS}, {"m": TURNS[1:]}]),
    "preferences": (
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        [{"p": "a", "c": "bb", "r": "ccc"}, {"p": "é", "c": "é", "r": "éé"}],
    ),
}


def settings_of(root: Path, sources: dict[str, dict[str, str]]) -> Settings:
    return parse_settings({"run": str(root / "run"), "sources": sources})


def indexed(settings: Settings) -> dict[str, Any]:
    with open_pool(settings.cluster) as pool:
        index_run(settings, pool=pool)
        return lengths_run(settings, pool=pool)


@pytest.mark.parametrize("kind", KINDS)
def test_the_index_has_counted_what_the_fields_hold(tmp_path: Path, kind: str):
    columns, rows = KINDS[kind]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = settings_of(tmp_path, {"own": {"path": str(tmp_path / "a.jsonl"), **columns}})
    summary = indexed(settings)
    run = RunFolder(tmp_path / "run")
    (part,) = run.partitions()
    table = read_counts(run, part, "characters")
    fields = read_fields(run, part, settings.sources["own"])
    counts = count_tokens(fields, None).tolist()
    assert table["num_tokens"].to_list() == counts
    assert table.height >= 2
    assert (summary["rows"], summary["tokens"]) == (len(counts), sum(counts))
    assert curate.open(run.root).lengths.collect()["num_tokens"].to_list() == counts
    assert not (run.root / "lengths").exists()


def test_rows_of_numbers_beside_texts_count_as_one_each(tmp_path: Path):
    numbers = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(6, dtype=np.float32)), 2)
    pq.write_table(pa.table({"x": numbers}), tmp_path / "x.parquet")
    pl.DataFrame({"t": ["four", "seven.."]}).write_parquet(tmp_path / "t.parquet")
    settings = settings_of(
        tmp_path,
        {
            "texts": {"path": str(tmp_path / "t.parquet"), "text": "t"},
            "rows": {"path": str(tmp_path / "x.parquet"), "features": "x"},
        },
    )
    summary = indexed(settings)
    assert (summary["rows"], summary["tokens"]) == (5, 14)
    run = RunFolder(tmp_path / "run")
    found = {
        part.source: read_counts(run, part, "characters")["num_tokens"].to_list()
        for part in run.partitions()
    }
    assert found == {"rows": [1, 1, 1], "texts": [4, 7]}
