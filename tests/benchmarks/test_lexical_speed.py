"""Rows a second of the lexical scorers, whole passes with reading and writing, on one core.

    pytest tests/benchmarks/test_lexical_speed.py -s -o addopts=--import-mode=importlib

Real texts, long (domains_en), middling (instruct_mix) and short (clinc150), repeated with other
row numbers until there are some tens of thousands; targets of 100 and 1,000 held-out rows.
CPU time, so that a busy machine tells the same. `CURATE_DATA` names the data sets.
"""

import os
import resource
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from jobs.cluster import InlineExecutor, Pool
from jobs.embedding import embed_run
from jobs.index import index_run
from jobs.own_passes import Phase, own_passes
from jobs.settings import Settings, parse_settings
from scorers.catalog import build_scorer

DATA = os.environ.get("CURATE_DATA")
INLINE = Pool(InlineExecutor(), 1)
SETS = {
    "domains_en": pl.col("text"),
    "instruct_mix": pl.concat_str("instruction", "input", "output", separator="\n"),
    "clinc150": pl.col("text"),
}
CASES: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("dsir", {}, 100),
    ("bm25", {}, 100),
    ("bm25", {}, 1000),
    ("bm25", {"combine": "max"}, 100),
    ("bm25", {"combine": "max"}, 1000),
    ("density_ratio", {"on": "ngrams", "force": True}, 1000),
)


@pytest.mark.timeout(7200)
@pytest.mark.skipif(DATA is None, reason="needs real data: set CURATE_DATA to its folder")
@pytest.mark.parametrize("name", SETS)
def test_rows_a_second(name: str, tmp_path: Path):
    folder = Path(str(DATA)) / name
    pool = pl.read_parquet(folder / "train.parquet").select(SETS[name].alias("text"))
    pool = pool.filter(pl.col("text").str.strip_chars() != "")
    pool.write_parquet(tmp_path / "pool.parquet")
    test = pl.read_parquet(folder / "test.parquet").select(SETS[name].alias("text"))
    test = test.filter(pl.col("text").str.strip_chars() != "").sample(fraction=1.0, shuffle=True,
                                                                      seed=0)  # fmt: skip
    size = int(pool["text"].str.len_bytes().mean() or 0)  # pyright: ignore[reportArgumentType]
    print(f"\n{name}: {pool.height} rows, {size} bytes each")
    for scorer, options, rows in CASES:
        test.head(rows).write_parquet(tmp_path / "target.parquet")
        settings = settings_of(tmp_path, scorer, options)
        index_run(settings, pool=INLINE)
        embed_run(settings, pool=INLINE)
        print(f"{name} | {scorer} {options} | {rows} target rows | {timed(settings, scorer)}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{name}: peak {peak:.0f} MB of the process")


def settings_of(root: Path, scorer: str, options: dict[str, Any]) -> Settings:
    return parse_settings(
        {
            "run": str(root / "run"),
            "sources": {"pool": {"path": str(root / "pool.parquet"), "text": "text"}},
            "target": {"path": str(root / "target.parquet"), "text": "text"},
            "index": {"held_out": 0.0, "partition_rows": 16_384},
            "score": {"scorers": [{scorer: options}]},
        }
    )


def timed(settings: Settings, scorer: str) -> str:
    """CPU seconds of each phase, and rows a second of all."""
    options = settings.score.named[scorer]
    passes = own_passes(settings, scorer, build_scorer(scorer, options))
    spent: list[float] = []
    for phase in passes.phases:
        assert isinstance(phase, Phase)
        started = time.process_time()
        for task in phase.tasks:
            assert not task.is_done()
            phase.work(task.payload)
        spent.append(time.process_time() - started)
    marks = [task.output.mark() or {} for task in passes.phases[-1].tasks]
    rows = sum(mark["rows"] for mark in marks)
    each = " + ".join(f"{seconds:.1f}" for seconds in spent)
    return f"{rows / sum(spent):,.0f} rows/s | {each} s of CPU"
