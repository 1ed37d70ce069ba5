"""Temperature against figures worked out by hand from the formula in the paper's Section 2."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.errors import ConfigError
from curate.plan.mixture import DomainSize
from mixers.temperature import Temperature, tempered_shares

SIZES = {"large": 1e6, "middle": 1e4, "small": 1e2}
DRAWS = 2e6

amounts = st.lists(st.floats(1, 1e12), min_size=1, max_size=8)


def shares(values: list[float], tau: float) -> np.ndarray:
    named = {str(i): value for i, value in enumerate(values)}
    return np.array(list(tempered_shares(named, tau).values()))


def variance_ratio(values: list[float], tau: float) -> float:
    """V: second moment of loss weights over that of sampling, when all gradients are alike."""
    return float(np.sum(shares(values, tau) ** 2 / shares(values, 1.0)))


@pytest.mark.parametrize(
    ("tau", "expected"),
    [
        (1, [0.990001, 0.009900, 0.000099]),
        (2, [0.900901, 0.090090, 0.009009]),
        (3.33, [0.761172, 0.190934, 0.047894]),
        (5, [0.642427, 0.255755, 0.101818]),
        (100, [0.348796, 0.333098, 0.318106]),
    ],
)
def test_shares_of_three_very_unequal_domains(tau: float, expected: list[float]):
    found = tempered_shares(SIZES, tau)
    assert list(found.values()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("tau", "expected"),
    [(1, [1.98, 1.98, 1.98]), (2, [1.80, 18.0, 180]), (5, [1.28, 51.2, 2036])],
)
def test_epochs_in_two_million_draws(tau: float, expected: list[float]):
    found = [tempered_shares(SIZES, tau)[name] * DRAWS / SIZES[name] for name in SIZES]
    assert found == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize(
    ("tau", "expected"),
    [(2, [0.910, 9.10, 91.0]), (3.33, [0.769, 19.3, 484]), (5, [0.649, 25.8, 1028])],
)
def test_loss_weights_that_would_do_the_same(tau: float, expected: list[float]):
    values = list(SIZES.values())
    assert (shares(values, tau) / shares(values, 1)).tolist() == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(("tau", "expected"), [(2, 2.459), (3.33, 27.44), (5, 111.7), (100, 1033)])
def test_variance_ratio_of_three_very_unequal_domains(tau: float, expected: float):
    assert variance_ratio(list(SIZES.values()), tau) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("power", "tau", "expected"),
    [
        (1, 2, 1.162),
        (1, 5, 1.403),
        (1, 100, 1.600),
        (2, 2, 1.806),
        (2, 5, 3.822),
        (2, 100, 5.846),
        (0, 5, 1),
    ],
)
def test_variance_ratio_of_ten_domains_by_a_power_law(power: int, tau: float, expected: float):
    assert variance_ratio([1 / i**power for i in range(1, 11)], tau) == pytest.approx(
        expected, abs=1e-3
    )


def test_ratio_of_two_published_weights_follows_from_their_sizes():
    """mT5's table: 5.67 % against 2.43 % for 2,733 and 162 billion tokens at 3.33."""
    found = tempered_shares({"en": 2733, "sw": 162}, 3.33)
    assert found["en"] / found["sw"] == pytest.approx(5.67 / 2.43, rel=2e-3)


@given(amounts, st.floats(0.1, 100), st.floats(0.01, 1e3))
def test_shares_sum_to_one_and_depend_on_ratios_only(
    values: list[float], tau: float, factor: float
):
    found = shares(values, tau)
    assert found.sum() == pytest.approx(1)
    assert shares([value * factor for value in values], tau) == pytest.approx(found, abs=1e-9)


@given(amounts, st.floats(0.5, 50))
def test_larger_domains_get_more_and_a_higher_temperature_is_flatter(
    values: list[float], tau: float
):
    def entropy(p: np.ndarray) -> float:
        return float(-np.sum(p * np.log(np.maximum(p, 1e-300))))

    found = shares(sorted(values), tau)
    assert np.all(np.diff(found) >= -1e-12)
    assert entropy(shares(values, 2 * tau)) >= entropy(found) - 1e-9


def test_infinite_temperature_is_uniform_and_tiny_ones_do_not_overflow():
    assert shares([1, 10, 1e9], float("inf")).tolist() == pytest.approx([1 / 3] * 3)
    assert shares([1, 10, 1e9], 1e-3).tolist() == pytest.approx([0, 0, 1])


def test_shares_of_examples_become_shares_of_tokens_by_the_mean_length():
    """Equal numbers of examples, of 100 and of 300 tokens: a quarter and three quarters."""
    sizes = {"short": DomainSize(10, 1000), "long": DomainSize(10, 3000)}
    found = Temperature(tau=5, unit="examples").mixture(sizes, budget_tokens=4000)
    assert found.mean() == pytest.approx({"short": 0.25, "long": 0.75})


@pytest.mark.parametrize("tau", [0, -1, float("nan")])
def test_a_temperature_that_is_not_above_zero_is_refused(tau: float):
    with pytest.raises(ConfigError, match="tau is"):
        Temperature(tau=tau)
