"""Runs of the scorer `influence`: what is redone, kills, workers, damage, and what is told."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from influence_world import (
    INLINE,
    make_world,
    pool,
    save_mlp,
    scored,
    settings_of,
    table,
    target,
    values_of,
)
from safetensors import SafetensorError
from tiny_models import byte_tokenizer, save_language_model

from curate.data.files import is_temporary
from curate.data.layout import RunFolder
from curate.errors import ConfigError, CurateError, OutputError, TooManyBadError
from curate.models.index_rows import RowsWriter, header_bytes, open_rows
from curate.models.mlp import MLP
from jobs.cluster import Cluster, open_pool
from jobs.index import index_run
from jobs.influence_build import vectors_output
from jobs.influence_curvature import load_curvature
from jobs.own_passes import own_passes
from jobs.score import plan_score, score_run
from jobs.score_check import check_scores
from jobs.settings import Settings, parse_settings
from scorers.catalog import build_scorer

ALL = {"whiten": True, "init": "pca", "dim": 3, "matrix": True, "dtype": "float16"}
FOLDERS = ("quantities", "scores", "influence", "target/influence")


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return make_world(tmp_path)


def files(run: Path) -> dict[str, bytes]:
    return {
        path.relative_to(run).as_posix(): path.read_bytes()
        for folder in FOLDERS
        for path in sorted((run / folder).rglob("*"))
        if path.is_file() and ".done" not in path.parts and not is_temporary(path)
    }


def due(settings: Settings, options: Any = None) -> list[str]:
    """Phases with something to do."""
    named = settings.score.named["influence"] if options is None else options
    found = own_passes(settings, "influence", build_scorer("influence", named))
    return [phase.name.removeprefix("influence: ") for phase in found.phases
            if not all(task.is_done() for task in phase.tasks)]  # fmt: skip


def test_all_is_planned_before_anything_has_run_and_nothing_is_done_twice(world: Path):
    settings = settings_of(world, ALL)
    assert due(settings) == [
        "the target", "principal axes", "gradients of the target", "gradients of the pool",
        "sums for the curvature", "factors of the curvature", "whitening", "queries", "scores",
        "lists", "columns of the matrix", "the matrix",
    ]  # fmt: skip
    planned = plan_score(settings)
    assert planned.done == 0
    scored(settings)
    assert due(settings) == []
    again = plan_score(settings)
    assert again.done == again.total
    before = files(world / "run")
    assert score_run(settings, pool=INLINE)["done"] == 0
    assert files(world / "run") == before


def test_each_option_costs_only_what_depends_on_it(world: Path):
    settings = settings_of(world, {})
    scored(settings)
    own = {"dtype": "float32"}
    last = ["queries", "scores", "lists"]
    assert due(settings, {**own, "damping": 0.2}) == ["factors of the curvature", *last]
    assert due(settings, {**own, "top": 5}) == ["scores", "lists"]
    assert due(settings, {**own, "aggregate": "max"}) == ["scores", "lists"]
    assert due(settings, {**own, "whiten": True}) == ["whitening", *last]
    full = ["sums for the curvature", "factors of the curvature", *last]
    assert due(settings, {**own, "curvature": "full"}) == full
    both = ["gradients of the target", "gradients of the pool"]
    assert due(settings, {**own, "seed": 1, "dim": 3}) == [*both, *full]
    assert due(settings, {**own, "reduction": "sum"}) == [*both, *full]
    assert due(settings, {**own, "tasks": "number"})[:2] == ["the target", both[0]]
    more = due(settings, {**own, "metric": "cosine"})
    assert more == [*both, *last]  # of the first checkpoint


def test_the_index_may_be_removed_once_the_scores_are_there(world: Path):
    settings = settings_of(world, {})
    scored(settings)
    for path in sorted((world / "run" / "influence" / "step-2").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert due(settings) == []
    assert due(settings, {"dtype": "float32", "top": 5})[0] == "gradients of the target"


def test_a_table_that_someone_has_removed_is_made_again(world: Path):
    settings = settings_of(world, {})
    scored(settings)
    before = files(world / "run")
    for path in sorted((world / "run").glob("quantities/influence-*/part-*.parquet"))[:1]:
        path.unlink()
    scored(settings)
    assert files(world / "run") == before


@pytest.mark.parametrize("where", ["influence", "target/influence"])
def test_a_truncated_shard_is_made_again_where_it_is_needed(world: Path, where: str):
    settings = settings_of(world, {})
    scored(settings)
    before = files(world / "run")
    shard = min((world / "run" / where / "step-2").glob("part-*.vectors"))
    shard.write_bytes(shard.read_bytes()[:-7])
    values = values_of(world, {"top": 5})
    scored(parse_settings(values))
    scored(settings)
    assert files(world / "run") == before


def test_a_shard_whose_bytes_have_changed_is_refused(world: Path):
    settings = settings_of(world, {})
    scored(settings)
    shard = min((world / "run" / "influence" / "step-2").glob("part-*.vectors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    other = parse_settings(values_of(world, {"curvature": "full"}))
    with pytest.raises(TooManyBadError, match=r"part-.*\.vectors is damaged: its bytes") as e:
        score_run(other, pool=INLINE)
    assert "remove it and run the same command again" in e.value.fix
    shard.unlink()
    score_run(other, pool=INLINE)


def test_a_changed_model_makes_all_of_it_again(world: Path):
    settings = settings_of(world, {})
    first = scored(settings)["influence"].to_numpy()
    save_mlp(world / "step-2", draw=9, lr=0.2)
    assert due(settings)[:2] == ["gradients of the target", "gradients of the pool"]
    again = scored(settings)["influence"].to_numpy()
    assert np.abs(first - again).max() > 0.1 * np.abs(first).max()


def test_indices_that_differ_are_refused_by_name(world: Path):
    """A pool whose header says another reduction than the target's."""
    settings = settings_of(world, {})
    scored(settings)
    run = RunFolder(world / "run")
    part = run.partitions()[0]
    output = vectors_output(run, part, "step-2")
    mark = output.mark() or {}
    header, stored = open_rows(output.path)
    kept = np.array(stored)
    with RowsWriter(output.path, replace(header, reduction="sum")) as writer:
        writer.write(range(len(kept)), kept)
    assert output.path.read_bytes().startswith(header_bytes(replace(header, reduction="sum")))
    output.adopt(mark["fingerprint"])
    other = parse_settings(values_of(world, {"top": 3}))
    why = r"the pool in .*step-2 and that of the target in .*/target cannot .* loss reduction"
    with pytest.raises(TooManyBadError, match=why):
        score_run(other, pool=INLINE)


def texts(count: int, words: int) -> pl.DataFrame:
    draw = np.random.default_rng(count)
    return pl.DataFrame({"text": [" ".join(draw.choice(["the", "cat", "sat"], 1 + n % words))
                                  for n in range(count)]})  # fmt: skip


def language_settings(root: Path, **more: Any) -> Settings:
    settings = parse_settings({
        "run": str(root / "run"),
        "sources": {"pool": {"path": str(root / "pool.parquet"), "text": "text"}},
        "target": {"path": str(root / "target.parquet"), "text": "text"},
        "task": {"kind": "causal-lm", "max_tokens": 24},
        "model": {"name": str(root / "lm"), "device": "cpu"},
        "checkpoints": {"paths": [str(path) for path in (root / "lm", root / "late")
                                  if path.exists()]},
        "index": {"held_out": 0.0, "partition_rows": 4},
        "score": {"scorers": [{"influence": {"dim": 3, **more}}]},
    })  # fmt: skip
    index_run(settings, pool=INLINE)
    return settings


def language_world(root: Path) -> Path:
    texts(8, 4).write_parquet(root / "pool.parquet")
    long = pl.DataFrame({"text": ["the cat sat " * 30]})
    pl.concat([texts(2, 3), long]).write_parquet(root / "target.parquet")
    save_language_model(root / "lm", num_hidden_layers=1)
    return root


def test_a_target_example_longer_than_the_context_is_cut_and_told(tmp_path: Path):
    save_language_model(tmp_path / "late", num_hidden_layers=1, seed=3)
    settings = language_settings(language_world(tmp_path), metric="dot")
    said = score_run(settings, pool=INLINE)["says"]
    # Once, with two checkpoints.
    assert sum("1 target example is longer than the context and cut" in one for one in said) == 1
    found = table(settings, "scores/influence")
    assert found["influence"].is_finite().all()
    assert found["num_scored"].min() == 1
    # The same as of what is left of it.
    left = pl.concat([texts(2, 3), pl.DataFrame({"text": ["the cat sat " * 20]})])
    left.write_parquet(tmp_path / "target.parquet")
    again = scored(settings)
    np.testing.assert_allclose(again["influence"], found["influence"], rtol=1e-6)


def test_another_tokenizer_makes_all_of_it_again(tmp_path: Path):
    settings = language_settings(language_world(tmp_path))
    scored(settings)
    byte_tokenizer(merges=False).save_pretrained(tmp_path / "lm")
    assert "gradients of the pool" in due(settings)
    assert "gradients of the target" in due(settings)


def spoiled(frame: pl.DataFrame, places: list[int]) -> pl.DataFrame:
    """Numbers so large that the gradients of `steep` models are not finite."""
    numbers = frame["x"].to_numpy().copy()
    numbers[places] = 3e38
    return frame.with_columns(pl.Series("x", numbers))


def steep(world: Path) -> None:
    for folder in world.glob("step-*"):
        model = MLP.from_pretrained(folder)
        with torch.no_grad():
            next(model.parameters()).mul_(10)
        model.save_pretrained(folder)


def test_examples_without_a_gradient_have_no_score_and_no_part(world: Path):
    """One of the pool, and one of the target."""
    steep(world)
    spoiled(pool(), [3]).write_parquet(world / "rows.parquet")
    spoiled(target(), [3]).write_parquet(world / "target.parquet")
    settings = settings_of(world, {"metric": "cosine", "matrix": True})
    said = score_run(settings, pool=INLINE)["says"]
    # Of each checkpoint, as a gradient may be finite with another one.
    assert sum("1 target example has no gradient" in sentence for sentence in said) == 2
    found = table(settings, "scores/influence")
    assert found["influence"].is_null().arg_true().to_list() == [3]
    matrix = table(settings, "influence/cosine/matrix")
    assert matrix["target-000003"].null_count() == 30
    assert matrix["target-000002"].is_null().arg_true().to_list() == [3]
    target().filter(pl.int_range(pl.len()) != 3).write_parquet(world / "target.parquet")
    again = scored(settings)
    np.testing.assert_allclose(again["influence"], found["influence"], rtol=1e-6)


def test_values_beyond_float32_are_null(world: Path):
    """Gradients of 1e37 on both sides: their products leave float32, and float64 holds them."""
    spoiled(pool(), [3, 4]).write_parquet(world / "rows.parquet")
    spoiled(target(), [0]).write_parquet(world / "target.parquet")
    found = scored(settings_of(world, {"metric": "dot"}))
    for name in ("influence", "influence_loss"):
        assert not found[name].is_infinite().any()
    assert {3, 4} & set(found["influence"].is_null().arg_true().to_list())


def test_a_sub_task_without_any_gradient_is_refused_by_its_name(world: Path):
    steep(world)
    spoiled(target(), [0, 3]).write_parquet(world / "target.parquet")
    with pytest.raises(CurateError, match="no target example of 'a' has a gradient"):
        scored(settings_of(world, {}))


def test_a_column_of_sub_tasks_must_be_there_and_full(world: Path):
    with pytest.raises(CurateError, match="no column 'topics'"):
        scored(settings_of(world, {"tasks": "topics"}))
    empty = target().with_columns(topic=pl.when(pl.int_range(6) != 4).then("topic"))
    empty.write_parquet(world / "target.parquet")
    values = values_of(world, {"tasks": "topic"})
    values["target"].pop("domain")
    settings = parse_settings(values)
    index_run(settings, pool=INLINE)
    with pytest.raises(CurateError, match=r": target/target\.parquet:4 has nothing in the column"):
        scored(settings)


def test_without_a_target_nothing_begins(world: Path):
    values = values_of(world, {})
    values.pop("target")
    with pytest.raises(ConfigError, match="scorer influence compares every example with a target"):
        check_scores(parse_settings(values))


def test_a_pool_of_several_checkpoints_is_asked_only_what_the_metric_needs(world: Path):
    settings = settings_of(world, {})
    scored(settings)
    assert not (world / "run" / "influence" / "step-1").exists()
    curvature = load_curvature(RunFolder(world / "run"), "step-2")
    assert curvature.num_rows == 30


@pytest.mark.parametrize("module", ["influence_curvature", "influence_queries"])
def test_a_full_disk_is_said_and_the_rest_goes_on_later(
    world: Path, monkeypatch: pytest.MonkeyPatch, module: str
):
    settings = settings_of(world, ALL)

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(f"jobs.{module}.save_file", full)
    with pytest.raises(OutputError, match=r"safetensors could not be written: No space left"):
        scored(settings)
    monkeypatch.undo()
    assert "gradients of the pool" not in due(settings)
    scored(settings)
    other = settings_of(world, ALL, run=str(world / "other"))
    scored(other)
    assert files(world / "run") == files(world / "other")


@pytest.mark.slow
def test_two_workers_write_the_same_bytes(world: Path):
    settings = settings_of(world, ALL)
    scored(settings)
    other = settings_of(world, ALL, run=str(world / "other"))
    with open_pool(Cluster(kind="local", workers=2)) as workers:
        scored(other, workers)
    assert files(world / "run") == files(world / "other")


@pytest.mark.slow
def test_a_kill_within_every_single_output_changes_no_byte(world: Path):
    """Each child finishes a few outputs and is killed between the next one and its mark."""
    two = {"index": {"partition_rows": 15, "held_out": 0.0}}
    settings = settings_of(world, ALL, **two)
    scored(settings)
    settings_of(world, ALL, **two, run=str(world / "other"))
    values = values_of(world, ALL, **two, run=str(world / "other"))
    (world / "settings.yaml").write_text(yaml.safe_dump(values))
    done = subprocess.run(
        [sys.executable, "-c", DYING, str(world / "settings.yaml")],
        capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 12
    assert files(world / "run") == files(world / "other")


DYING = """
import os, signal, sys
from pathlib import Path
import yaml
from curate.data.partitions import Output
from influence_world import INLINE
from jobs.score import score_run
from jobs.settings import parse_settings

settings = parse_settings(yaml.safe_load(Path(sys.argv[1]).read_text()))
right, calls = Output.adopt, []

def adopt(self, fingerprint, **facts):
    calls.append(self)
    if len(calls) == 2 + kills % 3:  # a task may write three files
        os.kill(os.getpid(), signal.SIGKILL)
    return right(self, fingerprint, **facts)

Output.adopt = adopt
kills = 0
while True:
    child = os.fork()
    if not child:
        score_run(settings, pool=INLINE)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if not status:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    kills += 1
    assert kills < 200
print(kills)
"""
