"""UniMax against figures worked out by hand and against a water level found by bisection."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.errors import ConfigError
from curate.plan.mixture import DomainSize
from mixers.unimax import UniMax, capped_amounts

SIZES = {
    name: DomainSize(num, num)
    for name, num in {"large": 10**6, "middle": 10**4, "small": 10**2}.items()
}

amounts = st.lists(st.integers(1, 10**9), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("max_epochs", "budget", "weights", "epochs"),
    [
        (1, 3e4, [0.663333, 0.333333, 0.003333], [0.0199, 1, 1]),
        (4, 3e5, [0.865333, 0.133333, 0.001333], [0.2596, 4, 4]),
        (10, 3e4, [0.483333, 0.483333, 0.033333], [0.0145, 1.45, 10]),
        (4, 2e6, [0.979800, 0.020000, 0.000200], [1.96, 4, 4]),
    ],
)
def test_weights_and_epochs_of_three_very_unequal_domains(
    max_epochs: float, budget: float, weights: list[float], epochs: list[float]
):
    found = UniMax(max_epochs=max_epochs).mixture(SIZES, budget_tokens=budget).mean()
    assert list(found.values()) == pytest.approx(weights, abs=1e-6)
    passes = [found[name] * budget / SIZES[name].num_tokens for name in SIZES]
    assert passes == pytest.approx(epochs, rel=5e-3)


@given(amounts, st.floats(0.1, 20), st.floats(1e-3, 30))
def test_amounts_are_one_water_level_under_the_caps(
    values: list[int], max_epochs: float, part: float
):
    budget = part * sum(values)
    named = {str(i): float(value) for i, value in enumerate(values)}
    found = capped_amounts(named, dict.fromkeys(named, 1.0), budget=budget, max_epochs=max_epochs)
    low, high = 0.0, max_epochs * max(values)
    for _ in range(200):
        level = (low + high) / 2
        poured = sum(min(level, max_epochs * value) for value in values)
        low, high = (level, high) if poured < budget else (low, level)
    expected = [min(high, max_epochs * value) for value in values]
    assert list(found.values()) == pytest.approx(expected, rel=1e-6)
    assert sum(found.values()) <= budget * (1 + 1e-9)


@given(amounts, st.floats(0.5, 10))
def test_small_budgets_are_spent_evenly(values: list[int], max_epochs: float):
    budget = len(values) * max_epochs * min(values)
    sizes = {str(i): DomainSize(value, value) for i, value in enumerate(values)}
    found = UniMax(max_epochs=max_epochs).mixture(sizes, budget_tokens=budget).mean()
    assert list(found.values()) == pytest.approx([1 / len(values)] * len(values))


def test_a_budget_beyond_the_limit_is_not_stretched_but_said():
    found = UniMax(max_epochs=2).mixture(SIZES, budget_tokens=1e9)
    assert found.mean() == pytest.approx(
        {"large": 1e6 / 1010100, "middle": 1e4 / 1010100, "small": 1e2 / 1010100}
    )
    assert len(found.notes) == 1
    assert "2 epochs of everything are 2,020,200 tokens" in found.notes[0]
    assert "2 epochs" in found.why["small"]


def test_a_budget_within_the_limit_needs_no_note():
    assert UniMax().mixture(SIZES, budget_tokens=1e6).notes == ()


def test_equal_numbers_of_examples_keep_the_token_budget():
    """Examples of 1 and of 3 tokens: 250 of each make the 1,000 tokens."""
    sizes = {"short": DomainSize(1000, 1000), "long": DomainSize(1000, 3000)}
    found = UniMax(unit="examples").mixture(sizes, budget_tokens=1000)
    assert found.mean() == pytest.approx({"short": 0.25, "long": 0.75})
    capped = UniMax(unit="examples", max_epochs=0.1).mixture(sizes, budget_tokens=1000)
    assert "400 tokens" in capped.notes[0]


def test_a_limit_that_is_not_above_zero_is_refused():
    with pytest.raises(ConfigError, match="max_epochs is 0"):
        UniMax(max_epochs=0)
