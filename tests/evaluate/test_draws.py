"""Several random draws a seed: which differences are taken, and that nothing is gained wrongly."""

import math
from typing import Any

import numpy as np
import pytest

from curate.evaluate.paired import critical, differences, luck_factor
from curate.evaluate.verdict import Arm, judge

_ARM = {0: 5.0, 1: 7.0}
_DRAWS = [{0: 1.0, 1: 2.0}, {0: 3.0, 1: 6.0}]


def test_an_arm_with_a_set_for_each_seed_meets_the_mean_of_the_draws():
    assert differences(_ARM, _DRAWS, is_fixed=False) == [3.0, 3.0]


def test_a_single_set_meets_each_draw():
    assert differences(_ARM, _DRAWS, is_fixed=True) == [4.0, 2.0, 5.0, 1.0]


def test_more_draws_show_less_of_the_luck_that_sets_share():
    """The mean of m draws varies less, so that a shared part weighs more against it."""
    assert luck_factor(5, 0.5) < luck_factor(5, 0.5, num_draws=2)
    assert luck_factor(5, 0.0) == luck_factor(5, 0.0, num_draws=3) == math.sqrt(1 / 5)


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("is_fixed", [True, False])
def test_the_level_holds_whatever_the_noise_of_training(noise: float, is_fixed: bool):
    generator = np.random.default_rng(5)
    num_seeds, num_draws, cases = 5, 2, 4000
    luck = generator.normal(size=(cases, 1 if is_fixed else num_seeds))
    arm = luck + noise * generator.normal(size=(cases, num_seeds))
    draws = generator.normal(size=(num_draws, cases, num_seeds)) * math.hypot(1, noise)
    own: Any = dict(enumerate(arm.T))
    others: Any = [dict(enumerate(draw.T)) for draw in draws]
    taken = np.array(_differences(own, others, is_fixed=is_fixed))  # (n, cases)
    factor = luck_factor(
        len(taken), 1.0 if is_fixed else 0.0, num_draws=1 if is_fixed else num_draws
    )
    limit = critical(0.05, len(taken) - 1)
    wrong = np.abs(taken.mean(0)) > limit * factor * taken.std(0, ddof=1)
    assert wrong.mean() < 0.06


def _differences(arm: Any, draws: list[Any], *, is_fixed: bool) -> list[Any]:
    """As `differences`, written out for columns."""
    if is_fixed:
        return [arm[seed] - draw[seed] for seed in arm for draw in draws]
    return [arm[seed] - (draws[0][seed] + draws[1][seed]) / 2 for seed in arm]


def test_all_draws_count_and_each_must_be_whole():
    arm = Arm(values={0: 0.9, 1: 0.91, 2: 0.92}, luck=1.0)
    first = Arm(values={0: 0.8, 1: 0.81, 2: 0.79}, luck=0.0)
    second = Arm(values={0: 0.6, 1: 0.61, 2: 0.59}, luck=0.0)
    verdict = judge({"plan": arm}, random=[first, second], metric="m", better="higher")[0]
    assert verdict.mean_random == pytest.approx(0.7)
    assert verdict.test is not None
    assert verdict.test.num == 6
    assert verdict.num_seeds == 3
    broken = Arm(values={**second.values, 1: math.nan}, luck=0.0)
    verdict = judge({"plan": arm}, random=[first, broken], metric="m", better="higher")[0]
    assert "random diverged with seed 1" in verdict.why
