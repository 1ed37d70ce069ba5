"""Weights three ways: the same expectation, drawn without bias, however the data is cut."""

import json
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.data.choice import Choice
from curate.data.shard_layout import Component
from curate.data.shard_weights import ONE, Sum, Tally, Way, pack, sums, uniform, unpack, weigh

WAYS: tuple[Way, ...] = ("column", "copies", "domains")


def plan_of(examples: list[tuple[str, int, float]]) -> Choice:
    """A partition in which each example has a domain, copies and a weight."""
    names = tuple(sorted({domain for domain, _, _ in examples}))
    return Choice(
        rows=np.arange(len(examples)),
        weights=np.array([weight for _, _, weight in examples], np.float32),
        domains=np.array([names.index(domain) for domain, _, _ in examples], np.int64),
        names=names,
        copies={0: np.array([copies for _, copies, _ in examples], np.int64)},
        tokens=None,
    )


def in_parts(examples: list[tuple[str, int, float]], size: int) -> Iterator[Choice]:
    for start in range(0, len(examples), size):
        yield plan_of(examples[start : start + size])


def written(
    examples: list[tuple[str, int, float]], way: Way, *, size: int = 7, seed: int = 0
) -> tuple[list[int], list[float], dict[Component, Sum]]:
    """Copies and weight of each example as written, and the sums of the components."""
    tally = Tally(way, seed)
    parts = list(in_parts(examples, size))
    announced = [tally.take(part) for part in parts]
    copies, weights = list[int](), list[float]()
    for number, part in enumerate(parts):
        terms = unpack(json.loads(json.dumps(pack(tally.terms(number)))))
        done = weigh(part, way, terms)
        np.testing.assert_array_equal(done.copies[0], announced[number].copies[0])
        copies += done.copies[0].tolist()
        weights += done.in_phase(0).weights.tolist()
    return copies, weights, tally.totals


# Weights in quarters: their sums are exact, and u matters in quarters only.
QUARTERS = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.integers(0, 20).map(lambda n: n / 4)),
    min_size=1,
    max_size=40,
)


@given(examples=QUARTERS)
def test_the_expected_effective_weight_is_the_same_in_all_three_ways(
    examples: list[tuple[str, int, float]],
):
    want = [Fraction(copies) * Fraction(weight) for _, copies, weight in examples]

    copies, weights, _ = written(examples, "column")
    assert [n * Fraction(w) for n, w in zip(copies, weights, strict=True)] == want

    choice = plan_of(examples)
    mean = np.zeros(len(examples))
    for quarter in range(4):  # every start that makes a difference, each as likely
        starts = {Component(0, name): quarter * ONE // 4 for name in choice.names}
        mean += weigh(choice, "copies", starts).copies[0] / 4
    assert mean.tolist() == [float(x) for x in want]

    copies, weights, totals = written(examples, "domains")
    for (domain, asked, _), n, weight, worth in zip(examples, copies, weights, want, strict=True):
        assert n == min(asked, 1)
        if n:  # a domain's draws in an epoch / its examples = how often one is seen
            total = totals[Component(0, domain)]
            assert n * total.rows / total.examples * weight == pytest.approx(float(worth), rel=1e-6)


@given(examples=QUARTERS, seed=st.integers(0, 99))
def test_copies_are_less_than_one_from_their_expectation_and_sums_are_right(
    examples: list[tuple[str, int, float]], seed: int
):
    copies, weights, totals = written(examples, "copies", seed=seed)
    assert set(weights) == {1.0}
    expected: dict[str, float] = {}
    found: dict[str, int] = {}
    for (domain, asked, weight), n in zip(examples, copies, strict=True):
        assert abs(n - asked * weight) < 1
        expected[domain] = expected.get(domain, 0.0) + asked * weight
        found[domain] = found.get(domain, 0) + n
    for domain, total in expected.items():
        assert abs(found[domain] - total) < 1
        assert totals.get(Component(0, domain), Sum(0, 0)).rows == total


@pytest.mark.parametrize("way", WAYS)
@given(examples=QUARTERS, size=st.integers(1, 45))
def test_the_cut_into_partitions_changes_nothing(
    way: Way, examples: list[tuple[str, int, float]], size: int
):
    assert written(examples, way, size=size) == written(examples, way, size=len(examples))


def test_draws_over_many_seeds_are_unbiased():
    """400 seeds: a mean is within 6 standard errors of sqrt(p (1 - p) / 400) <= 0.025."""
    generator = np.random.default_rng(5)
    examples = [("ab"[i % 2], 1, float(w)) for i, w in enumerate(generator.gamma(2.0, 0.5, 60))]
    mean = np.mean([written(examples, "copies", seed=s)[0] for s in range(400)], axis=0)
    want = np.array([weight for _, _, weight in examples])
    assert np.abs(mean - want).max() < 6 * 0.025
    assert len({uniform(s, Component(0, "a")) for s in range(400)}) == 400


@pytest.mark.parametrize("way", WAYS)
def test_weights_of_one_and_single_copies_change_nothing(way: Way):
    examples = [("ab"[i % 2], int(i % 5 > 0), 1.0) for i in range(50)]
    copies, weights, _ = written(examples, way)
    assert copies == [copies for _, copies, _ in examples]
    assert [w for w, n in zip(weights, copies, strict=True) if n] == [1.0] * sum(copies)


def test_domains_have_weights_of_mean_one():
    examples = [("ab"[i % 2], 1 + i % 3, 0.25 + i % 7) for i in range(80)]
    _, weights, _ = written(examples, "domains")
    assert np.mean(weights[0::2]) == pytest.approx(1, rel=1e-6)
    assert np.mean(weights[1::2]) == pytest.approx(1, rel=1e-6)


def test_phases_are_weighed_each_by_itself():
    choice = plan_of([("a", 1, 0.5), ("a", 1, 2.0), ("b", 1, 1.5)])
    choice = Choice(
        choice.rows,
        choice.weights,
        choice.domains,
        choice.names,
        {1: np.array([1, 1, 0]), 2: np.array([0, 3, 2])},
        None,
    )
    assert sums(choice) == {
        Component(1, "a"): Sum(5 * ONE // 2, 2),
        Component(2, "a"): Sum(6 * ONE, 1),
        Component(2, "b"): Sum(3 * ONE, 1),
    }
    tally = Tally("domains", 0)
    tally.take(choice)
    done = weigh(choice, "domains", tally.terms(0))
    assert done.in_phase(1).weights.tolist()[:2] == pytest.approx([0.4, 1.6])
    assert done.in_phase(2).weights.tolist() == [0.0, 1.0, 1.0]
    assert {phase: copies.tolist() for phase, copies in done.copies.items()} == {
        1: [1, 1, 0],
        2: [0, 1, 1],
    }


def test_sums_of_very_many_rows_do_not_overflow():
    tally = Tally("copies", 0)
    part = plan_of([("a", 1000, 1e6)] * 20)
    for _ in range(30):
        found = tally.take(part).copies[0]
        assert np.abs(found - 1_000_000_000).max() <= 1
    assert tally.totals[Component(0, "a")].rows == 600_000_000_000
