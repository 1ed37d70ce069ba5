"""The rule in words: each way to a verdict and each refusal."""

import math

import numpy as np
import pytest

from curate.evaluate.paired import critical
from curate.evaluate.verdict import Arm, Verdict, judge

_RANDOM = {0: 0.80, 1: 0.82, 2: 0.81, 3: 0.79, 4: 0.83}


def _verdict(values: dict[int, float], *, luck: float = 0.0, better: str = "higher") -> Verdict:
    return judge(
        {"plan": Arm(values=values, luck=luck)},
        random=[Arm(values=_RANDOM, luck=0.0)],
        metric="accuracy",
        better="lower" if better == "lower" else "higher",
    )[0]


def _shifted(shift: float) -> dict[int, float]:
    wobble = [0.01, -0.01, 0.005, -0.005, 0.0]
    return {seed: value + shift + wobble[seed] for seed, value in _RANDOM.items()}


def test_a_clear_gain_helps_and_a_clear_loss_hurts():
    assert _verdict(_shifted(0.1)).word == "helps"
    assert _verdict(_shifted(-0.1)).word == "hurts"


def test_for_a_loss_lower_is_better():
    assert _verdict(_shifted(0.1), better="lower").word == "hurts"
    assert _verdict(_shifted(-0.1), better="lower").word == "helps"


def test_a_small_difference_is_not_distinguishable_and_says_what_would_have_been():
    verdict = _verdict(_shifted(0.003))
    assert verdict.word == "not distinguishable from random"
    assert verdict.detectable is not None
    assert verdict.detectable > 0.003
    assert "80 % power" in verdict.sentence()


def test_a_fixed_set_needs_more_than_one_drawn_anew():
    values = _shifted(0.015)
    assert _verdict(values, luck=0.0).word == "helps"
    assert _verdict(values, luck=1.0).word == "not distinguishable from random"


def test_the_boundary_is_at_three_percent_so_that_five_hold():
    differences = np.array([0.01, -0.01, 0.005, -0.005, 0.0])
    edge = critical(0.03, 4) * differences.std(ddof=1) / math.sqrt(5)
    assert _verdict(_shifted(edge * 1.001)).word == "helps"
    assert _verdict(_shifted(edge * 0.999)).word == "not distinguishable from random"


def test_more_arms_raise_the_bar():
    differences = np.array([0.01, -0.01, 0.005, -0.005, 0.0])
    edge = critical(0.03, 4) * differences.std(ddof=1) / math.sqrt(5)
    arms = {"plan": Arm(values=_shifted(edge * 1.05), luck=0.0),
            "other": Arm(values=_shifted(0.0), luck=0.0)}  # fmt: skip
    plan, other = judge(arms, random=[Arm(values=_RANDOM, luck=0)], metric="m", better="higher")
    assert plan.word == other.word == "not distinguishable from random"
    assert plan.test is not None
    assert plan.corrected_p == pytest.approx(2 * plan.test.p)


def test_a_diverged_arm_does_not_ease_the_correction_for_the_others():
    broken = {**_shifted(0.0), 2: math.nan}
    values = _shifted(0.1)
    alone = _verdict(values)
    arms = {"plan": Arm(values=values, luck=0.0), "broken": Arm(values=broken)}
    plan, other = judge(arms, random=[Arm(values=_RANDOM, luck=0)], metric="m", better="higher")
    assert alone.corrected_p is not None
    assert plan.corrected_p == pytest.approx(2 * alone.corrected_p)
    assert other.word == "no verdict"


def test_an_arm_that_is_random_itself_is_no_hypothesis():
    arms = {"plan": Arm(values=_shifted(0.1), luck=0.0), "natural": Arm(values=_RANDOM)}
    plan, natural = judge(arms, random=[Arm(values=_RANDOM, luck=0)], metric="m", better="higher")
    assert plan.test is not None
    assert plan.corrected_p == plan.test.p
    assert natural.word == "not distinguishable from random"
    assert "those of random" in natural.sentence()


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({0: 0.9, 1: 0.9, 2: math.nan, 3: 0.9, 4: math.inf}, "plan diverged with seeds 2, 4"),
        ({0: 0.9, 1: 0.91, 2: 0.9}, "only one of plan and random has a value for seeds 3, 4"),
        ({seed: value + 0.05 for seed, value in _RANDOM.items()}, "seeds that change nothing"),
    ],
)
def test_says_why_there_is_no_verdict(values: dict[int, float], why: str):
    verdict = _verdict(values)
    assert verdict.word == "no verdict"
    assert why in verdict.sentence()
    assert verdict.test is None


def test_two_seeds_give_no_verdict():
    verdict = judge({"plan": Arm(values={0: 0.9, 1: 0.95})}, random=[Arm(values={0: 0.1, 1: 0.2})],
                    metric="m", better="higher")[0]  # fmt: skip
    assert verdict.word == "no verdict"
    assert "3 seeds or more, here are 2" in verdict.sentence()


def test_a_random_arm_that_was_never_redrawn_gives_no_verdict_on_a_fixed_plan():
    plan, random = Arm(values=_shifted(0.1), luck=1.0), Arm(values=_RANDOM, luck=1.0)
    verdict = judge({"plan": plan}, random=[random], metric="m", better="higher")[0]
    assert verdict.word == "no verdict"
    assert "same set with every seed" in verdict.why


def test_random_that_diverged_leaves_no_verdict_at_all():
    verdict = judge({"plan": Arm(values=_RANDOM)}, random=[Arm(values={**_RANDOM, 0: math.nan})],
                    metric="m", better="higher")[0]  # fmt: skip
    assert "random diverged with seed 0" in verdict.sentence()


def test_the_sentence_holds_the_numbers():
    sentence = _verdict(_shifted(0.1)).sentence()
    assert sentence.startswith("plan helps: accuracy 0.91 against 0.81 for random")
    assert "a difference of +0.1 (95 % interval" in sentence
    assert "5 seeds" in sentence
