"""Power against scipy's noncentral t, printed tables and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from curate.evaluate.paired import critical, luck_factor
from curate.evaluate.power import detectable_difference, power


@pytest.mark.parametrize("num_seeds", [3, 5, 10, 60])
@pytest.mark.parametrize("level", [0.05, 0.01])
def test_is_the_tail_of_the_noncentral_t(num_seeds: int, level: float):
    freedom, limit = num_seeds - 1, stats.t.isf(level / 2, num_seeds - 1)
    for effect in (2.0, 4.0, 8.0):
        # The other tail is below 4e-4 here, and scipy returns nan for it.
        expected = stats.nct.sf(limit, freedom, effect)
        assert power(effect, num_seeds=num_seeds, level=level) == pytest.approx(expected, abs=4e-4)


@pytest.mark.parametrize(
    ("num_seeds", "effect", "expected"),
    # The sample sizes that every table gives for 80 % at d = 0.5, 0.8, 0.2 (one sample, two-sided).
    [(34, 0.5, 0.808), (15, 0.8, 0.821), (199, 0.2, 0.802)],
)
def test_reproduces_printed_sample_sizes(num_seeds: int, effect: float, expected: float):
    found = power(effect * math.sqrt(num_seeds), num_seeds=num_seeds)
    assert found == pytest.approx(expected, abs=2e-3)


def test_without_an_effect_it_is_the_level():
    assert power(0.0, num_seeds=5) == pytest.approx(0.05, abs=1e-4)


@pytest.mark.parametrize("num_seeds", [3, 4, 5, 8])
@pytest.mark.parametrize("luck", [0.0, 1.0])
def test_a_repetition_with_that_difference_is_found_in_four_of_five(num_seeds: int, luck: float):
    """Brute force: a run states its difference, an independent run has it as the truth."""
    generator = np.random.default_rng(num_seeds)
    cases, factor = 40_000, luck_factor(num_seeds, luck)
    observed = generator.normal(size=(cases, num_seeds)).std(1, ddof=1) * factor
    stated = detectable_difference(1.0, num_seeds=num_seeds) * observed
    repeated = generator.normal(size=(cases, num_seeds))
    shared = math.sqrt(luck) * generator.normal(size=cases)  # the same in all seeds: unseen
    mean = repeated.mean(1) + shared + stated
    found = mean > critical(0.05, num_seeds - 1) * factor * repeated.std(1, ddof=1)
    assert found.mean() == pytest.approx(0.8, abs=0.01)


def test_taking_the_spread_for_known_would_promise_too_much():
    known = 3.761  # noncentrality of 80 % with five seeds
    assert power(known, num_seeds=5) == pytest.approx(0.8, abs=1e-3)
    assert detectable_difference(1.0, num_seeds=5) > 1.2 * known


def test_shrinks_with_seeds_and_grows_with_the_correction():
    by_seeds = [
        detectable_difference(1 / math.sqrt(seeds), num_seeds=seeds) for seeds in range(3, 12)
    ]
    assert by_seeds == sorted(by_seeds, reverse=True)
    assert detectable_difference(1.0, num_seeds=5, level=0.01) > detectable_difference(
        1.0, num_seeds=5, level=0.025
    )
    assert detectable_difference(2.0, num_seeds=5) == 2 * detectable_difference(1.0, num_seeds=5)
