"""Sums over groups are whole numbers, however large."""

import numpy as np
import pytest

from curate.plan.groups import add_up


@pytest.mark.parametrize(
    "most",
    [
        10,
        1 << 52,
        (1 << 53) + 1,  # no float has it
        (1 << 58) + 3,
    ],
)
def test_sums_are_those_of_whole_numbers(most: int):
    generator = np.random.default_rng(0)
    sums = np.zeros((2, 5), np.int64)
    expected = [[0] * 5, [0] * 5]
    for rows in (7, 1, 0, 4):
        code = generator.integers(0, 4, rows)  # nothing falls to the last column
        amounts = (most - generator.integers(0, 3, rows), generator.integers(0, 9, rows))
        add_up(sums, code, *amounts)
        for row, amount in enumerate(amounts):
            for column, number in zip(code.tolist(), amount.tolist(), strict=True):
                expected[row][column] += number
    assert sums.tolist() == expected
    assert all(sums[:, 4] == 0)


@pytest.mark.parametrize(
    "amounts", [[1 << 53, 1], [(1 << 53) - 1, 2], [(1 << 53) - 1, 1, 1], [(1 << 53) + 1]]
)
def test_the_first_sum_that_floats_lose_is_exact(amounts: list[int]):
    """2^53 + 1 is the least whole number that no float has."""
    sums = np.zeros((1, 1), np.int64)
    add_up(sums, np.zeros(len(amounts), np.int64), np.array(amounts))
    assert sums.tolist() == [[(1 << 53) + 1]]
