"""Ratios of known densities, folds and calibration."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from curate.models.density import ALL_FOLDS, Folds, calibration, draws, fit_ratio


def samples(
    num_pool: int, num_target: int, shift: np.ndarray, *, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Standard normal rows, some of them shifted; which are; folds."""
    draw = np.random.default_rng(seed)
    rows = draw.normal(size=(num_pool + num_target, len(shift)))
    is_target = np.arange(len(rows)) >= num_pool
    rows[is_target] += shift
    return rows, is_target, draw.integers(0, 5, len(rows))


def test_two_gaussians_have_the_ratio_that_is_known():
    """log N(x; m, 1) / N(x; 0, 1) = m x - |m|^2 / 2."""
    shift = np.array([1.0, -0.5])
    rows, is_target, folds = samples(6000, 2000, shift, seed=0)
    models, found = fit_ratio(rows, is_target, folds, num_folds=5, penalty=1.0)
    truth = rows @ shift - shift @ shift / 2
    assert np.abs(found - truth).max() < 0.35
    assert np.sqrt(np.mean((found - truth) ** 2)) < 0.1
    # The mean of the ratio over the pool is 1, and weighted by it the pool's mean is the target's.
    weights = np.exp(found[~is_target])
    assert weights.mean() == pytest.approx(1, abs=0.1)
    np.testing.assert_allclose(
        np.average(rows[~is_target], axis=0, weights=weights), shift, atol=0.15
    )
    np.testing.assert_allclose(models.log_ratios(rows, folds), found)


@pytest.mark.parametrize("dims", [2, 60])
def test_equal_samples_have_a_ratio_near_one(dims: int):
    rows, is_target, folds = samples(1500, 500, np.zeros(dims), seed=1)
    _, found = fit_ratio(rows, is_target, folds, num_folds=5, penalty=0.1)
    assert np.abs(np.exp(found) - 1).mean() < 0.1


def test_what_a_model_has_learned_by_heart_does_not_show():
    """More features than examples: each model tells its own examples apart perfectly."""
    rows, is_target, folds = samples(150, 150, np.zeros(600), seed=2)
    models, found = fit_ratio(rows, is_target, folds, num_folds=5, penalty=1e-3)
    by_others = models.raw(rows, (folds + 1) % 5)
    assert (by_others[is_target].mean() - by_others[~is_target].mean()) > 2
    assert np.abs(np.exp(found) - 1).mean() < 0.35


def test_each_example_is_judged_by_its_fold_and_held_out_ones_by_all():
    rows, is_target, folds = samples(300, 100, np.array([1.0, 0.0, 0.0]), seed=3)
    models, found = fit_ratio(rows, is_target, folds, num_folds=5, penalty=1.0)
    for fold in range(5):
        own = LogisticRegression(C=1.0, max_iter=1000, tol=1e-8)
        rest = folds != fold
        own.fit(rows[rest], is_target[rest])
        raw = own.decision_function(rows[~rest])
        raw -= np.log(is_target[rest].sum() / (~is_target[rest]).sum())
        expected = models.line.slope * raw + models.line.offset
        np.testing.assert_allclose(found[~rest], expected, atol=2e-3)
    whole = models.log_ratios(rows, np.full(400, ALL_FOLDS))
    each = [models.log_ratios(rows, np.full(400, fold)) for fold in range(5)]
    np.testing.assert_allclose(whole, np.mean(each, axis=0), atol=1e-12)


def test_calibration_is_the_most_likely_line():
    """Against scikit-learn, which knows soft targets as two weighted copies of each example."""
    draw = np.random.default_rng(4)
    is_target = np.arange(500) >= 400
    scores = 3 * (draw.normal(size=500) + 0.8 * is_target) + 5
    line = calibration(scores, is_target)
    aim = np.where(is_target, 101 / 102, 1 / 402)
    model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000)
    model.fit(
        np.concatenate([scores, scores])[:, None],
        np.repeat([1, 0], 500),
        sample_weight=np.concatenate([aim, 1 - aim]),
    )
    assert line.slope == pytest.approx(np.asarray(model.coef_)[0, 0], rel=1e-4)
    expected = float(np.asarray(model.intercept_)[0]) - np.log(100 / 400)
    assert line.offset == pytest.approx(expected, rel=1e-3)


def test_calibration_of_what_tells_nothing_is_flat_and_of_what_tells_all_finite():
    is_target = np.arange(40) >= 20
    assert calibration(np.zeros(40), is_target) == (0, 0)
    assert calibration(np.where(is_target, -1.0, 1.0), is_target) == (0, 0)  # the wrong way round
    sure = calibration(np.where(is_target, 50.0, -50.0), is_target)
    assert sure.slope * 50 + sure.offset == pytest.approx(np.log(21 / 1), rel=0.01)


def test_copies_share_a_fold_and_the_targets_folds_are_even():
    contents = draws(np.arange(1000, dtype=np.uint64), 9)
    folds = Folds.of_target(np.repeat(contents[:23], 3), num_folds=5, seed=1)
    assert sorted(np.bincount(folds.folds, minlength=5).tolist()) == [4, 4, 5, 5, 5]
    is_train = np.ones(1000, dtype=bool)
    is_train[:500:2] = False
    found = folds.of(contents, is_train)
    by_content = dict(zip(folds.contents.tolist(), folds.folds.tolist(), strict=True))
    assert [by_content[c] for c in contents[:23].tolist()] == found[:23].tolist()
    assert (found[24:500:2] == ALL_FOLDS).all()
    assert np.bincount(found[500:], minlength=5).min() > 70
    order = np.random.default_rng(0).permutation(1000)
    np.testing.assert_array_equal(folds.of(contents[order], is_train[order]), found[order])
    other = Folds.of_target(contents[:23], num_folds=5, seed=2).of(contents, is_train)
    assert (other != found).mean() > 0.4
