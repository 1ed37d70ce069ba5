"""dsir, bm25 and density_ratio together: killed and resumed, inline and on Dask."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from killed import curate_command, found, is_killed, run_to_end

from curate.cli import main
from tests.jobs.lexical_pool import (
    WORDS,
    score_bytes,
    texts_of,
    values_of,
    write_config,
    write_world,
)

SCORERS: list[Any] = [
    "dsir",
    {"bm25": {"combine": "max"}},
    {"density_ratio": {"on": "ngrams", "force": True}},
]


def large_world(root: Path) -> None:
    """Two files of 600 rows in 48 partitions."""
    frames = [
        pl.DataFrame({"text": texts_of(kind, 400, seed=n), "kind": kind})
        for n, kind in enumerate(WORDS)
    ]
    write_world(root, frame=pl.concat(frames).sample(fraction=1.0, shuffle=True, seed=1))


@pytest.mark.slow
def test_a_run_that_is_killed_and_started_again_gives_the_same_bytes(tmp_path: Path):
    large_world(tmp_path)
    assert main(["score", str(write_config(tmp_path, values_of(tmp_path, SCORERS)))]) == 0
    config = write_config(tmp_path, values_of(tmp_path, SCORERS, "killed"))
    command = curate_command("score", config)
    folder = tmp_path / "killed"
    # Amid the counts of the first scorer, and what the third says, all of the second done.
    for pattern in ("dsir/counts/part-*", "density_ratio/ratios/part-*"):
        assert is_killed(command, lambda pattern=pattern: found(folder, pattern) >= 3)
        assert not list(folder.glob("scores/*/*.parquet"))
    run_to_end(command)
    whole, killed = score_bytes(tmp_path, "run"), score_bytes(tmp_path, "killed")
    assert len(whole) == 48 * 3 * 2
    assert whole == killed


@pytest.mark.slow
def test_inline_and_two_workers_write_the_same_bytes(tmp_path: Path):
    write_world(tmp_path)
    assert main(["score", str(write_config(tmp_path, values_of(tmp_path, SCORERS)))]) == 0
    cluster = {"kind": "local", "workers": 2}
    other = values_of(tmp_path, SCORERS, "dask", cluster=cluster)
    assert main(["score", str(write_config(tmp_path, other))]) == 0
    assert score_bytes(tmp_path, "run") == score_bytes(tmp_path, "dask")


def test_scores_live_without_the_folders_they_were_made_in(tmp_path: Path):
    import shutil

    write_world(tmp_path)
    config = str(write_config(tmp_path, values_of(tmp_path, SCORERS)))
    assert main(["score", config]) == 0
    before = score_bytes(tmp_path, "run")
    for name in ("dsir", "bm25", "density_ratio"):
        shutil.rmtree(tmp_path / "run" / name)
    assert main(["score", config]) == 0
    assert score_bytes(tmp_path, "run") == before
    assert not (tmp_path / "run" / "dsir").exists()


def test_the_rows_of_the_target_may_stand_in_any_order(tmp_path: Path):
    write_world(tmp_path)
    config = str(write_config(tmp_path, values_of(tmp_path, ["dsir", "bm25"])))
    assert main(["score", config]) == 0
    first = [pl.read_parquet(p) for p in sorted((tmp_path / "run" / "scores").glob("*/*.parquet"))]
    path = tmp_path / "target.parquet"
    pl.read_parquet(path).reverse().write_parquet(path)
    assert main(["score", config]) == 0
    again = [pl.read_parquet(p) for p in sorted((tmp_path / "run" / "scores").glob("*/*.parquet"))]
    for one, other in zip(first, again, strict=True):
        for name in ("dsir", "bm25"):
            if name in one.columns:
                np.testing.assert_allclose(one[name], other[name], rtol=1e-6)
