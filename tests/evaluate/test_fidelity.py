"""Fidelity: agreement that is known by counting, folds, what chance gives."""

import numpy as np
import pytest

from curate.evaluate.fidelity import chance_level, fidelity, fold_numbers, out_of_fold


def test_figures_of_twenty_examples_by_counting():
    measured = np.arange(20.0)
    estimated = measured.copy()
    estimated[[0, 19]] = estimated[[19, 0]]
    found = fidelity(measured, estimated)
    # 1 - 6 sum d^2 / (n (n^2 - 1)) with two differences of 19; of the highest two, one is found.
    assert found.rank_correlation == pytest.approx(1 - 6 * 2 * 19**2 / (20 * 399))
    assert found.top_recall == 0.5
    assert fidelity(measured, measured) == (1.0, 1.0)
    assert fidelity(measured, -measured).top_recall == 0.0


def test_constants_agree_with_nothing():
    assert fidelity(np.ones(30), np.arange(30.0)).rank_correlation == 0.0
    assert fidelity(np.arange(30.0), np.ones(30)).rank_correlation == 0.0


@pytest.mark.parametrize("num", [20, 200])
def test_one_in_twenty_unrelated_pairs_exceeds_the_level_of_chance(num: int):
    draw = np.random.default_rng(0)
    found = [
        fidelity(draw.normal(size=num), draw.normal(size=num)).rank_correlation for _ in range(2000)
    ]
    assert np.mean(np.array(found) > chance_level(num)) == pytest.approx(0.05, abs=0.015)


def test_folds_are_equal_but_for_one_and_random():
    bits = np.random.default_rng(0).integers(0, 2**63, size=23, dtype=np.uint64)
    folds = fold_numbers(bits, 5)
    assert sorted(np.bincount(folds).tolist()) == [4, 4, 5, 5, 5]
    assert folds.tolist() != (np.arange(23) % 5).tolist()


def test_no_example_is_estimated_from_its_own_fold():
    folds = np.array([0, 1, 2, 0, 1, 2, 0])
    seen: dict[int, set[int]] = {}

    def estimate(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        for row in wanted.tolist():
            seen[row] = set(known.tolist())
        return wanted[:, None] * 10.0

    found = out_of_fold(folds, estimate)
    np.testing.assert_array_equal(found[:, 0], np.arange(7) * 10.0)
    for row, known in seen.items():
        assert known == {other for other in range(7) if folds[other] != folds[row]}
