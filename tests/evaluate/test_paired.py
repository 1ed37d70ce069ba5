"""The paired test against scipy, brute force and simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from curate.evaluate.paired import (
    Stratum,
    critical,
    luck_factor,
    paired_test,
    shared_luck,
    sign_flip_p,
)

_values = st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)), min_size=2, max_size=9)


def test_is_the_paired_t_test_where_both_sets_are_drawn_anew():
    generator = np.random.default_rng(0)
    for count in (2, 3, 5, 11, 40):
        arm, other = generator.normal(size=count), generator.normal(0.3, 2, size=count)
        ours = paired_test((arm - other).tolist(), factor=luck_factor(count))
        theirs = stats.ttest_rel(arm, other)
        interval = theirs.confidence_interval(0.95)
        assert ours.p == pytest.approx(theirs.pvalue, rel=1e-10)
        assert ours.interval == pytest.approx((interval.low, interval.high), rel=1e-9)
        assert ours.mean == pytest.approx(np.mean(arm - other))


def test_reproduces_student_s_sleep_data():
    """Student (1908), Biometrika 6, the two soporifics: t = 4.0621, p = 0.002833, 9 degrees."""
    differences = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    test = paired_test(differences, factor=luck_factor(10))
    assert test.mean / test.standard_error == pytest.approx(4.0621, abs=5e-5)
    assert test.p == pytest.approx(0.002833, abs=5e-7)
    assert test.interval == pytest.approx((0.7001, 2.4599), abs=5e-5)


def test_critical_values_are_those_of_the_printed_tables():
    table = {2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 30: 2.042}
    for freedom, value in table.items():
        assert critical(0.05, freedom) == pytest.approx(value, abs=5e-4)
    assert critical(0.01, 4) == pytest.approx(4.604, abs=5e-4)


def test_a_fixed_set_widens_the_interval_to_that_of_one_more_draw():
    """With no noise of training, the fixed set is one more draw: the prediction interval."""
    differences = [0.3, -0.1, 0.4, 0.2, 0.1]
    plain = paired_test(differences, factor=luck_factor(5))
    fixed = paired_test(differences, factor=luck_factor(5, 1.0))
    assert fixed.standard_error == pytest.approx(plain.standard_error * math.sqrt(6))
    half = stats.t.ppf(0.975, 4) * np.std(differences, ddof=1) * math.sqrt(1 + 1 / 5)
    assert fixed.interval[1] - fixed.mean == pytest.approx(half)


@pytest.mark.parametrize("num_seeds", [3, 5, 10])
def test_a_lucky_fixed_draw_passes_for_better_in_one_case_of_twenty_not_in_three(num_seeds: int):
    generator = np.random.default_rng(num_seeds)
    luck = generator.normal(size=(4000, 1))
    differences = luck - generator.normal(size=(4000, num_seeds))
    limit = critical(0.05, num_seeds - 1)

    def false_verdicts(factor: float) -> float:
        statistic = differences.mean(1) / (differences.std(1, ddof=1) * factor)
        return float((np.abs(statistic) > limit).mean())

    assert false_verdicts(luck_factor(num_seeds)) > 0.14
    assert 0.04 < false_verdicts(luck_factor(num_seeds, 1.0)) < 0.06


@pytest.mark.parametrize("overlap", [0.5, 0.65, 0.8, 0.95, 1.0])
def test_partly_shared_sets_are_calibrated_by_what_they_share(overlap: float):
    """Sums over real sets of which two share that part; the level is never above 5 %."""
    generator = np.random.default_rng(1)
    num_rows, kept, num_seeds, cases = 400, 200, 5, 2500
    core = round(kept * overlap) if overlap > 0.5 else 0
    # Two sets share the core and, by chance, some of the rest.
    rest_share = (kept - core) / (num_rows - core)
    common = core + (kept - core) * rest_share
    factor = luck_factor(num_seeds, shared_luck([Stratum(kept, common, num_rows)]))
    limit, wrong = critical(0.05, num_seeds - 1), 0
    for _ in range(cases):
        worth = generator.normal(size=num_rows)
        plan = np.array([
            worth[:core].sum() + generator.permuted(worth[core:])[: kept - core].sum()
            for _ in range(num_seeds)
        ])  # fmt: skip
        random = np.array([generator.permuted(worth)[:kept].sum() for _ in range(num_seeds)])
        differences = plan - random
        wrong += abs(differences.mean()) > limit * factor * differences.std(ddof=1)
    assert 0.02 < wrong / cases < 0.065


def test_luck_is_shared_wholly_by_equal_sets_and_not_at_all_by_chance_overlap():
    assert shared_luck([Stratum(30, 30, 100)]) == 1.0
    assert shared_luck([Stratum(30, 9, 100)]) == 0.0
    assert shared_luck([Stratum(30, 8, 100)]) == 0.0  # less than chance is chance
    assert shared_luck([Stratum(100, 100, 100)]) == 0.0  # all is kept: nothing was drawn
    # A small domain that is kept whole by all draws has no luck to share.
    assert shared_luck([Stratum(30, 9, 100), Stratum(5, 5, 5)]) == 0.0
    assert shared_luck([Stratum(50, 50, 100), Stratum(50, 25, 100)]) == 0.5
    assert luck_factor(4) == 0.5
    assert luck_factor(4, 1.0, 1.0) == math.inf


@given(_values)
def test_sign_flips_are_counted_as_by_hand(differences: list[float]):
    observed = abs(sum(differences))
    patterns = [
        abs(sum(sign * value for sign, value in zip(signs, differences, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    expected = np.mean([total >= observed - 1e-9 for total in patterns])
    assert sign_flip_p(differences) == pytest.approx(expected)


def test_sign_flip_agrees_with_scipy_s_permutation_test():
    generator = np.random.default_rng(3)
    arm, other = generator.normal(0.8, 1, size=8), generator.normal(size=8)
    theirs = stats.permutation_test(
        (arm, other), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples",
        vectorized=True, n_resamples=10_000,  # more than 2^8: exact
    )  # fmt: skip
    assert sign_flip_p((arm - other).tolist()) == pytest.approx(theirs.pvalue)


def test_few_seeds_cannot_reach_five_percent_by_sign_flips():
    assert sign_flip_p([1.0, 1.1, 1.2]) == 0.25
    assert sign_flip_p([1.0, 1.1, 1.2, 1.3, 1.4]) == 2 / 32
    assert sign_flip_p([1.0, 1.1, 1.2, 1.3, 1.4, 1.5]) == 2 / 64


def test_beyond_twenty_seeds_random_signs_stand_for_all():
    generator = np.random.default_rng(4)
    differences = generator.normal(0.35, 1, size=30).tolist()
    drawn = sign_flip_p(differences, num_draws=40_000, seed=1)
    assert drawn == sign_flip_p(differences, num_draws=40_000, seed=1)
    # By the central limit the exact value is near that of the normal with the same second moment.
    z = abs(sum(differences)) / math.sqrt(sum(value**2 for value in differences))
    assert drawn == pytest.approx(2 * stats.norm.sf(z), rel=0.1)
    assert sign_flip_p([5.0] * 25, num_draws=1000) == 1 / 1001  # never 0


@given(_values, st.floats(0.01, 100))
def test_scale_and_direction_do_not_matter(differences: list[float], scale: float):
    if np.std(differences) < 1e-2:
        return
    factor = luck_factor(len(differences), 0.4)
    test = paired_test(differences, factor=factor)
    other = paired_test([-scale * value for value in differences], factor=factor)
    assert other.p == pytest.approx(test.p, rel=1e-6)
    assert other.interval == pytest.approx(
        (-scale * test.interval[1], -scale * test.interval[0]), rel=1e-6, abs=1e-9
    )
    assert other.sign_flip_p == test.sign_flip_p


@pytest.mark.parametrize("bad", [[1.0], [], [1.0, math.nan, 2.0], [0.5, math.inf], [2.0, 2.0]])
def test_refuses_what_cannot_be_tested(bad: list[float]):
    with pytest.raises(ValueError):
        paired_test(bad, factor=1.0)
