"""The rule that turns values by arm and seed into words.

1. Arms are compared with random, seed by seed, on one metric that was named beforehand.
2. No verdict with fewer than three seeds, with a value that is not finite (a run diverged), with a
   seed that only one of the two has, or where the seeds change nothing: never an average over what
   is left.
3. The t test of `paired`, the luck of a fixed set included, against all random draws there are; its
   p values are corrected by Holm's method over all arms of the comparison.
4. Corrected p <= 0.03: `helps` or `hurts`, by the sign of the mean difference. Otherwise `not
   distinguishable from random`, which does not say that the two are equal. The promise is at most
   5 % false verdicts; two fifths of it are kept in reserve, since real metrics are not quite normal
   (accuracies have a longer tail below), and the luck of a single set is not averaged out.
5. Beside it stand the interval, the sign-flip p, and the difference that the comparison could be
   expected to find with 80 % power, at the level that the correction leaves the arm; that is
   computed for 85 %, for the same reason.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from curate.evaluate.correction import holm
from curate.evaluate.paired import PairedTest, differences, luck_factor, paired_test
from curate.evaluate.power import detectable_difference

Word = Literal["helps", "hurts", "not distinguishable from random", "no verdict"]

MIN_SEEDS = 3
_LEVEL = 0.03
_POWER = 0.85


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """What was measured of one way to choose the data."""

    values: Mapping[int, float]
    """Seed -> metric; not a number where training diverged."""
    luck: float = 1.0
    """How far the sets of different seeds share their luck: 0 where each seed drew its own, 1 where
    all trained on the same set. See `paired.shared_luck`."""
    weight: float = 1.0
    """Share of the correction's level, relative to the other arms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One arm against random."""

    arm: str
    metric: str
    word: Word
    why: str = ""
    """Why there is no verdict, or a remark on one."""
    mean_arm: float | None = None
    mean_random: float | None = None
    test: PairedTest | None = None
    corrected_p: float | None = None
    """Holm's."""
    num_seeds: int = 0
    detectable: float | None = None
    """Smallest true difference that a repetition finds with 80 % power."""

    def sentence(self) -> str:
        """The verdict in words, with the numbers it rests on."""
        if self.word == "no verdict":
            return f"{self.arm}: no verdict, {self.why}."
        means = f"{self.metric} {_number(self.mean_arm)} against {_number(self.mean_random)}"
        if self.test is None or self.detectable is None:
            return f"{self.arm} is {self.word}: {self.why} ({means})."
        verb = self.word if self.word in ("helps", "hurts") else f"is {self.word}"
        low, high = self.test.interval
        return (
            f"{self.arm} {verb}: {means} for random, a difference of {self.test.mean:+.3g}"
            f" (95 % interval {low:+.3g} to {high:+.3g}, {self.num_seeds} seeds,"
            f" p {_p(self.corrected_p)} corrected);"
            f" a difference of {self.detectable:.2g} would be found with 80 % power."
        )


def judge(
    arms: Mapping[str, Arm],
    *,
    random: Sequence[Arm],
    metric: str,
    better: Literal["higher", "lower"],
) -> list[Verdict]:
    """Verdicts on all arms of a comparison, in the order given.

    Args:
        arms: name -> arm; random itself is not among them.
        random: the yardstick; each is one draw for every seed.
        metric: its name, for the words.
        better: which direction of the metric is good.
    """
    drafts = [_draft(name, arm, random, metric) for name, arm in arms.items()]
    # An arm that is random itself is no hypothesis. One without a verdict stays one, with p = 1:
    # that a run diverged must not make it easier for the others.
    family = [index for index, draft in enumerate(drafts) if not _is_same(draft)]
    weights = [list(arms.values())[index].weight for index in family]
    tests = [drafts[index].test for index in family]
    corrected = holm([1.0 if test is None else test.p for test in tests], weights)
    verdicts = list(drafts)
    for index, test, p, weight in zip(family, tests, corrected, weights, strict=True):
        if test is None:
            continue
        word: Word = "not distinguishable from random"
        if p <= _LEVEL:
            word = "helps" if (test.mean > 0) == (better == "higher") else "hurts"
        level = _LEVEL * weight / sum(weights)
        verdicts[index] = replace(
            drafts[index],
            word=word,
            corrected_p=p,
            detectable=detectable_difference(
                test.standard_error, num_seeds=test.num, level=level, chance=_POWER
            ),
        )
    return verdicts


def _draft(name: str, arm: Arm, random: Sequence[Arm], metric: str) -> Verdict:
    """The verdict before the correction: refused, the same as random, or with its test."""
    draft = Verdict(arm=name, metric=metric, word="no verdict", num_seeds=len(arm.values))
    refusal = _refusal(name, arm, random)
    if refusal:
        return replace(draft, why=refusal)
    draws = [draw.values for draw in random]
    by_seed = differences(arm.values, draws, is_fixed=False)
    means = replace(
        draft,
        mean_arm=_mean([arm.values]),
        mean_random=_mean(draws),
    )
    if any(arm.values == draw for draw in draws):
        return replace(
            means,
            word="not distinguishable from random",
            why="its values are those of random with every seed",
        )
    is_fixed = arm.luck >= 1
    taken = differences(arm.values, draws, is_fixed=is_fixed)
    size = max(abs(value) for values in (arm.values, *draws) for value in values.values())
    if max(taken) - min(taken) <= 1e-12 * size:
        return replace(
            means,
            why="the difference is the same with every seed: seeds that change nothing say nothing"
            " about chance",
        )
    baseline = max(draw.luck for draw in random)
    num_draws = 1 if is_fixed else len(random)
    factor = luck_factor(len(taken), min(1.0, arm.luck), baseline, num_draws=num_draws)
    test = paired_test(taken, factor=factor, level=0.05, by_seed=by_seed)
    return replace(means, test=test)


def _mean(draws: Sequence[Mapping[int, float]]) -> float:
    values = [value for draw in draws for value in draw.values()]
    return math.fsum(values) / len(values)


def _refusal(name: str, arm: Arm, random: Sequence[Arm]) -> str:
    """Why they cannot be compared, or nothing."""
    for draw in random:
        alone = sorted(set(arm.values) ^ set(draw.values))
        if alone:
            return f"only one of {name} and random has a value for {_seeds(alone)}"
    for label, values in (*(("random", draw.values) for draw in random), (name, arm.values)):
        broken = sorted(seed for seed, value in values.items() if not math.isfinite(value))
        if broken:
            return f"{label} diverged with {_seeds(broken)}"
    if len(arm.values) < MIN_SEEDS:
        return f"it takes {MIN_SEEDS} seeds or more, here are {len(arm.values)}"
    if arm.luck + max(draw.luck for draw in random) >= 2:
        return "random trained on the same set with every seed, so that its luck cannot be seen"
    return ""


def _is_same(draft: Verdict) -> bool:
    return draft.test is None and draft.word != "no verdict"


def _seeds(seeds: list[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4g}"


def _p(value: float | None) -> str:
    if value is None:
        return "?"
    return f"= {value:.3f}" if value >= 0.001 else "< 0.001"
