"""The linear datamodeling score and the area under the curve, against scipy and closed forms."""

import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from curate.evaluate.attribution import (
    Floats,
    auc_interval,
    ceiling,
    corrected,
    halves_agreement,
    mean_over_queries,
    one_query,
    predictions,
    rank_agreement,
)


def normal(*shape: int, seed: int = 0, digits: int = 9) -> Floats:
    return np.random.default_rng(seed).normal(size=shape).round(digits).astype(np.float64)


def spearman(one: Floats, two: Floats) -> float:
    found: Any = stats.spearmanr(one, two)
    return float(found[0])


def pairs_of_four() -> np.ndarray:
    members = np.zeros((6, 4), dtype=np.bool_)
    for row, pair in enumerate(combinations(range(4), 2)):
        members[row, list(pair)] = True
    return members


def test_six_pairs_of_four_examples_give_the_known_score():
    tau = np.array([[0.5], [-0.2], [0.1], [0.4]])
    outputs = np.array([[0.2], [0.5], [0.9], [0.1], [0.3], [0.4]])
    predicted = predictions(tau, pairs_of_four())
    np.testing.assert_allclose(predicted[:, 0], [0.3, 0.6, 0.9, -0.1, 0.2, 0.5])
    assert rank_agreement(predicted, outputs)[0] == pytest.approx(0.942857, abs=1e-6)
    assert one_query(predicted[:, 0], outputs[:, 0]).value == pytest.approx(33 / 35)


def test_ranks_agree_with_scipy_ties_too():
    one, two = normal(30, 7, digits=1), normal(30, 7, seed=1, digits=0)
    expected = [spearman(one[:, q], two[:, q]) for q in range(7)]
    np.testing.assert_allclose(rank_agreement(one, two), expected, atol=1e-12)


def test_outputs_that_are_additive_are_foretold_exactly():
    tau, members = normal(40, 5), np.random.default_rng(2).random((25, 40)) < 0.5
    outputs = np.stack([tau[own].sum(0) for own in members])
    np.testing.assert_allclose(rank_agreement(predictions(tau, members), outputs), 1)
    np.testing.assert_allclose(rank_agreement(predictions(-tau, members), outputs), -1)


@given(st.floats(0.01, 100), st.floats(-100, 100))
def test_neither_scale_nor_offset_of_an_output_matters(scale: float, offset: float):
    one, two = normal(12, 3), normal(12, 3, seed=4)
    np.testing.assert_allclose(rank_agreement(one, scale * two + offset), rank_agreement(one, two))


def test_a_constant_prediction_counts_nothing_and_a_constant_output_cannot_judge():
    varied, constant = normal(8, 1), np.full((8, 1), 0.3)
    assert rank_agreement(constant, varied)[0] == 0
    assert math.isnan(rank_agreement(varied, constant)[0])
    mean = mean_over_queries(np.array([0.5, math.nan, 0.7]))
    assert (mean.value, mean.num) == (pytest.approx(0.6), 2)
    assert mean_over_queries(np.array([math.nan])).num == 0


def test_subsets_whose_model_diverged_are_left_out():
    one, two = normal(20, 2), normal(20, 2, seed=1)
    broken = two.copy()
    broken[[3, 7], 1] = [math.nan, math.inf]
    kept = np.setdiff1d(np.arange(20), [3, 7])
    found = rank_agreement(one, broken)
    assert found[0] == pytest.approx(spearman(one[:, 0], two[:, 0]))
    assert found[1] == pytest.approx(spearman(one[kept, 1], two[kept, 1]))
    broken[2:] = math.nan
    assert np.isnan(rank_agreement(one, broken)).all()  # two subsets have no order to speak of


def test_scores_that_are_missing_count_as_nothing():
    tau = np.array([[1.0], [math.nan], [2.0], [math.inf]])
    np.testing.assert_array_equal(predictions(tau, pairs_of_four())[:, 0], [1, 3, 1, 2, 0, 2])


def test_sums_over_parts_of_the_examples_add_up():
    tau, members = normal(30, 4), np.random.default_rng(0).random((9, 30)) < 0.5
    parts = predictions(tau[:11], members[:, :11]) + predictions(tau[11:], members[:, 11:])
    np.testing.assert_allclose(parts, predictions(tau, members))


def test_the_interval_holds_the_mean_of_a_normal_sample_as_often_as_it_says():
    inside = 0
    for seed in range(200):
        mean = mean_over_queries(normal(40, seed=seed) + 0.3, seed=seed)
        inside += mean.low <= 0.3 <= mean.high
    assert 0.88 <= inside / 200 <= 0.99


def test_an_interval_depends_on_the_seed_and_on_nothing_else():
    values = normal(30)
    assert mean_over_queries(values, seed=1) == mean_over_queries(values, seed=1)
    assert mean_over_queries(values, seed=1) != mean_over_queries(values, seed=2)


def test_the_ceiling_of_two_models_is_corrected_from_halves():
    """Outputs are signal plus noise of equal variance: halves of two correlate 2/3, fours 4/5."""
    signal = normal(400, 60)
    outputs = [signal + normal(400, 60, seed=seed) for seed in range(1, 5)]
    rho, times = halves_agreement(outputs)
    assert times == 2
    assert np.mean(rho) == pytest.approx(2 / 3, abs=0.03)
    assert ceiling(outputs).value == pytest.approx(4 / 5, abs=0.02)
    assert halves_agreement(outputs[:3])[1] == 3  # halves of one, corrected to three
    with pytest.raises(ValueError, match="two models"):
        halves_agreement(outputs[:1])


def test_the_correction_is_that_of_spearman_and_brown():
    np.testing.assert_allclose(corrected(np.array([0.5, 1.0, 0.0, -0.2]), 2), [2 / 3, 1, 0, 0])
    assert corrected(np.array([0.3]), 1)[0] == 0.3


def test_a_perfect_prediction_reaches_the_root_of_the_ceiling():
    signal = normal(500, 40)
    outputs = [signal + normal(500, 40, seed=seed) for seed in (1, 2)]
    reached = mean_over_queries(rank_agreement(signal, np.mean(outputs, axis=0))).value
    assert reached == pytest.approx(math.sqrt(ceiling(outputs).value), abs=0.02)


def test_the_area_is_that_of_all_pairs_ties_counted_half():
    scores, wrong = normal(80, digits=1), np.random.default_rng(3).random(80) < 0.3
    wins = [float(a > b) + 0.5 * (a == b) for a in scores[wrong] for b in scores[~wrong]]
    found, left_out = auc_interval(scores, wrong, draws=50)
    assert found.value == pytest.approx(np.mean(wins))
    u: Any = stats.mannwhitneyu(scores[wrong], scores[~wrong])
    assert found.value == pytest.approx(u[0] / (wrong.sum() * (~wrong).sum()))
    assert left_out == 0


def test_the_interval_of_the_area_is_as_wide_as_that_of_hanley_and_mcneil():
    """Two normals one apart: area 0.760, standard error by their formula."""
    scores = np.concatenate([normal(150) + 1, normal(400, seed=1)])
    wrong = np.arange(550) < 150
    found, _ = auc_interval(scores, wrong)
    area = found.value
    one, two = area / (2 - area), 2 * area**2 / (1 + area)
    squares = area * (1 - area) + 149 * (one - area**2) + 399 * (two - area**2)
    assert found.high - found.low == pytest.approx(
        2 * 1.96 * math.sqrt(squares / 150 / 400), rel=0.15
    )
    assert found.low < found.value < found.high


def test_an_area_without_one_of_the_kinds_is_refused():
    scores = np.array([0.1, 0.2, math.nan])
    with pytest.raises(ValueError, match="positive and negative"):
        auc_interval(scores, np.array([False, False, True]))
    found, left_out = auc_interval(scores, np.array([False, True, True]), draws=10)
    assert (found.value, left_out) == (1.0, 1)
