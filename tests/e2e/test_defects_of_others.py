"""What other tools get wrong, each tried here: files, settings, workers and writes that fail."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from e2e.small_run import bytes_of, curate, finished, write_config

FILES = 8
ROWS = 30


def write_files(folder: Path, numbers: range) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        texts = [f"file {number} row {row} " + "word " * (row % 7) for row in range(ROWS)]
        pl.DataFrame({"text": texts, "n": range(ROWS)}).write_parquet(folder / f"{number}.parquet")


def config(folder: Path, **changes: Any) -> Path:
    """A run without a model: the length in characters decides."""
    values = {
        "run": str(folder / "run"),
        "sources": {"files": {"path": str(folder / "data"), "text": "text"}},
        "index": {"held_out": 0.0},
        "score": {"scorers": ["length", "random"]},
        "plan": {"score": "num_chars", "keep": 0.5},
        **changes,
    }
    return write_config(folder / "config.yaml", values)


def rows_kept(run: Path) -> int:
    return int(pl.read_parquet(run / "plan" / "*.parquet")["copies"].sum())


def test_one_corrupt_file_of_eight_costs_that_file_and_is_named(tmp_path: Path):
    write_files(tmp_path / "data", range(FILES))
    bad = tmp_path / "data" / "3.parquet"
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    failed = curate("run", config(tmp_path), check=False)
    assert failed.returncode == 4
    assert "3.parquet" in failed.stderr
    assert len(list((tmp_path / "run" / "examples").glob("part-*.parquet"))) == FILES - 1
    before = finished(tmp_path / "run")

    allowed = config(tmp_path, index={"held_out": 0.0, "max_bad_files": 1})
    curate("run", allowed)
    assert rows_kept(tmp_path / "run") == (FILES - 1) * ROWS // 2
    quarantined = pl.read_parquet(tmp_path / "run" / "quarantine" / "*.parquet")
    assert quarantined["file"].to_list() == ["3.parquet"]

    bad.write_bytes(whole)
    curate("run", config(tmp_path))
    assert rows_kept(tmp_path / "run") == FILES * ROWS // 2
    after = finished(tmp_path / "run")
    examples = {path: facts for path, facts in before.items() if path.parent.name == "examples"}
    assert len(examples) == FILES - 1
    assert all(after[path] == facts for path, facts in examples.items())


def test_a_changed_setting_in_an_old_run_folder_changes_the_result(tmp_path: Path):
    write_files(tmp_path / "data", range(2))
    curate("run", config(tmp_path))
    first = bytes_of(tmp_path / "run", "shards")
    scores = {p: f for p, f in finished(tmp_path / "run").items() if "scores" in p.parts}
    again = curate("run", config(tmp_path, plan={"score": "num_chars", "keep": 0.25}))
    assert "plan.keep" in again.stderr
    assert rows_kept(tmp_path / "run") == ROWS // 2
    assert bytes_of(tmp_path / "run", "shards") != first
    after = finished(tmp_path / "run")
    assert scores
    assert all(after[path] == facts for path, facts in scores.items())


def test_new_removed_and_changed_files_redo_their_own_partitions(tmp_path: Path):
    write_files(tmp_path / "data", range(4))
    curate("run", config(tmp_path))
    before = finished(tmp_path / "run")

    write_files(tmp_path / "data", range(4, 5))
    (tmp_path / "data" / "0.parquet").unlink()
    texts = [f"changed {row}" for row in range(ROWS)]
    changed = pl.DataFrame({"text": texts, "n": range(ROWS)})
    changed.write_parquet(tmp_path / "data" / "2.parquet")
    os.utime(tmp_path / "data" / "1.parquet")
    curate("run", config(tmp_path))

    after = finished(tmp_path / "run")
    for folder in ("scores/length", "scores/random"):
        old = {p: f for p, f in before.items() if str(p.parent).endswith(folder)}
        new = {p: f for p, f in after.items() if str(p.parent).endswith(folder)}
        assert len(old) == len(new) == 4
        redone = [path for path, facts in new.items() if old.get(path) != facts]
        assert len(redone) == 2, "the new file and the changed one"
        assert len(set(old) - set(new)) == 1, "the removed file"
    plan = pl.read_parquet(tmp_path / "run" / "plan" / "*.parquet")
    assert set(plan["file"]) == {f"{n}.parquet" for n in (1, 2, 3, 4)}
    assert rows_kept(tmp_path / "run") == 2 * ROWS


@pytest.mark.slow
def test_another_number_of_workers_finishes_what_the_first_left_undone(tmp_path: Path):
    write_files(tmp_path / "data", range(FILES))
    bad = tmp_path / "data" / "5.parquet"
    whole = bad.read_bytes()
    bad.write_bytes(b"PAR1 nothing PAR1")
    two = {"kind": "local", "workers": 2}
    assert curate("run", config(tmp_path, cluster=two), check=False).returncode == 4
    bad.write_bytes(whole)
    one = {"kind": "local", "workers": 1}
    curate("run", config(tmp_path, cluster=one))
    assert rows_kept(tmp_path / "run") == FILES * ROWS // 2


def test_a_kill_while_writing_leaves_no_file_that_cannot_be_read(tmp_path: Path):
    """The kill comes inside the write itself, at the worst moment: after half of the bytes."""
    import subprocess
    import sys

    target = tmp_path / "part.parquet"
    code = f"""
import os, signal
from pathlib import Path
from curate.data.partitions import Output
def write(path):
    path.write_bytes(b"PAR1 half of")
    os.kill(os.getpid(), signal.SIGKILL)
Output(Path({str(target)!r})).write(write, "f")
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert not target.exists()


def test_a_shard_that_cannot_be_written_fails_aloud_and_the_rerun_completes(tmp_path: Path):
    write_files(tmp_path / "data", range(FILES))
    small = {"size_mb": 0.0005}
    reference = tmp_path / "reference"
    reference.mkdir()
    shutil.copytree(tmp_path / "data", reference / "data")
    curate("run", config(reference, shards=small))
    wanted = bytes_of(reference / "run", "shards")
    shards = sorted(path for path in wanted if path.endswith(".parquet"))
    assert len(shards) > 2

    curate("plan", config(tmp_path, shards=small))
    # A folder in the way of one shard: its rename fails, whoever asks.
    obstacle = tmp_path / "run" / shards[1]
    (obstacle / "in the way").mkdir(parents=True)
    failed = curate("run", config(tmp_path, shards=small), check=False)
    assert failed.returncode == 4  # the others are there
    assert obstacle.name in failed.stderr
    assert not (tmp_path / "run" / "shards" / "manifest.json").exists()
    whole = [path for path in shards if path != shards[1]]
    assert {p: d for p, d in bytes_of(tmp_path / "run", "shards").items() if p in whole} == {
        p: wanted[p] for p in whole
    }, "the other shards are written"
    shutil.rmtree(obstacle)
    curate("run", config(tmp_path, shards=small))
    assert bytes_of(tmp_path / "run", "shards") == wanted
    manifest = json.loads((tmp_path / "run" / "shards" / "manifest.json").read_text())
    assert len(manifest["shards"]) == len(shards)
