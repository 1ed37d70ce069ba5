import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.errors import CurateError
from curate.plan.weights import (
    WeightSums,
    check_effective_share,
    effective_size,
    relative_weights,
)


def test_values_are_taken_relative_to_the_mean_and_clipped():
    values = np.array([0.0, 1.0, 1.0, 2.0, 96.0, -5.0, np.nan])
    found = relative_weights(values, mean=20.0, clip=(0.1, 2.0))
    assert found.tolist() == pytest.approx([0.1, 0.1, 0.1, 0.1, 2.0, 0.1, 1.0])


def test_equal_weights_are_worth_their_number_and_one_heavy_one_is_worth_one():
    assert effective_size(5.0, 5.0) == 5
    weights = np.array([1e9, 1.0, 1.0])
    assert effective_size(weights.sum(), (weights**2).sum()) == pytest.approx(1)
    assert effective_size(0.0, 0.0) == 0


@given(
    st.lists(st.tuples(st.floats(0.01, 10), st.integers(0, 4)), min_size=1, max_size=30),
    st.integers(1, 7),
)
def test_streamed_sums_are_those_of_all_rows_at_once(pairs: list[tuple[float, int]], size: int):
    weight, copies = np.array([w for w, _ in pairs]), np.array([c for _, c in pairs])
    sums = WeightSums()
    for start in range(0, len(pairs), size):
        part = slice(start, start + size)
        sums.add(weight[part], copies[part])
    each = np.repeat(weight, copies)
    assert sums.copies == len(each)
    assert sums.rows == (copies > 0).sum()
    if len(each):
        assert sums.mean == pytest.approx(each.mean())
        assert (sums.low, sums.high) == (each.min(), each.max())
        assert 0 < sums.effective_share <= 1 + 1e-12


def test_rows_without_a_value_are_counted_apart():
    sums = WeightSums()
    sums.add(np.array([1.0, np.nan, np.nan]), np.array([1, 1, 0]))
    assert (sums.rows, sums.copies, sums.without) == (1, 1, 1)


def test_a_collapse_is_refused_with_its_numbers():
    sums = WeightSums(rows=1000, copies=1000, total=1000.0, square=1e6)
    with pytest.raises(CurateError) as caught:
        check_effective_share(sums, least=0.1, force=False)
    assert "1 effective examples of 1,000 kept, 0.1 %" in caught.value.what
    check_effective_share(sums, least=0.1, force=True)
    check_effective_share(sums, least=0.001, force=False)
