"""A model that trains in a millisecond, to repeat whole comparisons hundreds of times.

Ridge regression on scikit-learn's digits: 1,000 rows to choose from, 797 held out, 200 kept.
With `noise`, each seed sees the pixels through its own random layer, so that training has a noise
of its own, as initialisation gives it; without, all that varies is the draw.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from curate.evaluate.verdict import Arm, judge

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

KEPT = 200
_POOL = 1000
_HIDDEN = 64


@dataclass
class Cases:
    """What came of many comparisons."""

    words: list[str] = field(default_factory=list[str])
    without_luck: list[str] = field(default_factory=list[str])
    """What the plain paired test says of the same numbers."""
    differences: list[float] = field(default_factory=list[float])
    stated: list[float] = field(default_factory=list[float])
    """The detectable difference that each comparison stated."""

    def share(self, *words: str) -> float:
        return sum(word in words for word in self.words) / len(self.words)

    @property
    def false_verdicts(self) -> float:
        return self.share("helps", "hurts")

    @property
    def false_without_luck(self) -> float:
        return sum(word in ("helps", "hurts") for word in self.without_luck) / len(self.words)


class Study:
    """Repeats a comparison of a plan with random, each time with new draws."""

    def __init__(
        self, *, seed: int, num_seeds: int, noise: bool = False, num_draws: int = 2
    ) -> None:
        self.generator = np.random.default_rng(seed)
        self.num_seeds, self.noise, self.num_draws = num_seeds, noise, num_draws
        pixels, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(labels))
        pixels, labels = np.asarray(pixels)[order] / 16.0, np.asarray(labels)[order]
        self.pixels, self.labels = pixels[:_POOL], labels[:_POOL]
        self.held_out, self.truth = pixels[_POOL:], labels[_POOL:]

    def null_cases(self, count: int, *, fixed: bool) -> Cases:
        """The plan is another random draw: one for all seeds, or a new one for each."""
        cases = Cases()
        for _ in range(count):
            self._compare(cases, fixed=fixed)
        return cases

    def power_cases(self, count: int, *, null: Cases, fixed: bool) -> Cases:
        """The plan is random with an advantage, that which another comparison said it can find."""
        cases = Cases()
        stated = self.generator.permutation(np.asarray(null.stated))
        for index in range(count):
            self._compare(cases, fixed=fixed, shift=float(stated[index % len(stated)]))
        return cases

    def noisy_labels(self, count: int, *, flipped: float) -> Cases:
        """A share of all labels is wrong, and the plan, fixed, keeps right ones only."""
        cases = Cases()
        for _ in range(count):
            wrong = self.generator.random(_POOL) < flipped
            labels = np.where(wrong, (self.labels + self.generator.integers(1, 10, _POOL)) % 10,
                              self.labels)  # fmt: skip
            self._compare(cases, fixed=True, labels=labels, among=np.flatnonzero(~wrong))
        return cases

    def _compare(
        self,
        cases: Cases,
        *,
        fixed: bool,
        shift: float = 0.0,
        labels: Rows | None = None,
        among: Rows | None = None,
    ) -> None:
        labels = self.labels if labels is None else labels
        among = np.arange(_POOL) if among is None else among
        layers = self.generator.integers(2**32, size=self.num_seeds)
        chosen = self.generator.choice(among, KEPT, replace=False)
        plan = dict[int, float]()
        random = [dict[int, float]() for _ in range(self.num_draws)]
        for seed, layer in enumerate(layers):
            if not fixed:
                chosen = self.generator.choice(among, KEPT, replace=False)
            plan[seed] = self._accuracy(chosen, labels, int(layer)) + shift
            for draw in random:
                drawn = self.generator.choice(_POOL, KEPT, replace=False)
                draw[seed] = self._accuracy(drawn, labels, int(layer))
        yardstick = [Arm(values=draw, luck=0.0) for draw in random]
        arms = {"plan": Arm(values=plan, luck=1.0 if fixed else 0.0)}
        verdict = judge(arms, random=yardstick, metric="accuracy", better="higher")[0]
        plain = judge({"plan": Arm(values=plan, luck=0.0)}, random=yardstick, metric="accuracy",
                      better="higher")[0]  # fmt: skip
        cases.words.append(verdict.word)
        cases.without_luck.append(plain.word)
        mean = sum(sum(draw.values()) for draw in random) / self.num_draws
        cases.differences.append((sum(plan.values()) - mean) / self.num_seeds)
        cases.stated.append(np.inf if verdict.detectable is None else verdict.detectable)

    def _accuracy(self, rows: Rows, labels: Rows, layer: int) -> float:
        inputs, held_out = self._features(self.pixels[rows], self.held_out, layer)
        targets = np.eye(10)[labels[rows]]
        gram = inputs.T @ inputs + np.eye(inputs.shape[1])
        scores = held_out @ np.linalg.solve(gram, inputs.T @ targets)
        return float((scores.argmax(1) == self.truth).mean())

    def _features(self, left: Floats, right: Floats, layer: int) -> tuple[Floats, Floats]:
        if self.noise:
            random = np.random.default_rng(layer)
            weights = random.normal(0, 0.3, size=(left.shape[1], _HIDDEN))
            left, right = np.tanh(left @ weights), np.tanh(right @ weights)
        return (
            np.hstack((left, np.ones((len(left), 1)))),
            np.hstack((right, np.ones((len(right), 1)))),
        )
