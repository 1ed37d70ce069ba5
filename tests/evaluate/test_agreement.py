"""Rank correlation, AUC and effective sample size against scipy, scikit-learn and by hand."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from curate.evaluate.agreement import (
    effective_sample_size,
    rank_correlation,
    rank_correlations,
    roc_auc,
)

_tied = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=3, max_size=30)


@given(_tied)
def test_rank_correlation_is_the_correlation_of_scipy_s_ranks(pairs: list[tuple[int, int]]):
    left, right = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    if len(set(left)) == 1 or len(set(right)) == 1:
        return
    expected = stats.pearsonr(stats.rankdata(left), stats.rankdata(right))[0]
    assert rank_correlation(left, right) == pytest.approx(expected, abs=1e-12)


def test_correlations_of_many_columns_are_scipy_s_of_each_pair_over_the_rows_both_have():
    random = np.random.default_rng(0)
    columns = random.integers(0, 6, (200, 4)).astype(float)
    columns[:, 1] += columns[:, 0]
    columns[random.random(200) < 0.3, 2] = np.nan
    columns[:, 3] = 5.0
    found = rank_correlations(columns)
    for left, right in [(0, 0), (0, 1), (0, 2), (1, 2), (2, 2)]:
        both = np.isfinite(columns[:, [left, right]]).all(axis=1)
        result: Any = stats.spearmanr(columns[both, left], columns[both, right])
        expected = result.statistic
        assert found[left, right] == found[right, left] == pytest.approx(expected, abs=1e-12)
    assert np.isnan(found[3]).all()  # a constant has no order
    assert np.isnan(rank_correlations(columns[:2])).all()


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30))
def test_the_area_is_the_share_of_pairs_in_order(pairs: list[tuple[int, bool]]):
    scores, positive = [float(s) for s, _ in pairs], [flag for _, flag in pairs]
    if len(set(positive)) == 1:
        return
    wins = [
        1.0 if high > low else 0.5 if high == low else 0.0
        for high, flag in zip(scores, positive, strict=True)
        for low, other in zip(scores, positive, strict=True)
        if flag and not other
    ]
    assert roc_auc(scores, positive) == pytest.approx(sum(wins) / len(wins))
    assert roc_auc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))


def test_the_effective_size_is_the_count_of_equals_and_one_for_a_single_heavy_one():
    assert effective_sample_size([3.0] * 7) == pytest.approx(7)
    assert effective_sample_size([0, 0, 5.0]) == pytest.approx(1)
    assert effective_sample_size([1.0, 2.0, 3.0]) == pytest.approx(36 / 14)
    assert effective_sample_size([1e-200, 1e-200]) == pytest.approx(2)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (rank_correlation, ([1.0, 2.0], [1.0])),
        (rank_correlation, ([1.0, 1.0], [1.0, 2.0])),
        (rank_correlation, ([1.0, math.nan], [1.0, 2.0])),
        (roc_auc, ([1.0, 2.0], [True, True])),
        (roc_auc, ([1.0], [True, False])),
        (roc_auc, ([math.nan, 1.0], [True, False])),
        (effective_sample_size, ([-1.0, 2.0],)),
        (effective_sample_size, ([0.0, 0.0],)),
        (effective_sample_size, ([math.inf, 1.0],)),
    ],
)
def test_refuses_what_has_no_answer(function: Callable[..., float], arguments: tuple[Any, ...]):
    with pytest.raises(ValueError):
        function(*arguments)
