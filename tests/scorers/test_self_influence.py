"""Self-influence: rates of checkpoints, the line of lengths, options."""

from typing import Any

import numpy as np
import pytest

from curate.errors import ConfigError
from scorers.catalog import build_scorer
from scorers.self_influence import Line, Moments, fitted, interval_rates


def moments_of(values: np.ndarray, lengths: np.ndarray) -> Moments:
    return Moments().plus(values, lengths)


def test_the_line_is_that_of_least_squares():
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 200, 500).astype(np.float64)
    values = np.exp(0.3 + 1.4 * np.log(lengths) + draw.normal(size=500))
    slope, intercept = np.polyfit(np.log(lengths), np.log(values), 1)
    found = fitted(moments_of(values, lengths))
    np.testing.assert_allclose(found, (intercept, slope), rtol=1e-9)
    rest = found.residuals(values, lengths)
    assert abs(rest.mean()) < 1e-9
    assert abs(np.corrcoef(rest, np.log(lengths))[0, 1]) < 1e-9


def test_parts_give_the_line_of_the_whole():
    draw = np.random.default_rng(1)
    lengths, values = draw.integers(1, 90, 60).astype(np.float64), draw.random(60) + 0.1
    parts = Moments().plus(values[:17], lengths[:17]).plus(values[17:], lengths[17:])
    np.testing.assert_allclose(fitted(parts), fitted(moments_of(values, lengths)), rtol=1e-12)


def test_equal_lengths_leave_the_distance_from_the_mean_logarithm():
    values = np.array([1.0, np.e, np.e**2])
    line = fitted(moments_of(values, np.full(3, 7.0)))
    assert line.slope == 0
    np.testing.assert_allclose(line.residuals(values, np.full(3, 7.0)), [-1, 0, 1], atol=1e-12)


def test_unscored_and_silent_examples_do_not_move_the_line():
    values, lengths = np.array([1.0, 2.0, np.nan, 0.0]), np.array([1.0, 2.0, 3.0, 4.0])
    assert moments_of(values, lengths) == moments_of(values[:2], lengths[:2])
    rest = fitted(moments_of(values, lengths)).residuals(values, lengths)
    assert np.isnan(rest[2])
    assert np.isfinite(rest[3])
    assert rest[3] < -60
    assert fitted(Moments()) == Line(0, 0)


@pytest.mark.parametrize(
    ("rates", "wanted"),
    [
        ([0.4, 0.2, 0.0], [0.4, 0.3, 0.1]),
        ([0.1], [0.1]),
        ([None, 0.1], [1, 1]),
        ([0.0], [1]),
        ([float("nan"), 0.1], [1, 1]),
    ],
)
def test_a_checkpoint_counts_with_the_mean_rate_of_its_interval(rates: Any, wanted: list[float]):
    np.testing.assert_allclose(interval_rates(rates), wanted)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"damping": 0}, "damping is 0"),
        ({"fit_examples": 0}, "fit_examples is 0"),
        ({"groups": 0}, "groups is 0"),
        ({"parameters": "("}, "no regular"),
        ({"metric": "hessian"}, "metric"),
    ],
)
def test_options_without_a_meaning_are_refused(options: dict[str, Any], says: str):
    with pytest.raises(ConfigError, match=says):
        build_scorer("self_influence", options)
