"""Cached losses: those of a fresh pass, in the order of tokens; refused where there are none."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from proxy_case import LENGTH, make_model, make_task, open_data, write_domains

from curate.data.partitions import Output
from curate.errors import InputError
from curate.models import sequence_losses
from curate.models.sequence_files import write_sequences
from curate.models.sequence_losses import Computed, SequenceLosses, compute_losses, write_losses
from curate.models.sequences import Sequences
from curate.models.tasks.protocol import Encoded

SIZES = {"count": 24, "noise": 16}


def fresh(model: Any, tokens: np.ndarray) -> np.ndarray:
    """(B, T - 1) losses in float64, by a loop over tokens."""
    ids = torch.from_numpy(tokens).long()
    with torch.no_grad():
        logs = model(input_ids=ids).logits.double().log_softmax(-1)
    rows, places = np.indices((len(tokens), LENGTH - 1))
    return -logs[rows, places, tokens[:, 1:]].numpy()


@pytest.fixture
def written(tmp_path: Path) -> Any:
    """Two files of sequences and the losses of some of each, in batches of three."""
    paths = [write_domains(tmp_path / f"{n}.safetensors", SIZES, seed=n) for n in (0, 1)]
    sequences = open_data(paths).sequences
    model = make_model(seed=2).eval()
    outputs: list[Path] = []
    chosen = np.array([1, 2, 5, 9, 11, 30, 41, 44, 60, 79])
    for file in (0, 1):
        first, last = sequences.offsets[file : file + 2]
        own = chosen[(chosen >= first) & (chosen < last)]
        found = compute_losses(model, make_task(), sequences, own, batch_tokens=3 * LENGTH)
        output = Output(tmp_path / f"{file}.npy")
        write_losses(output, found, "f")
        outputs.append(output.path)
    return outputs, sequences, model, chosen


def test_losses_are_those_of_a_fresh_pass_to_half_precision_in_any_order(written: Any):
    outputs, sequences, model, chosen = written
    numbers = np.random.default_rng(0).permutation(chosen)
    tokens = sequences.read(numbers).arrays["tokens"].reshape(-1, LENGTH)
    found = SequenceLosses(outputs)(numbers)
    assert found.dtype == np.float32
    expected = fresh(model, tokens).reshape(-1)
    np.testing.assert_allclose(found, expected, rtol=2.0**-10, atol=1e-6)
    assert (found != expected).any()


def test_what_was_not_computed_is_refused_and_nothing_asked_is_nothing(written: Any):
    outputs, *_ = written
    losses = SequenceLosses(outputs)
    assert losses(np.zeros(0, dtype=np.int64)).shape == (0,)
    for number in (0, 10, 78, 80, 10**9):
        with pytest.raises(InputError, match="has not seen"):
            losses(np.array([1, number]))


def test_a_file_without_sequences_is_no_harm_and_one_that_is_cut_off_is_named(
    written: Any, tmp_path: Path
):
    outputs, sequences, model, _ = written
    empty = Output(tmp_path / "empty.npy")
    none = np.zeros(0, dtype=np.int64)
    write_losses(empty, compute_losses(model, make_task(), sequences, none, batch_tokens=64), "f")
    joined = SequenceLosses([outputs[0], empty.path, outputs[1]])
    assert np.array_equal(joined(np.array([60])), SequenceLosses(outputs)(np.array([60])))
    outputs[0].write_bytes(outputs[0].read_bytes()[:100])
    with pytest.raises(InputError, match="missing or damaged"):
        SequenceLosses(outputs)
    outputs[0].unlink()
    with pytest.raises(InputError, match="missing or damaged"):
        SequenceLosses(outputs)


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files as Linux does")
def test_more_files_of_losses_are_read_than_may_be_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import resource

    paths = [tmp_path / f"{number}.npy" for number in range(60)]
    for number, path in enumerate(paths):
        own = Computed(np.array([[number], [0], [2]]), np.full(2, number, dtype=np.float16))
        write_losses(Output(path), own, "f")
    monkeypatch.setattr(sequence_losses, "_OPEN", 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(entry.name) for entry in Path("/proc/self/fd").iterdir()}
    free = [number for number in range(soft) if number not in taken]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[20], hard))  # the 20 below it are left
    try:
        found = SequenceLosses(paths)(np.arange(60)[::-1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found.tolist() == np.repeat(np.arange(60)[::-1], 2).tolist()


def test_a_batch_with_its_padding_stays_within_the_tokens(tmp_path: Path):
    """A short sequence comes first: the batch may not be sized by it."""
    sizes = [2, 16, 16, 3, 9, 2, 2, 2, 16, 5]
    flat = np.random.default_rng(0).integers(1, 32, sum(sizes)).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    counted = np.ones(len(flat), dtype=np.bool_)
    counted[starts[:-1]] = False
    encoded = Encoded(
        lengths=np.array(sizes),
        num_scored=np.array(sizes) - 1,
        truncated=np.zeros(len(sizes), dtype=np.bool_),
        arrays={"tokens": flat, "starts": starts, "counted": counted},
        problems={},
    )
    path = tmp_path / "ragged.safetensors"
    place = np.zeros(len(sizes), dtype=np.int32)
    write_sequences(
        path, encoded, domain=place, part=np.ones(len(sizes), dtype=np.uint8), names=["a"]
    )
    sequences = Sequences.open([path], parts=("proxy",))
    model = make_model(seed=2).eval()
    shapes: list[tuple[int, int]] = []

    def note(module: Any, args: Any, given: dict[str, Any]) -> None:
        shapes.append(tuple(given["input_ids"].shape))

    model.model.register_forward_pre_hook(note, with_kwargs=True)
    numbers = np.arange(len(sizes))
    together = compute_losses(model, make_task(), sequences, numbers, batch_tokens=32)
    assert all(rows * width <= 32 for rows, width in shapes)
    assert len(shapes) < len(sizes)
    alone = compute_losses(model, make_task(), sequences, numbers, batch_tokens=1)
    np.testing.assert_allclose(together.losses, alone.losses, rtol=2e-3)
    assert np.array_equal(together.places, alone.places)
    assert together.places[2].tolist() == [size - 1 for size in sizes]
