"""Every arm's steps come to the same number of tokens, whatever its examples look like."""

import numpy as np
import pytest

from curate.models.epochs import epoch_windows
from jobs.compare_budget import Budget, Rows, fit, tiled_rows


def _trained(lengths: list[np.ndarray], seed: int, steps: int, size: int) -> int:
    """Tokens of the first steps, batch by batch, as training takes them."""
    tokens, taken, epoch = 0, 0, 0
    while taken < steps:
        for window in epoch_windows(lengths, seed=seed, epoch=epoch, batch_tokens=size):
            joined = np.concatenate([lengths[part] for part in window.parts])
            for batch in window.batches[: steps - taken]:
                tokens, taken = tokens + int(joined[batch].sum()), taken + 1
        epoch += 1
    return tokens


@pytest.mark.parametrize("rows", [24, 135, 271, 475, 1357])
@pytest.mark.parametrize("seed", [0, 1])
def test_tables_of_any_size_come_within_two_percent(rows: int, seed: int):
    """135 rows make three batches of 45 or two of 68, and 59 a step are asked for."""
    lengths = [np.ones(rows, dtype=np.int32)]
    budget = Budget(400, 23_750)
    found = fit(lengths, seed, budget, 64)
    tiled = [np.tile(lengths[0], found.together)]
    assert _trained(tiled, seed, 400, found.batch_tokens) == pytest.approx(budget.tokens, rel=0.02)


@pytest.mark.parametrize(("low", "high"), [(5, 40), (200, 256), (10, 256)])
def test_texts_of_any_length_come_within_two_percent(low: int, high: int):
    generator = np.random.default_rng(1)
    lengths = [generator.integers(low, high, size=700).astype(np.int32) for _ in range(3)]
    budget = Budget(60, 60 * 1800)
    found = fit(lengths, 5, budget, 2048)
    tiled = [np.tile(each, found.together) for each in lengths]
    assert _trained(tiled, 5, 60, found.batch_tokens) == pytest.approx(budget.tokens, rel=0.02)


def test_a_set_that_fits_is_shuffled_pass_by_pass():
    lengths = [np.ones(1000, dtype=np.int32)]
    assert fit(lengths, 0, Budget(100, 5000), 50).together == 1


def test_rows_are_repeated_with_their_weights():
    rows = Rows(np.array([0, 2, 2]), np.array([5, 7, 7], dtype=np.int32),
                np.array([0.5, 2.0, 2.0], dtype=np.float32))  # fmt: skip
    (twice,) = tiled_rows([rows], 2)
    assert twice.positions.tolist() == [0, 2, 2, 0, 2, 2]
    assert twice.lengths.tolist() == [5, 7, 7, 5, 7, 7]
    assert twice.weights.tolist() == [0.5, 2.0, 2.0, 0.5, 2.0, 2.0]
