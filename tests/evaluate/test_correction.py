"""Holm's correction against the closure principle, published figures and simulation."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special

from curate.evaluate.correction import holm

_p = st.floats(0, 1)


def _by_closure(p_values: list[float], weights: list[float]) -> list[float]:
    """A hypothesis falls when each intersection that holds it falls by weighted Bonferroni."""
    adjusted: list[float] = []
    everything = range(len(p_values))
    for index in everything:
        worst = 0.0
        for size in range(1, len(p_values) + 1):
            for group in itertools.combinations(everything, size):
                if index in group:
                    total = sum(weights[member] for member in group)
                    smallest = min(p_values[m] * total / weights[m] for m in group)
                    worst = max(worst, min(1.0, smallest))
        adjusted.append(worst)
    return adjusted


@given(st.lists(st.tuples(_p, st.floats(0.1, 5)), max_size=5))
def test_is_the_closed_test(pairs: list[tuple[float, float]]):
    p_values, weights = [p for p, _ in pairs], [w for _, w in pairs]
    assert holm(p_values, weights) == pytest.approx(_by_closure(p_values, weights))
    assert holm(p_values) == pytest.approx(_by_closure(p_values, [1.0] * len(p_values)))


def test_small_case_by_hand():
    """4 * 0.005, 3 * 0.01, 2 * 0.03, and 1 * 0.04 raised to the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(_p, min_size=1, max_size=8))
def test_lies_between_the_raw_value_and_bonferroni(p_values: list[float]):
    for raw, adjusted in zip(p_values, holm(p_values), strict=True):
        assert raw <= adjusted <= min(1.0, raw * len(p_values)) + 1e-12


def test_any_error_among_correlated_arms_stays_at_five_percent():
    """Five null arms, all against one random: the differences share its noise."""
    generator = np.random.default_rng(0)
    wrong, cases = 0, 3000
    for _ in range(cases):
        random = generator.normal(size=5)
        arms = generator.normal(size=(5, 5)) - random
        statistics = arms.mean(1) / (arms.std(1, ddof=1) / np.sqrt(5))
        p_values = (2 * special.stdtr(4, -np.abs(statistics))).tolist()
        wrong += min(holm(p_values, [4.0, 1.0, 1.0, 1.0, 1.0])) <= 0.05
    assert wrong / cases < 0.06
