"""Weights of given ratios: clipping, mean, effective size, and support of the target."""

import numpy as np
import pytest

from curate.errors import ConfigError
from scorers.density_ratio import DensityRatio, is_supported, scale_of, weights_of


def test_weights_are_clipped_ratios_of_mean_one():
    ratios = np.random.default_rng(0).lognormal(sigma=1.5, size=1000)
    scale = scale_of(np.log(ratios), clip=0.99)
    cut = sorted(ratios)[989]  # at most 10 of 1,000 are larger
    clipped = np.array([min(r, cut) for r in ratios])
    expected = clipped / clipped.mean()
    found = weights_of(np.log(ratios), scale)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found.mean() == pytest.approx(1)
    assert scale.effective == pytest.approx(sum(expected) ** 2 / sum(expected**2))


def test_equal_ratios_weigh_one_and_all_are_effective():
    scale = scale_of(np.full(50, 3.0), clip=0.99)
    np.testing.assert_allclose(weights_of(np.full(50, 3.0), scale), 1)
    assert scale.effective == pytest.approx(50)


def test_one_example_carries_all_and_huge_ratios_stay_finite():
    ratios = np.array([0.0] * 99 + [2000.0])
    scale = scale_of(ratios, clip=1.0)
    found = weights_of(ratios, scale)
    assert scale.effective == pytest.approx(1)
    assert found[-1] == pytest.approx(100)
    assert np.isfinite(found).all()
    assert scale_of(ratios, clip=0.99).effective == pytest.approx(100)
    assert np.isnan(weights_of(np.array([np.nan]), scale)).all()


def test_a_target_example_beyond_the_whole_pool_has_no_support():
    pool = np.array([-1.0, 2.0, 0.5])
    assert is_supported(np.array([2.0, 2.1, -9.0]), pool).tolist() == [True, False, True]


@pytest.mark.parametrize(
    "options", [{"folds": 1}, {"clip": 0.0}, {"clip": 1.1}, {"penalty": 0.0}, {"fit_rows": 0}]
)
def test_options_without_a_meaning_are_refused(options: dict[str, object]):
    with pytest.raises(ConfigError):
        DensityRatio(**options)  # pyright: ignore[reportArgumentType]
