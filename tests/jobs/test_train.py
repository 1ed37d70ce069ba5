"""The train stage on small real files: what it leaves, what it skips, and kills at any moment."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors import SafetensorError, safe_open

from curate.data.layout import RunFolder
from curate.data.manifest import load_manifest
from curate.errors import ConfigError, CurateError, InputError
from curate.models.checkpoints import list_checkpoints, load_moments
from curate.models.load import load_model
from curate.models.tokens import load_tokenizer, tokenizer_digest
from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.settings import Settings, parse_settings, task_settings
from jobs.train import measure_train, plan_tokenizer, plan_train, tokenizer_run, train_run

INLINE = Pool(InlineExecutor(), 1)

WORDS = ["red", "green", "blue", "cat", "dog", "bird", "sits", "runs", "on", "the", "a", "small"]


def write_texts(folder: Path, seed: int, rows: int) -> None:
    """Sentences of few words, in two row groups."""
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(3, 14))) + "." for _ in range(rows)]
    folder.mkdir(parents=True, exist_ok=True)
    frame = pl.DataFrame({"text": texts})
    frame.write_parquet(folder / f"{seed}.parquet", row_group_size=rows // 2)


def values(root: Path, run: str = "run", **train: Any) -> dict[str, Any]:
    """Settings of a tiny GPT-2, with the dropout that it has by default."""
    return {
        "run": str(root / run),
        "sources": {name: {"path": str(root / name), "text": "text"} for name in ("one", "two")},
        "task": {"kind": "causal-lm", "max_tokens": 16},
        "model": {
            "config": {
                "model_type": "gpt2",
                "n_embd": 16,
                "n_layer": 1,
                "n_head": 2,
                "n_positions": 16,
            },
            "tokenizer": {"train": "bpe", "vocab_size": 300},
        },
        "checkpoints": {
            "train": {
                "epochs": 2,
                "lr": 1e-2,
                "batch_tokens": 192,
                "save_every_epochs": 0.5,
                **train,
            }
        },
        "index": {"partition_rows": 20, "held_out": 0.2},
    }


def indexed(given: dict[str, Any]) -> Settings:
    settings = parse_settings(given)
    index_run(settings, pool=INLINE)
    return settings


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    write_texts(tmp_path / "one", 1, 60)
    write_texts(tmp_path / "two", 2, 30)
    return tmp_path


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file of a run's checkpoints, the state to resume from left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "resume" not in path.parts
    }


def test_a_run_leaves_checkpoints_curve_and_records(texts: Path):
    settings = indexed(values(texts, seeds=[0, 1], save_moments=True))
    summary = train_run(settings, pool=INLINE)
    run = RunFolder(texts / "run")
    found = list_checkpoints(run.checkpoints)
    assert [checkpoint.name for checkpoint in found] == summary["checkpoints"]
    assert [checkpoint.epoch for checkpoint in found] == pytest.approx(
        [0.5, 1, 1.5, 2] * 2, abs=0.11
    )
    assert len({checkpoint.digest for checkpoint in found}) == 8
    curve = pl.read_parquet(run.checkpoints / "seed-1" / "curve.parquet")
    evaluated = curve.drop_nulls("held_out_loss")
    assert evaluated["step"].to_list() == [c.step for c in found if c.seed == 1]
    assert curve["loss"][-1] < curve["loss"][0] - 0.5
    assert evaluated["held_out_loss"].is_sorted(descending=True)
    assert summary["held_out_loss"]["seed-1"] == curve["held_out_loss"][-1]
    assert not list(run.checkpoints.rglob("state.safetensors"))
    for epoch in ("epoch-000", "epoch-001"):
        for part in run.partitions():
            path = run.checkpoints / "seed-0" / "log" / epoch / f"{part.name}.parquet"
            log = pl.read_parquet(path)
            examples = pl.read_parquet(run.examples(part).path)
            assert log.select("source", "file", "row").equals(
                examples.select("source", "file", "row")
            )
            seen = log["loss"].is_not_null().to_list()
            assert seen == (examples["split"] == "train").to_list()
    assert load_moments(found[0]).gradient.keys() == load_moments(found[-1]).square.keys()
    files = load_manifest(run)["stages"]["train"]["files"]
    assert "checkpoints/seed-0/done.json" in files


def test_a_saved_checkpoint_loads_with_the_tokenizer_it_was_trained_with(texts: Path):
    settings = indexed(values(texts))
    train_run(settings, pool=INLINE)
    last = list_checkpoints(texts / "run" / "checkpoints")[-1]
    loaded = load_model(settings.model, task_settings(settings), checkpoint=last.path)
    trained = load_tokenizer(texts / "run" / "tokenizer")
    assert tokenizer_digest(loaded.tokenizer) == tokenizer_digest(trained)
    ids = torch.tensor([trained("the cat sits on the dog")["input_ids"]])
    with torch.no_grad():
        loss = loaded.model(input_ids=ids, labels=ids).loss.item()
    assert loss < np.log(len(trained)) - 1


def test_two_runs_write_the_same_bytes(texts: Path):
    for run in ("run", "again"):
        train_run(indexed(values(texts, run)), pool=INLINE)
    first = bytes_of(texts / "run" / "checkpoints")
    assert len(first) > 20
    assert first == bytes_of(texts / "again" / "checkpoints")
    assert bytes_of(texts / "run" / "tokenizer") == bytes_of(texts / "again" / "tokenizer")


def test_what_is_done_is_skipped_and_a_new_seed_trains_only_itself(texts: Path):
    train_run(indexed(values(texts)), pool=INLINE)
    before = bytes_of(texts / "run" / "checkpoints")
    more = parse_settings(values(texts, seeds=[0, 5], resume_every_seconds=7))
    assert plan_train(more).done == 1
    summary = train_run(more, pool=INLINE)
    assert (summary["done"], summary["skipped"]) == (1, 1)
    after = bytes_of(texts / "run" / "checkpoints")
    assert before.items() <= after.items()
    assert (plan_train(more).done, plan_train(more).why) == (2, ())


def test_changed_settings_take_the_old_checkpoints_away(texts: Path):
    train_run(indexed(values(texts, save_every_epochs=0.1)), pool=INLINE)
    changed = parse_settings(values(texts, lr=2e-2))
    state = plan_train(changed)
    assert state.done == 0
    assert state.why == ("1 training runs have changed data or settings and start again",)
    train_run(changed, pool=INLINE)
    fresh = parse_settings(values(texts, "fresh", lr=2e-2))
    index_run(fresh, pool=INLINE)
    train_run(fresh, pool=INLINE)
    used = bytes_of(texts / "run" / "checkpoints")
    assert used == bytes_of(texts / "fresh" / "checkpoints")


def test_new_data_measures_only_its_own_lengths(texts: Path):
    settings = indexed(values(texts))
    settings = parse_settings({**values(texts), "model": named_tokenizer(texts, settings)})
    train_run(settings, pool=INLINE)
    folder = texts / "run" / "checkpoints" / "lengths"
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    write_texts(texts / "two", 3, 20)
    index_run(settings, pool=INLINE)
    train_run(settings, pool=INLINE)
    after = {path: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    assert before.items() < after.items()
    assert len(after) == len(before) + 1


def named_tokenizer(texts: Path, settings: Settings) -> dict[str, Any]:
    """The model's settings with a tokenizer that new text does not change."""
    tokenizer_run(settings)
    place = texts / "tokenizer"
    shutil.copytree(texts / "run" / "tokenizer", place)
    return {**values(texts)["model"], "tokenizer": str(place)}


SERVER = """
import json, os, sys
import jobs.training_work, transformers
from transformers import GPT2LMHeadModel
from jobs.cluster import InlineExecutor, Pool
from jobs.settings import parse_settings
from jobs.train import train_run
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        train_run(parse_settings(json.loads(line)), pool=Pool(InlineExecutor(), 1))
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Trainer:
    """Trains in processes that can be killed; imports are paid for once."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            text=True,
        )

    def line(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def start(self, given: dict[str, Any]) -> int:
        """Process id of a run that has begun."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(given) + "\n")
        self.process.stdin.flush()
        return self.line()

    def kill(self, child: int) -> bool:
        """Kill it; whether it was still running."""
        os.kill(child, signal.SIGKILL)
        return self.line() == signal.SIGKILL


@pytest.fixture(scope="module")
def trainer() -> Generator[Trainer]:
    made = Trainer()
    yield made
    made.process.kill()
    made.process.communicate()


def progress(checkpoints: Path) -> int:
    """Steps in the saved state, from its header alone."""
    try:
        with safe_open(checkpoints / "seed-0" / "resume" / "state.safetensors", "pt") as file:
            return int(json.loads(file.metadata()["facts"])["optimiser"]["step"])
    except (FileNotFoundError, SafetensorError):
        return 0


def has_begun(checkpoints: Path, steps: int) -> bool:
    return (checkpoints / "seed-0").exists() and progress(checkpoints) >= steps


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_kill_9_at_random_moments_leaves_the_bytes_of_an_undisturbed_run(
    texts: Path, trainer: Trainer
):
    """Every step's state is written, so that kills fall into writes of all kinds."""
    train_run(indexed(values(texts, resume_every_seconds=0)), pool=INLINE)
    killed = values(texts, "killed", resume_every_seconds=0)
    indexed(killed)
    checkpoints = texts / "killed" / "checkpoints"
    total = list_checkpoints(texts / "run" / "checkpoints")[-1].step
    draw = random.Random(0)
    kills = list[int]()
    for attempt in range(10):
        wanted = 0 if attempt == 0 else progress(checkpoints) + draw.randint(0, 3)
        child = trainer.start(killed)
        wait_for(partial(has_begun, checkpoints, min(wanted, total - 1)))
        time.sleep(draw.uniform(0, 0.03))
        assert trainer.kill(child)
        kills.append(progress(checkpoints))
    assert kills == sorted(kills)
    assert len(set(kills)) >= 4
    assert not (checkpoints / "seed-0" / "done.json").exists()
    train_run(parse_settings(killed), pool=INLINE)
    whole = bytes_of(texts / "run" / "checkpoints")
    assert len([name for name in whole if name.endswith("model.safetensors")]) == 4
    assert bytes_of(checkpoints) == whole


def test_a_resumed_run_does_not_repeat_what_it_has_done(
    texts: Path, trainer: Trainer, caplog: pytest.LogCaptureFixture
):
    given = values(texts, resume_every_seconds=0)
    settings = indexed(given)
    checkpoints = texts / "run" / "checkpoints"
    child = trainer.start(given)
    wait_for(lambda: progress(checkpoints) >= 3)
    assert trainer.kill(child)
    assert plan_train(settings).why == ("1 training runs were interrupted and go on",)
    step = progress(checkpoints)
    with caplog.at_level("INFO"):
        train_run(settings, pool=INLINE)
    assert f"seed 0: resuming after step {step}" in caplog.text


def test_a_diverging_seed_is_named_and_the_others_finish(
    texts: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = indexed(values(texts, seeds=[0, 1]))
    from jobs import training_work

    honest = training_work.open_optimiser

    def broken(shop: Any, draws: int, total_steps: int) -> Any:
        optimiser = honest(shop, draws, total_steps)
        if draws == training_work.random_seed(0, "train", 0):
            with torch.no_grad():
                next(iter(optimiser.model.parameters())).fill_(torch.nan)
        return optimiser

    monkeypatch.setattr(training_work, "open_optimiser", broken)
    with pytest.raises(
        CurateError, match=r"1 of 2 tasks failed; seed-0: seed 0: the loss at step 1"
    ):
        train_run(settings, pool=INLINE)
    found = list_checkpoints(texts / "run" / "checkpoints")
    assert {checkpoint.seed for checkpoint in found} == {1}
    monkeypatch.undo()
    assert train_run(settings, pool=INLINE)["skipped"] == 1


def test_a_classifier_of_numbers_learns_from_scratch_and_its_checkpoint_loads(tmp_path: Path):
    draw = np.random.default_rng(0)
    label = draw.integers(0, 3, 200)
    numbers = draw.normal(size=(200, 2)) + np.array([[0, 0], [4, 0], [0, 4]])[label]
    frame = pl.DataFrame({"x": numbers[:, 0], "y": numbers[:, 1], "label": label})
    (tmp_path / "points").mkdir()
    frame.write_parquet(tmp_path / "points" / "a.parquet")
    given = {
        "run": str(tmp_path / "run"),
        "sources": {
            "points": {
                "path": str(tmp_path / "points"),
                "features": ["x", "y"],
                "label": "label",
            }
        },
        "task": {"kind": "tabular-classification", "num_classes": 3},
        "model": {"config": {"model_type": "mlp", "hidden": [16]}},
        "checkpoints": {"train": {"epochs": 15, "lr": 0.02, "batch_tokens": 16}},
    }
    settings = indexed(given)
    summary = train_run(settings, pool=INLINE)
    assert summary["held_out_loss"]["seed-0"] < 0.3
    run = RunFolder(tmp_path / "run")
    last = list_checkpoints(run.checkpoints)[-1]
    loaded = load_model(settings.model, task_settings(settings), checkpoint=last.path)
    with torch.no_grad():
        best = loaded.model(torch.from_numpy(numbers.astype(np.float32))).argmax(1)
    assert float((best.numpy() == label).mean()) > 0.9
    log = pl.read_parquet(run.checkpoints / "seed-0" / "log" / "epoch-014" / "*.parquet")
    assert log["correct"].mean() > 0.9  # pyright: ignore[reportOperatorIssue]


def test_a_saved_model_is_fine_tuned(texts: Path):
    train_run(indexed(values(texts)), pool=INLINE)
    start_point = list_checkpoints(texts / "run" / "checkpoints")[-1].path
    given = values(texts, "tuned", lr=1e-5, save_every_epochs=1)
    given["model"] = {"name": str(start_point)}
    settings = indexed(given)
    train_run(settings, pool=INLINE)
    before = pl.read_parquet(texts / "run" / "checkpoints" / "seed-0" / "curve.parquet")
    after = pl.read_parquet(texts / "tuned" / "checkpoints" / "seed-0" / "curve.parquet")
    assert after["loss"][0] < before["loss"][0] - 0.5
    tuned = list_checkpoints(texts / "tuned" / "checkpoints")[-1]
    assert "_name_or_path" not in json.loads((tuned.path / "config.json").read_text())
    # Another start is another run.
    given["model"] = {"name": str(list_checkpoints(texts / "run" / "checkpoints")[0].path)}
    assert plan_train(parse_settings(given)).done == 0


def test_planning_writes_nothing_and_says_what_comes_first(texts: Path):
    settings = parse_settings(values(texts))
    assert "index" in plan_train(settings).why[0]
    assert plan_tokenizer(settings).done == 0
    assert not (texts / "run").exists()
    index_run(settings, pool=INLINE)
    assert plan_train(settings).why == ("it is not trained yet",)
    tokenizer_run(settings)
    before = sorted((texts / "run").rglob("*"))
    assert plan_train(settings).why == ("1 training runs are new",)
    assert sorted((texts / "run").rglob("*")) == before


def test_the_estimate_counts_the_steps_that_training_takes(texts: Path):
    settings = indexed(values(texts, save_moments=True))
    assert measure_train(settings)["seconds"] is None
    tokenizer_run(settings)
    before = sorted((texts / "run").rglob("*"))
    found = measure_train(settings)
    assert sorted((texts / "run").rglob("*")) == before
    train_run(settings, pool=INLINE)
    last = list_checkpoints(texts / "run" / "checkpoints")[-1]
    assert found["steps"] == pytest.approx(last.step, rel=0.1)
    assert found["seconds"] >= found["steps"] * found["step_seconds"] > 0
    weights = sum(f.stat().st_size for f in (texts / "run").rglob("*.safetensors"))
    assert weights * 0.8 < found["size_bytes"] < weights * 2.5
    assert measure_train(settings)["seconds"] == 0


def test_a_trained_tokenizer_is_kept_until_its_text_or_size_changes(texts: Path):
    settings = indexed(values(texts))
    assert tokenizer_run(settings) == {"vocab_size": 300, "done": True}
    assert tokenizer_run(settings) == {"vocab_size": 300, "done": False}
    write_texts(texts / "two", 3, 20)
    index_run(settings, pool=INLINE)
    assert plan_tokenizer(settings).why == ("the data or model.tokenizer has changed",)
    assert tokenizer_run(settings)["done"]


def test_held_out_text_is_not_in_the_tokenizer(tmp_path: Path):
    draw = random.Random(0)
    rows = [f"word{draw.randint(0, 9)} unicorn{index}" for index in range(100)]
    (tmp_path / "one").mkdir()
    pl.DataFrame({"text": rows}).write_parquet(tmp_path / "one" / "a.parquet")
    write_texts(tmp_path / "two", 2, 30)
    given = values(tmp_path)
    given["index"]["held_out"] = 1.0
    settings = indexed(given)
    with pytest.raises(InputError, match="no text to train a tokenizer on"):
        tokenizer_run(settings)


def test_a_run_without_training_rows_says_so_and_leaves_no_checkpoint(texts: Path):
    settings = indexed(values(texts))
    model = named_tokenizer(texts, settings)
    given = {**values(texts, "empty"), "model": model, "index": {"held_out": 1.0}}
    with pytest.raises(InputError, match=r"nothing to train on.*\n.*index\.held_out"):
        train_run(indexed(given), pool=INLINE)
    assert list_checkpoints(texts / "empty" / "checkpoints") == []


def test_what_cannot_be_trained_says_why(texts: Path):
    given = values(texts)
    bare = parse_settings({**given, "model": {}})
    with pytest.raises(ConfigError, match=r"no model to train\n.*model\.name"):
        train_run(bare, pool=INLINE)
    with pytest.raises(InputError, match="index has not run yet"):
        train_run(parse_settings(given), pool=INLINE)
    index_run(parse_settings(given), pool=INLINE)
    silent = {**given, "model": {"config": given["model"]["config"]}}
    with pytest.raises(ConfigError, match=r"no tokenizer is set\n.*train: bpe"):
        train_run(parse_settings(silent), pool=INLINE)
    assert train_run(parse_settings({**given, "checkpoints": {}}), pool=INLINE) == {}
