"""Core sets: equal chances, fair shares of strata, the median distance."""

import numpy as np
import pytest

from curate.vectors.coreset import evenly, group_distances, near_median, shares, strata_order
from curate.vectors.store import Vectors


def bits(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**63, size=count, dtype=np.uint64)


def test_every_row_is_chosen_as_often_as_any_other():
    order = np.random.default_rng(0).permutation(30)
    starts = np.linspace(0, 2**32, 3000, endpoint=False).astype(np.int64)
    counts = np.zeros(30)
    for start in starts:
        counts[evenly(order, 7, start=int(start))] += 1
    np.testing.assert_allclose(counts, 3000 * 7 / 30, atol=2)


@pytest.mark.parametrize("size", [1, 7, 29, 30])
def test_a_core_set_has_its_size_and_no_row_twice(size: int):
    for start in (0, 1, 2**32 - 1):
        chosen = evenly(np.arange(30)[::-1].copy(), size, start=start)
        assert len(np.unique(chosen)) == size
        assert chosen.min() >= 0
        assert chosen.max() < 30
        assert (np.diff(chosen) > 0).all()


def test_each_stratum_gets_its_share_but_for_one_row():
    groups = np.repeat([0, 1, 2], [500, 300, 200])
    lengths = np.random.default_rng(1).integers(1, 1000, size=1000)
    order = strata_order(groups, lengths, bits(1000))
    chosen = evenly(order, 100, start=12345)
    quintile = np.searchsorted(np.quantile(lengths, [0.2, 0.4, 0.6, 0.8]), lengths, side="right")
    for group in range(3):
        for place in range(5):
            mine = (groups == group) & (quintile == place)
            assert abs(mine[chosen].sum() - mine.sum() / 10) < 2


def test_order_within_a_stratum_is_random():
    order = strata_order(np.zeros(100, dtype=np.int64), np.full(100, 7), bits(100))
    assert order.tolist() == np.argsort(bits(100)).tolist()
    assert order.tolist() != sorted(order.tolist())


def test_shares_sum_up_and_the_largest_remainders_are_rounded_up():
    assert shares([50, 30, 20], 7) == [4, 2, 1]
    assert shares([1, 1, 1], 2) == [1, 1, 0]
    assert shares([3, 0, 5], 8) == [3, 0, 5]
    # 13 of 100: 0.91, 3.9 and 8.19.
    assert shares([7, 30, 63], 13) == [1, 4, 8]


def test_of_each_group_those_nearest_the_median_are_taken():
    distances = np.array([0.0, 1.0, 2.0, 3.0, 100.0, 10.0, 20.0, 30.0, 40.0, 50.0])
    groups = np.array([0] * 5 + [1] * 5)
    assert near_median(groups, distances, bits(10), 2).tolist() == [2, 7]
    assert near_median(groups, distances, bits(10), 10).tolist() == list(range(10))
    # Outliers are never among them: the reason this choice suits no search for wrong labels.
    assert 4 not in near_median(groups, distances, bits(10), 8).tolist()


def test_distances_are_those_from_the_mean_of_the_group():
    draw = np.random.default_rng(2)
    rows = draw.normal(size=(40, 3)).astype(np.float32)
    rows[5] = np.nan
    groups = draw.integers(0, 3, size=40)
    found = group_distances(Vectors([rows[:15], rows[15:]]), groups)
    assert np.isnan(found[5])
    for row in (i for i in range(40) if i != 5):
        mine = [rows[i].astype(float) for i in range(40) if groups[i] == groups[row] and i != 5]
        wanted = np.sqrt(sum((rows[row] - np.mean(mine, axis=0)) ** 2))
        assert found[row] == pytest.approx(wanted, rel=1e-6)
