"""Trees: they rank new mixtures, need small leaves for few runs, and say when they are missing."""

import sys

import numpy as np
import pytest

from curate.errors import MissingDependencyError
from mixers.boosted_law import fit, smallest_leaf
from mixers.law_optimum import drawn_optimum, wanted
from mixers.laws import Floats, Law, spearman

pytest.importorskip("lightgbm")


def drawn(num: int, size: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).dirichlet(np.ones(size), num)


def curved(mixtures: Floats) -> Floats:
    """Two losses that no linear law has: both ends are bad."""
    one = (mixtures[:, 0] - 0.4) ** 2
    return np.column_stack([2 + one, 3 + np.exp(-4 * mixtures[:, 1])])


def test_mixtures_that_it_has_not_seen_are_ranked():
    law = fit(drawn(200, 3), curved(drawn(200, 3)))
    new = drawn(100, 3, seed=1)
    assert (spearman(law.losses(new), curved(new)) > 0.95).all()


def test_thirty_two_runs_do_not_give_a_constant():
    mixtures = drawn(32, 3)
    found = fit(mixtures, curved(mixtures)).losses(drawn(50, 3, seed=1))
    assert (np.ptp(found, axis=0) > 0.01).all()


@pytest.mark.parametrize("num", [5, 10, 11, 20, 32, 64, 199, 512])
def test_a_leaf_holds_less_than_a_tenth_of_the_runs_and_at_most_twenty(num: int):
    leaf = smallest_leaf(num)
    assert 1 <= leaf <= 20
    assert leaf == 1 or leaf < num / 10


def test_the_same_runs_give_the_same_trees():
    mixtures = drawn(60, 3)
    one, two = (fit(mixtures, curved(mixtures)).losses(mixtures) for _ in range(2))
    np.testing.assert_array_equal(one, two)


class Bowl:
    def losses(self, mixtures: Floats) -> Floats:
        return ((mixtures - np.array([0.5, 0.3, 0.2])) ** 2).sum(1, keepdims=True)


def test_the_mean_of_the_best_draws_lies_at_the_minimum_and_within_the_limits():
    law: Law = Bowl()
    draws = drawn(20_000, 3, seed=2)
    free = drawn_optimum(law, wanted(3, 1), draws)
    np.testing.assert_allclose(free, [0.5, 0.3, 0.2], atol=0.01)
    want = wanted(3, 1, low=[0, 0, 0.3], caps=[0.4, 1, 1])
    held = drawn_optimum(law, want, draws)
    assert held.sum() == pytest.approx(1)
    assert (held <= want.high + 1e-12).all()
    assert (held >= want.low - 1e-12).all()
    # The bowl's nearest point with the third share at its least is (0.45, 0.25, 0.3); the first
    # is then cut to 0.4.
    np.testing.assert_allclose(held, [0.4, 0.3, 0.3], atol=0.02)


def test_a_penalty_draws_the_best_draws_to_the_natural_mixture():
    natural, draws = np.array([0.2, 0.2, 0.6]), drawn(20_000, 3, seed=2)
    near = drawn_optimum(Bowl(), wanted(3, 1, natural=natural, penalty=100.0), draws)
    np.testing.assert_allclose(near, natural, atol=0.02)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(MissingDependencyError, match="not installed") as caught:
        fit(drawn(20, 3), curved(drawn(20, 3)))
    assert "curate-data[mixlaw]" in caught.value.fix
    assert caught.value.exit_code == 6
