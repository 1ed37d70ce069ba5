"""Mixtures for proxies: on the simplex, in steps, different, below caps, and as Dirichlet says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.errors import ConfigError
from mixers import mixture_draws
from mixers.laws import Floats
from mixers.mixture_draws import STEP, drawn, scattered, swarm

TOKENS = np.array([1e6, 2e5, 5e4, 3e3, 7e5])


@given(
    tokens=st.lists(st.integers(1000, 10**5), min_size=3, max_size=12),
    seed=st.integers(0, 2**32 - 1),
)
def test_draws_are_different_mixtures_in_steps_and_below_the_caps(tokens: list[int], seed: int):
    sizes = np.array(tokens, dtype=float)
    found = drawn(sizes, 6, seed=seed)
    assert found.shape == (6, len(tokens))
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(found / STEP, np.round(found / STEP), atol=1e-9)
    assert (found >= 0).all()
    # Rounding may take a share at most one step above its cap.
    assert (found <= np.minimum(15 * sizes / sizes.sum(), 1) + STEP).all()
    assert len(np.unique(np.round(found / STEP), axis=0)) == 6


def test_a_seed_gives_the_same_draws_and_another_one_others():
    one, two, other = (drawn(TOKENS, 20, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("domains", [3, 40])
def test_a_smaller_swarm_is_the_beginning_of_a_larger_one(domains: int):
    tokens = np.random.default_rng(0).uniform(1e4, 1e6, domains)
    most = swarm(tokens, 300, seed=5)
    assert len(np.unique(np.round(most[2:] / STEP), axis=0)) == 298
    for num in (2, 3, 32, 33, 131):
        np.testing.assert_array_equal(swarm(tokens, num, seed=5), most[:num])


def test_the_mixtures_are_not_biased_by_their_order():
    found = drawn(TOKENS, 2000, caps=np.ones(5), seed=1)
    centre = np.sqrt(TOKENS) / np.sqrt(TOKENS).sum()
    np.testing.assert_allclose(found.mean(0), centre, atol=0.03)


def test_a_thousand_domains_are_drawn_in_pieces(monkeypatch: pytest.MonkeyPatch):
    asked = list[int]()

    def watched(tokens: Floats, num: int, generator: np.random.Generator) -> Floats:
        asked.append(num * len(tokens))
        return scattered(tokens, num, generator)

    monkeypatch.setattr(mixture_draws, "scattered", watched)
    found = drawn(np.ones(1000), 300, caps=np.ones(1000))
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-9)
    assert max(asked) <= 2**14
    assert len(asked) > 1


def test_natural_and_uniform_come_first():
    found = swarm(TOKENS, 12)
    np.testing.assert_allclose(found[0], TOKENS / TOKENS.sum())
    np.testing.assert_allclose(found[1], np.full(5, 0.2))
    assert len(found) == 12


def test_moments_are_those_of_a_mixture_of_dirichlet_distributions():
    found = scattered(TOKENS, 200_000, np.random.default_rng(0))
    centre = np.sqrt(TOKENS) / np.sqrt(TOKENS).sum()
    np.testing.assert_allclose(found.mean(0), centre, atol=0.003)
    strengths = 10 ** np.linspace(-1, np.log10(5), 15)
    expected = centre * (1 - centre) * (1 / (1 + strengths)).mean()
    np.testing.assert_allclose(found.var(0), expected, rtol=0.03)


def test_caps_of_ones_own_hold():
    found = drawn(TOKENS, 30, caps=np.array([0.5, 0.5, 0.5, 0.02, 0.5]))
    assert found.max() <= 0.5 + STEP
    assert found[:, 3].max() <= 0.02 + STEP


def test_more_mixtures_than_there_are_is_an_error():
    with pytest.raises(ConfigError, match="different mixtures of these domains") as caught:
        drawn(np.array([1e6, 1.0]), 400)
    assert "mix.runs" in caught.value.fix
