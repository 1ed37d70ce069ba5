"""DSIR's weights against multinomial likelihoods, and its draws against the weights."""

import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from curate.errors import ConfigError
from scorers.dsir import DSIR, compare, gumbel, likeliest_strength, log_weights


def test_the_weight_is_the_ratio_of_two_multinomial_likelihoods():
    """The coefficient of the multinomial cancels; scipy's own log-likelihoods hold it."""
    generator = np.random.default_rng(0)
    target, pool = generator.integers(0, 20, 6), generator.integers(1, 500, 6)
    ratios = compare(target, pool, smoothing=0.5, prior="uniform").log_ratios
    p = (target + 0.5) / (target.sum() + 3)
    q = (pool + 0.5) / (pool.sum() + 3)
    for size in (1, 4, 30):
        buckets = generator.integers(0, 6, size)
        z = np.bincount(buckets, minlength=6)
        expected = stats.multinomial.logpmf(z, size, p) - stats.multinomial.logpmf(z, size, q)
        found = log_weights(np.zeros(size, dtype=np.int64), buckets, ratios, num_texts=1)
        assert found[0] == pytest.approx(expected, abs=1e-9)


def test_by_hand_with_the_pool_as_prior():
    """Three buckets, counts 2 0 0 of the target and 2 1 1 of the pool, one count a bucket."""
    ratios = compare(
        np.array([2, 0, 0]), np.array([2, 1, 1]), smoothing=1.0, prior="pool"
    ).log_ratios
    q = [3 / 7, 2 / 7, 2 / 7]
    p = [(2 + 3 * 3 / 7) / 5, (3 * 2 / 7) / 5, (3 * 2 / 7) / 5]
    expected = [math.log(a / b) for a, b in zip(p, q, strict=True)]
    np.testing.assert_allclose(ratios, expected, rtol=1e-12)


def test_a_bucket_that_the_target_lacks_costs_the_same_whether_rare_or_frequent():
    pool = np.array([1000, 10, 1, 0, 50])
    target = np.array([0, 0, 0, 0, 7])
    ratios = compare(target, pool, smoothing=0.3, prior="pool").log_ratios
    np.testing.assert_allclose(ratios[:4], ratios[0], rtol=1e-12)
    assert ratios[0] < 0 < ratios[4]
    even = compare(target, pool, smoothing=0.3, prior="uniform").log_ratios
    assert even[2] > 0  # what is rare in the pool looks wanted


def test_a_target_like_the_pool_weighs_nothing():
    pool = np.array([30, 30, 30])
    for prior in ("pool", "uniform"):
        found = compare(pool * 1000, pool * 1000, smoothing=0.3, prior=prior).log_ratios
        np.testing.assert_allclose(found, 0, atol=1e-12)
    uneven = np.array([3, 1, 6]) * 100_000
    found = compare(uneven, uneven, smoothing=0.3, prior="pool").log_ratios
    np.testing.assert_allclose(found, 0, atol=1e-5)


def test_texts_add_up_and_an_empty_one_is_zero():
    ratios = np.array([0.5, -2.0, 1.0])
    found = log_weights(np.array([0, 2, 2, 0]), np.array([0, 1, 1, 2]), ratios, num_texts=4)
    np.testing.assert_allclose(found, [1.5, 0, -4, 0])
    empty = np.zeros(0, dtype=np.int64)
    assert log_weights(empty, empty, ratios, num_texts=2).dtype == np.float64


def test_draws_are_gumbel_and_independent_of_each_other():
    draws = gumbel(np.arange(20_000), stream=7)
    assert stats.kstest(draws, "gumbel_r").pvalue > 0.01
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.02
    other = gumbel(np.arange(20_000), stream=8)
    assert abs(np.corrcoef(draws, other)[0, 1]) < 0.02
    np.testing.assert_array_equal(draws[[5, 3]], gumbel(np.array([5, 3]), stream=7))


def test_the_largest_keys_are_draws_without_replacement_in_proportion_to_the_weights():
    """Against drawing one after the other and renormalising."""
    weights = np.array([8.0, 4.0, 2.0, 1.0])
    rounds = 4000
    by_key: Counter[tuple[int, ...]] = Counter()
    for i in range(rounds):
        keys = np.log(weights) + gumbel(np.arange(4), stream=i * 7919)
        by_key[tuple(np.argsort(-keys)[:2].tolist())] += 1
    expected: dict[tuple[int, ...], float] = {}
    for first in range(4):
        for second in set(range(4)) - {first}:
            share = weights[first] / weights.sum()
            expected[first, second] = share * weights[second] / (weights.sum() - weights[first])
    observed = [by_key[pair] for pair in expected]
    assert stats.chisquare(observed, [rounds * p for p in expected.values()]).pvalue > 0.01


@pytest.mark.parametrize(
    "options",
    [{"buckets": 0}, {"ngrams": (2, 1)}, {"ngrams": (0, 2)}, {"smoothing": 0.0}],
)
def test_options_without_a_meaning_are_refused(options: dict[str, object]):
    with pytest.raises(ConfigError):
        DSIR(**options)  # pyright: ignore[reportArgumentType]


def urn(counts: list[int], mean: list[float], weight: float) -> float:
    """Log-probability of drawing the counts one by one, each draw adding a ball of its colour."""
    found, drawn, seen = 0.0, 0, [0] * len(counts)
    for colour, count in enumerate(counts):
        for _ in range(count):
            found += math.log((weight * mean[colour] + seen[colour]) / (weight + drawn))
            seen[colour] += 1
            drawn += 1
    return found


def test_the_smoothing_is_the_one_that_makes_the_targets_counts_likeliest():
    mean = [0.1, 0.2, 0.3, 0.4]
    counts = [9, 2, 1, 4]
    found = likeliest_strength(np.array(counts), np.array(mean))
    best = max(np.exp(np.linspace(0, 8, 4001)), key=lambda m: urn(counts, mean, m))
    assert found == pytest.approx(best, rel=0.005)


def test_the_smoothing_of_counts_drawn_from_a_dirichlet_is_found():
    generator = np.random.default_rng(0)
    mean = generator.dirichlet(np.ones(3000))
    for weight in (50, 2000):
        p = generator.dirichlet(weight * mean)
        counts = generator.multinomial(5000, p)
        assert likeliest_strength(counts, np.maximum(mean, 1e-12)) == pytest.approx(
            weight, rel=0.25
        )


def test_a_target_that_is_drawn_from_the_pool_is_drawn_to_it():
    pool = np.random.default_rng(1).integers(50, 500, 200)
    models = compare(pool, pool)
    assert models.strength > 1e7
    np.testing.assert_allclose(models.log_ratios, 0, atol=1e-3)
