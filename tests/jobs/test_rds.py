"""`rds` from settings to columns and into a plan: vectors of a column, and hashed words."""

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from killed import curate_command, is_killed, run_to_end

import curate
from curate.config import plain, to_yaml
from curate.data.layout import RunFolder
from curate.errors import ConfigError, InputError
from jobs.cluster import Cluster, InlineExecutor, Pool, open_pool
from jobs.embedding import embed_run
from jobs.index import index_run
from jobs.plan import plan_run
from jobs.score import plan_score, score_run
from jobs.settings import Settings, parse_settings

INLINE = Pool(InlineExecutor(), 1)
DIM = 6


def vectors_of(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)


def write_rows(path: Path, vectors: np.ndarray, *, start: int = 0, **columns: Any) -> None:
    texts = [f"row {start + number}" for number in range(len(vectors))]
    pl.DataFrame({"text": texts, "v": vectors, **columns}).write_parquet(path)


@pytest.fixture
def pool(tmp_path: Path) -> np.ndarray:
    """120 rows in two files, some without a vector, some alike; 7 target rows of two domains."""
    vectors = vectors_of(120, 0)
    vectors[[3, 77]] = np.nan
    vectors[[20, 60, 100]] = vectors[5]
    (tmp_path / "pool").mkdir()
    domains = ["x" if number % 3 else "y" for number in range(120)]
    write_rows(tmp_path / "pool" / "a.parquet", vectors[:50], topic=domains[:50])
    write_rows(tmp_path / "pool" / "b.parquet", vectors[50:], start=50, topic=domains[50:])
    target = vectors_of(7, 1)
    target[4] = vectors[5]
    kinds = ["sums", "tales", "sums", "sums", "tales", "tales", "sums"]
    write_rows(tmp_path / "target.parquet", target, start=1000, kind=kinds)
    return vectors


def settings_of(root: Path, run: str = "run", *, more: Any = None, **options: Any) -> Settings:
    values: dict[str, Any] = {
        "run": str(root / run),
        "sources": {"pool": {"path": str(root / "pool"), "text": "text", "domain": "topic"}},
        "target": {"path": str(root / "target.parquet"), "text": "text"},
        "embed": {"given": {"kind": "column", "column": "v"}},
        "index": {"held_out": 0.1, "partition_rows": 20},
        "score": {"scorers": [{"rds": options}]},
        **(more or {}),
    }
    return parse_settings(values)


def scored(settings: Settings, pool: Pool = INLINE) -> pl.DataFrame:
    index_run(settings, pool=pool)
    embed_run(settings, pool=pool)
    score_run(settings, pool=pool)
    return curate.open(settings.run).scores.sort("source", "file", "row").collect()


def is_training(settings: Settings) -> np.ndarray:
    run = RunFolder(Path(settings.run))
    tables = [pl.read_parquet(run.examples(part).path) for part in run.partitions()]
    return (pl.concat(tables).sort("source", "file", "row")["split"] == "train").to_numpy()


def cosines(root: Path, pool: np.ndarray) -> np.ndarray:
    """(target rows, rows) in float64, NaN where a row has no vector."""
    target = pl.read_parquet(root / "target.parquet")["v"].to_numpy().astype(np.float64)
    wide = pool.astype(np.float64)
    target /= np.linalg.norm(target, axis=1, keepdims=True)
    return target @ (wide / np.linalg.norm(wide, axis=1, keepdims=True)).T


def by_hand(table: np.ndarray, free: Sequence[int]) -> dict[int, int]:
    """Row -> place when the rows of the table choose in turn."""
    left, places = list(free), dict[int, int]()
    while left:
        lane = table[len(places) % len(table)]
        best = left[int(np.argmax(np.float32(lane[left])))]
        places[best] = len(places) + 1
        left.remove(best)
    return places


def test_the_columns_are_those_of_a_plain_loop(tmp_path: Path, pool: np.ndarray):
    settings = settings_of(tmp_path)
    found = scored(settings)
    table = cosines(tmp_path, pool)
    has_vector = ~np.isnan(table[0])
    np.testing.assert_allclose(found["rds"].to_numpy(), np.max(table, axis=0), atol=1e-6)
    nearest = np.argmax(np.nan_to_num(table, nan=-9), axis=0)
    assert found["rds_query"].to_list() == [
        float(row) if there else None for row, there in zip(nearest, has_vector, strict=True)
    ]
    free = np.flatnonzero(has_vector & is_training(settings)).tolist()
    places = by_hand(table, free)
    assert found["rds_rank"].to_list() == [places.get(row) for row in range(120)]
    assert found["rds"].null_count() == 2
    assert 0 < 120 - len(free) - 2 < 40  # held-out rows have a similarity, and no place


def test_domains_of_the_target_choose_in_turn_by_their_best_row(tmp_path: Path, pool: np.ndarray):
    values = {"target": {"path": str(tmp_path / "target.parquet"), "text": "text",
                         "domain": "kind"}}  # fmt: skip
    settings = settings_of(tmp_path, more=values)
    found = scored(settings)
    table = cosines(tmp_path, pool)
    kinds = np.array(pl.read_parquet(tmp_path / "target.parquet")["kind"])
    grouped = np.stack([table[kinds == kind].max(axis=0) for kind in ("sums", "tales")])
    free = np.flatnonzero(~np.isnan(table[0]) & is_training(settings)).tolist()
    places = by_hand(grouped, free)
    assert found["rds_rank"].to_list() == [places.get(row) for row in range(120)]
    rows = scored(settings_of(tmp_path, "rows", more=values, groups="rows"))
    assert rows["rds"].equals(found["rds"])
    assert rows["rds_rank"].to_list() == [by_hand(table, free).get(row) for row in range(120)]


def test_behind_the_limit_the_most_similar_come_first(tmp_path: Path, pool: np.ndarray):
    settings = settings_of(tmp_path, limit=10)
    found = scored(settings)
    table = cosines(tmp_path, pool)
    free = np.flatnonzero(~np.isnan(table[0]) & is_training(settings)).tolist()
    places = {row: place for row, place in by_hand(table, free).items() if place <= 10}
    rest = sorted(set(free) - set(places), key=lambda row: (-np.float32(table[:, row].max()), row))
    places |= {row: place for place, row in enumerate(rest, start=11)}
    assert found["rds_rank"].to_list() == [places.get(row) for row in range(120)]


def test_rows_that_stand_in_the_target_are_counted_and_dropped_on_request(
    tmp_path: Path, pool: np.ndarray, caplog: pytest.LogCaptureFixture
):
    target = pl.read_parquet(tmp_path / "target.parquet")
    texts = ["row 5" if number == 4 else text for number, text in enumerate(target["text"])]
    target.with_columns(pl.Series("text", texts)).write_parquet(tmp_path / "target.parquet")
    with caplog.at_level(logging.WARNING):
        kept = scored(settings_of(tmp_path))
    assert "1 examples of" in caplog.text
    assert "come first for that reason" in caplog.text
    dropped = scored(settings_of(tmp_path, "dropped", copies="drop"))
    assert dropped["rds"][5] is None
    assert dropped["rds_rank"][5] is None
    assert kept["rds"][5] == pytest.approx(1, abs=1e-6)
    assert dropped["rds_rank"].drop_nulls().sort().to_list() == list(
        range(1, 1 + int(kept["rds_rank"].count()) - int(kept["rds_rank"][5] is not None))
    )


def test_one_target_row_is_a_plain_order_and_one_example_a_pool(tmp_path: Path):
    (tmp_path / "pool").mkdir()
    write_rows(tmp_path / "pool" / "a.parquet", vectors_of(1, 0), topic=["x"])
    write_rows(tmp_path / "target.parquet", vectors_of(1, 1), start=50)
    more = {"index": {"held_out": 0.0}}
    found = scored(settings_of(tmp_path, more=more))
    assert found["rds_rank"].to_list() == [1]
    write_rows(tmp_path / "pool" / "a.parquet", vectors_of(30, 0), topic=["x"] * 30)
    found = scored(settings_of(tmp_path, more=more))
    assert found.sort("rds", descending=True)["rds_rank"].to_list() == list(range(1, 31))


def test_what_is_missing_is_said_before_anything_is_made(tmp_path: Path, pool: np.ndarray):
    from jobs.score_check import check_scores

    settings = settings_of(tmp_path)
    with pytest.raises(ConfigError, match="rds compares every example with a target"):
        check_scores(replace(settings, target=None))
    with pytest.raises(ConfigError, match="no representation 'other'"):
        check_scores(settings_of(tmp_path, vectors="other"))
    index_run(settings, pool=INLINE)
    assert "vectors" in plan_score(settings).why[0]
    with pytest.raises(InputError, match="vectors"):
        score_run(settings, pool=INLINE)
    write_rows(tmp_path / "target.parquet", np.full((2, DIM), np.nan, np.float32), start=50)
    index_run(settings, pool=INLINE)
    embed_run(settings, pool=INLINE)
    with pytest.raises(Exception, match="no row of the target has a vector"):
        score_run(settings, pool=INLINE)


def test_what_is_done_is_skipped_and_new_data_costs_its_own_partitions(
    tmp_path: Path, pool: np.ndarray
):
    settings = settings_of(tmp_path)
    scored(settings)
    assert score_run(settings, pool=INLINE)["done"] == 0
    similar = {path: path.stat().st_mtime_ns for path in tmp_path.glob("run/rds/similar/part*")}
    write_rows(tmp_path / "pool" / "c.parquet", vectors_of(10, 9), start=500, topic=["x"] * 10)
    found = scored(settings)
    assert found.height == 130
    assert all(path.stat().st_mtime_ns == time for path, time in similar.items())
    fresh = scored(settings_of(tmp_path, "fresh"))
    assert found.equals(fresh)
    for path in tmp_path.glob("run/rds/similar/part*"):
        path.unlink()  # the folder may be removed once the scores are there
    assert score_run(settings, pool=INLINE)["done"] == 0


@pytest.mark.parametrize("keep", [{"examples": 30}, {"tokens": 300.0}, 0.4])
def test_a_plan_by_rank_takes_the_rows_that_chose_first(
    tmp_path: Path, pool: np.ndarray, keep: Any
):
    plan = {"score": "rds_rank", "order": "easiest", "within": "all", "keep": keep}
    settings = settings_of(tmp_path, more={"plan": plan})
    found = scored(settings)
    summary = plan_run(settings, pool=INLINE)
    run = RunFolder(Path(settings.run))
    tables = pl.concat([pl.read_parquet(run.planned(part).path) for part in run.partitions()])
    tables = tables.sort("source", "file", "row")
    ordered = found.filter(found["rds_rank"].is_not_null()).sort("rds_rank")
    kept = found.filter(tables["keep"]).sort("rds_rank")
    assert kept.select("file", "row").equals(ordered.head(kept.height).select("file", "row"))
    if "tokens" in str(keep):  # no tokenizer: characters
        lengths = [len(f"row {row + 50 * (file == 'b.parquet')}")
                   for file, row in ordered.select("file", "row").iter_rows()]  # fmt: skip
        sums = np.cumsum(lengths)
        assert kept.height == int((sums <= 300).sum())
        assert summary["kept"]["tokens"] == sums[kept.height - 1]
    assert set(tables.filter(~tables["keep"])["reason"]) <= {"score", "held_out", "unscored"}


def bytes_below(run: Path) -> dict[str, bytes]:
    paths = [*run.glob("scores/*/*.parquet"), *run.glob("quantities/*/*.parquet"),
             *run.glob("rds/similar/*.safetensors"), *run.glob("rds/*.npy")]  # fmt: skip
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.slow
def test_two_workers_write_the_bytes_of_one_process(tmp_path: Path, pool: np.ndarray):
    scored(settings_of(tmp_path))
    settings = settings_of(tmp_path, "dask")
    with open_pool(Cluster(kind="local", workers=2)) as workers:
        scored(settings, workers)
    assert bytes_below(tmp_path / "dask") == bytes_below(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["similar", "ranks.npy"])
def test_a_run_that_is_killed_and_started_again_gives_the_same_bytes(
    tmp_path: Path, pool: np.ndarray, moment: str
):
    settings = settings_of(tmp_path, "whole", more={"index": {"partition_rows": 2}})
    scored(settings)
    config = tmp_path / "killed.yaml"
    killed = tmp_path / "killed"
    config.write_text(to_yaml(plain(replace(settings, run=str(killed)))))
    command = curate_command("score", config)
    assert is_killed(command, (killed / "rds" / moment).exists)
    assert not list(killed.glob("scores/rds/*.parquet"))
    run_to_end(command)
    assert bytes_below(killed) == bytes_below(tmp_path / "whole")


def test_the_command_line_finds_the_rows_of_the_targets_kind(tmp_path: Path):
    """Texts of three kinds, hashed words, no model: the plan holds the target's kind."""
    words = {"cook": ["pan", "salt", "oven", "bread"], "sea": ["ship", "wave", "sail", "port"],
             "law": ["court", "judge", "act", "clause"]}  # fmt: skip
    draw = np.random.default_rng(0)
    rows = [(" ".join(draw.choice(words[kind], 8)), kind) for _ in range(40) for kind in words]
    pl.DataFrame(rows, schema=["text", "kind"], orient="row").write_parquet(tmp_path / "p.parquet")
    target = [" ".join(draw.choice(words["sea"], 8)) for _ in range(9)]
    pl.DataFrame({"text": target}).write_parquet(tmp_path / "t.parquet")
    config = tmp_path / "c.yaml"
    config.write_text(
        to_yaml(
            {
                "run": str(tmp_path / "run"),
                "sources": {"p": {"path": str(tmp_path / "p.parquet"), "text": "text"}},
                "target": {"path": str(tmp_path / "t.parquet"), "text": "text"},
                "score": {"scorers": ["rds"]},
                "plan": {"score": "rds_rank", "order": "easiest", "within": "all",
                         "keep": {"examples": 25}},
            }
        )
    )  # fmt: skip
    command = [sys.executable, "-m", "curate", "run", str(config)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ})
    shards = pl.concat([pl.read_parquet(p) for p in tmp_path.glob("run/shards/**/*.parquet")])
    assert shards.height == 25
    assert set(" ".join(shards["text"]).split()) <= set(words["sea"])
