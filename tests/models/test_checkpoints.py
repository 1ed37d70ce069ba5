"""Checkpoints and the state to resume from: whole or not there, and read back as written."""

import json
import os
import resource
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from curate.data.files import replace_folder
from curate.errors import InputError, OutputError
from curate.models.checkpoints import (
    Checkpoint,
    Moments,
    list_checkpoints,
    load_moments,
    load_state,
    save_checkpoint,
    save_state,
    weights_digest,
)
from curate.models.tokenizer_training import save_tokenizer, train_tokenizer


def _save(root: Path, seed: int, step: int, value: float, moments: Moments | None = None):
    def write(folder: Path) -> None:
        save_file({"weight": torch.full((2, 3), value)}, folder / "model.safetensors")

    return save_checkpoint(
        root, seed=seed, step=step, epoch=step / 10, lr=0.1, write_model=write, moments=moments
    )


def test_checkpoints_are_listed_by_seed_and_step_as_they_were_saved(tmp_path: Path):
    saved = [_save(tmp_path, seed, step, seed + step) for seed in (10, 2) for step in (20, 7)]
    expected = [saved[3], saved[2], saved[1], saved[0]]
    assert list_checkpoints(tmp_path) == expected
    assert [checkpoint.name for checkpoint in expected[:2]] == [
        "seed-2/step-000007",
        "seed-2/step-000020",
    ]


def test_nothing_is_listed_where_nothing_was_trained(tmp_path: Path):
    assert list_checkpoints(tmp_path / "missing") == []


def test_the_digest_follows_the_weights_and_nothing_else(tmp_path: Path):
    moments = Moments({"w": torch.ones(2)}, {"w": torch.ones(2)})
    same = _save(tmp_path / "a", 0, 1, 1.0)
    again = _save(tmp_path / "b", 3, 2, 1.0, moments)
    other = _save(tmp_path / "c", 0, 1, 1.5)
    assert same.digest == again.digest == weights_digest(again.path)
    assert same.digest != other.digest


def test_moments_come_back_by_parameter_name(tmp_path: Path):
    first: dict[str, Tensor] = {"a.weight": torch.randn(3, 2), "square.bias": torch.randn(3)}
    second = {name: tensor.square() for name, tensor in first.items()}
    checkpoint = _save(tmp_path, 0, 1, 1.0, Moments(first, second))
    found = load_moments(checkpoint)
    for expected, got in zip((first, second), found, strict=True):
        assert expected.keys() == got.keys()
        for name, tensor in expected.items():
            assert torch.equal(got[name], tensor)


def test_moments_that_were_not_kept_are_asked_for_by_name(tmp_path: Path):
    with pytest.raises(InputError, match=r"seed-0/step-000001.*\n.*save_moments"):
        load_moments(_save(tmp_path, 0, 1, 1.0))


def test_a_failed_save_leaves_the_earlier_checkpoint(tmp_path: Path):
    before = _save(tmp_path, 0, 1, 1.0)

    def fail(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match=r"step-000001.*No space left"):
        save_checkpoint(tmp_path, seed=0, step=1, epoch=0.1, lr=0.1, write_model=fail)
    assert list_checkpoints(tmp_path) == [before]
    assert torch.equal(
        load_file(before.path / "model.safetensors")["weight"], torch.full((2, 3), 1.0)
    )
    assert [path.name for path in before.path.parent.iterdir()] == ["step-000001"]


@contextmanager
def _small_disk(limit: int) -> Generator[None]:
    """Files of this process cannot grow beyond `limit` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_as_such_and_the_last_state_stays(tmp_path: Path):
    path = tmp_path / "state.safetensors"
    save_state(path, {"a": torch.ones(3)}, {"step": 1})
    with _small_disk(10_000), pytest.raises(OutputError, match=r"state\.safetensors could not be"):
        save_state(path, {"a": torch.ones(100_000)}, {"step": 2})
    loaded = load_state(path)
    assert loaded is not None
    assert loaded[1]["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_leaves_no_part_of_a_checkpoint_or_tokenizer(tmp_path: Path):
    def write(folder: Path) -> None:
        save_file({"weight": torch.ones(100_000)}, folder / "model.safetensors")

    tokenizer = train_tokenizer(["some words"], vocab_size=260)
    with _small_disk(5_000):
        with pytest.raises(OutputError, match="step-000001 could not be written"):
            save_checkpoint(tmp_path, seed=0, step=1, epoch=0.1, lr=0.1, write_model=write)
        with pytest.raises(OutputError, match="tokenizer could not be written"):
            replace_folder(tmp_path / "tokenizer", lambda f: save_tokenizer(tokenizer, f))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_folder_that_a_killed_process_left_is_not_a_checkpoint(tmp_path: Path):
    def interrupt(folder: Path) -> None:
        (folder / "checkpoint.json").write_text(json.dumps({"step": 1}))
        os.kill(os.getpid(), 9)

    child = os.fork()
    if child == 0:
        replace_folder(tmp_path / "seed-0" / "step-000001", interrupt)
    os.waitpid(child, 0)
    assert len(list((tmp_path / "seed-0").iterdir())) == 1
    assert list_checkpoints(tmp_path) == []


def test_a_state_comes_back_to_the_bit(tmp_path: Path):
    path = tmp_path / "resume" / "state.safetensors"
    assert load_state(path) is None
    value = torch.randn(4, 3).t()  # not contiguous
    facts = {"step": 7, "sum": 0.1 + 0.2, "points": [{"step": 1, "loss": 1 / 3}]}
    save_state(path, {"a": value, "count": torch.tensor(3.0)}, facts)
    loaded = load_state(path)
    assert loaded is not None
    tensors, found = loaded
    assert torch.equal(tensors["a"], value)
    assert tensors["count"].shape == ()
    assert {key: found[key] for key in facts} == facts


def test_checkpoint_facts_are_documented_json(tmp_path: Path):
    checkpoint = _save(tmp_path, 0, 1, 1.0)
    facts = json.loads((checkpoint.path / "checkpoint.json").read_text())
    assert facts == {
        "schema_version": 1,
        "step": 1,
        "epoch": 0.1,
        "lr": 0.1,
        "seed": 0,
        "digest": checkpoint.digest,
    }
    assert isinstance(checkpoint, Checkpoint)
