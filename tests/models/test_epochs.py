"""The plan of an epoch: every example once, within the budget, the same for the same seed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.models.epochs import WINDOW, Lengths, Window, epoch_windows, plan_epochs


def _lengths(seed: int, parts: int, rows: int = 50, longest: int = 60) -> list[Lengths]:
    random = np.random.default_rng(seed)
    return [random.integers(0, longest, rows, dtype=np.int32) for _ in range(parts)]


def _plan(lengths: list[Lengths], *, seed: int = 0, epoch: int = 0, budget: int = 128):
    return list(epoch_windows(lengths, seed=seed, epoch=epoch, batch_tokens=budget))


def _members(window: Window, lengths: list[Lengths]) -> list[tuple[int, int]]:
    """(partition, row) of every place that a window's batches name, by counting it off."""
    rows = [(part, row) for part in window.parts for row in range(len(lengths[part]))]
    return [rows[place] for batch in window.batches for place in batch]


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 500))
@settings(max_examples=30, deadline=None)
def test_every_example_with_a_length_stands_in_one_batch(seed: int, parts: int, budget: int):
    lengths = _lengths(seed, parts)
    windows = _plan(lengths, seed=seed, budget=budget)
    found = sorted(place for window in windows for place in _members(window, lengths))
    wanted = [(p, r) for p in range(parts) for r in range(50) if lengths[p][r] > 0]
    assert found == wanted
    assert all(len(window.parts) <= WINDOW for window in windows)


@given(st.integers(0, 2**32), st.integers(60, 500))
@settings(max_examples=30, deadline=None)
def test_batches_stay_within_the_budget_padding_included(seed: int, budget: int):
    lengths = _lengths(seed, 3)
    for window in _plan(lengths, budget=budget):
        joined = np.concatenate([lengths[part] for part in window.parts])
        assert all(joined[batch].max() * len(batch) <= budget for batch in window.batches)


def test_an_example_above_the_budget_is_a_batch_of_its_own():
    lengths = [np.array([5, 300, 5], dtype=np.int32)]
    (window,) = _plan(lengths, budget=100)
    assert sorted(sorted(batch.tolist()) for batch in window.batches) == [[0, 2], [1]]


def test_little_of_a_batch_is_padding():
    random = np.random.default_rng(0)
    lengths = [random.lognormal(4, 1, 5000).astype(np.int32) + 1 for _ in range(4)]
    padded = 0
    for window in _plan(lengths, budget=8192):
        joined = np.concatenate([lengths[part] for part in window.parts])
        padded += sum(int(joined[batch].max()) * len(batch) for batch in window.batches)
    assert sum(int(part.sum()) for part in lengths) / padded > 0.9


def test_seed_and_epoch_decide_the_order_and_nothing_else_does():
    lengths = _lengths(1, 20)

    def order(seed: int, epoch: int) -> list[list[tuple[int, int]]]:
        return [_members(window, lengths) for window in _plan(lengths, seed=seed, epoch=epoch)]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_long_and_short_batches_are_mixed_within_an_epoch():
    lengths = [np.arange(1, 2001, dtype=np.int32)]
    (window,) = _plan(lengths, budget=4000)
    means = [float(lengths[0][batch].mean()) for batch in window.batches]
    assert abs(float(np.corrcoef(np.arange(len(means)), means)[0, 1])) < 0.3


def test_a_schedule_counts_what_the_epochs_hold():
    lengths = _lengths(2, 5)
    schedule = plan_epochs(lengths, seed=3, batch_tokens=128, epochs=2.0, save_every_epochs=1.0)
    counts = [
        sum(len(window.batches) for window in _plan(lengths, seed=3, epoch=epoch))
        for epoch in (0, 1)
    ]
    assert schedule.epoch_steps == tuple(counts)
    assert schedule.save_steps == {counts[0], sum(counts)}
    assert schedule.place(counts[0] - 1) == (0, counts[0] - 1)
    assert schedule.place(counts[0]) == (1, 0)
    assert schedule.progress(sum(counts)) == 2.0


def test_half_epochs_and_a_limit_of_steps():
    lengths = [np.full(100, 10, dtype=np.int32)]  # ten batches of ten examples
    half = plan_epochs(lengths, seed=0, batch_tokens=100, epochs=1.5, save_every_epochs=0.5)
    assert half.epoch_steps == (10, 5)
    assert half.save_steps == {5, 10, 15}
    assert half.progress(15) == 1.5
    fine = plan_epochs(lengths, seed=0, batch_tokens=100, epochs=1.0, save_every_epochs=0.1)
    assert fine.save_steps == set(range(1, 11))
    short = plan_epochs(
        lengths, seed=0, batch_tokens=100, epochs=3.0, save_every_epochs=1.0, max_steps=12
    )
    assert short.epoch_steps == (10, 2)
    assert short.save_steps == {10, 12}
    assert short.progress(12) == pytest.approx(1.2)


def test_nothing_to_train_on_is_no_step():
    lengths = [np.zeros(5, dtype=np.int32)]
    schedule = plan_epochs(lengths, seed=0, batch_tokens=100, epochs=2.0, save_every_epochs=1.0)
    assert schedule.total_steps == 0
    assert not schedule.save_steps
