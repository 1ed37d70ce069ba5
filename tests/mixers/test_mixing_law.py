"""The mixing law: values, recovery of what made the losses, and the optimum by other means."""

import numpy as np
import pytest

from curate.errors import ConfigError, InputError
from mixers.mixing_law import Floats, MixingLaw, fit, held_out, optimum


def law_of(*rows: tuple[float, float, tuple[float, ...]]) -> MixingLaw:
    floors, scales, slopes = zip(*rows, strict=True)
    return MixingLaw(np.array(floors), np.array(scales), np.array(slopes))


def drawn(num: int, size: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).dirichlet(np.ones(size), num)


TWO = law_of((2.0, 1.0, (-2.0, 0.0)), (1.0, 1.5, (0.0, -3.0)))


def test_losses_fall_as_the_formula_says():
    rows = np.array([[r, 1 - r] for r in (0.25, 0.5, 0.75, 0.6)])
    found = TWO.losses(rows)[:, 0]
    np.testing.assert_allclose(found, [2.60653, 2.36788, 2.22313, 2.30119], atol=5e-6)


def test_the_law_that_made_the_losses_is_found_again():
    true = law_of((2.1, 0.7, (-1.9, 0.5, -0.2)), (1.4, 2.0, (0.3, -2.5, 0.4)))
    mixtures = drawn(20, 3)
    found = fit(mixtures, true.losses(mixtures))
    np.testing.assert_allclose(found.losses(mixtures), true.losses(mixtures), atol=1e-10)
    # Of the slopes only the differences mean anything.
    np.testing.assert_allclose(
        found.slopes - found.slopes[:, 2:], true.slopes - true.slopes[:, 2:], atol=1e-5
    )
    np.testing.assert_allclose(found.floors, true.floors, atol=1e-6)
    np.testing.assert_allclose(found.slopes.mean(1), 0, atol=1e-12)
    assert held_out(mixtures, true.losses(mixtures)).error.max() < 1e-6


def test_two_domains_have_the_optimum_of_the_closed_form():
    share = (3 - np.log(2.25)) / 5
    found = optimum(TWO)
    np.testing.assert_allclose(found, [share, 1 - share], atol=1e-6)
    assert TWO.losses(found[None]).mean() == pytest.approx(1.84717, abs=5e-6)


@pytest.mark.parametrize("penalty", [0.0, 0.05])
def test_the_optimum_under_caps_is_that_of_a_grid(penalty: float):
    law = law_of(
        (2.0, 1.0, (-2.0, 0.2, 0.1)), (1.0, 1.5, (0.0, -1.0, 0.0)), (1.5, 0.5, (0.3, 0.1, -4.0))
    )
    caps, natural = np.array([0.3, 1.0, 0.25]), np.array([0.2, 0.5, 0.3])
    shares = np.array([0.5, 0.3, 0.2])
    found = optimum(law, shares=shares, caps=caps, natural=natural, penalty=penalty)
    one, two = np.meshgrid(np.linspace(0, 1, 801), np.linspace(0, 1, 801))
    grid = np.stack([one, two, 1 - one - two], axis=-1).reshape(-1, 3)
    grid = grid[(grid >= 0).all(1) & (grid <= caps + 1e-12).all(1)]
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = np.where(grid > 0, grid * np.log(grid / natural), 0).sum(1)
    values = law.losses(grid) @ shares + penalty * apart
    np.testing.assert_allclose(found, grid[values.argmin()], atol=3e-3)
    assert found.sum() == pytest.approx(1)
    assert (found <= caps + 1e-9).all()


def test_noise_leaves_an_order_and_is_told_of():
    mixtures = drawn(60, 2, seed=3)
    noise = 0.02 * np.random.default_rng(4).standard_normal((60, 2))
    told = held_out(mixtures, TWO.losses(mixtures) + noise)
    assert (told.spearman > 0.9).all()
    np.testing.assert_allclose(told.error, 0.02 * np.sqrt(2 / np.pi), rtol=0.5)
    nothing = held_out(mixtures, np.random.default_rng(5).standard_normal((60, 1)))
    assert abs(nothing.spearman[0]) < 0.5


def test_a_loss_that_no_mixture_moves_has_a_flat_law():
    mixtures = drawn(12, 3)
    losses = np.full((12, 1), 2.5)
    found = fit(mixtures, losses)
    np.testing.assert_allclose(found.losses(mixtures), losses)
    assert np.isnan(held_out(mixtures, losses).spearman).all()
    np.testing.assert_allclose(optimum(found, natural=[0.2, 0.3, 0.5]), [0.2, 0.3, 0.5])


def test_domains_in_another_order_give_the_same_law():
    mixtures, order = drawn(30, 3, seed=9), [2, 0, 1]
    true = law_of((2.0, 1.0, (-2.0, 0.2, 0.1)), (1.0, 1.5, (0.0, -1.0, 0.0)))
    losses = true.losses(mixtures)
    one, two = fit(mixtures, losses), fit(mixtures[:, order], losses)
    np.testing.assert_allclose(optimum(one)[order], optimum(two), atol=1e-6)


def test_what_cannot_be_fitted_or_kept_is_refused():
    mixtures = drawn(12, 3)
    losses = np.ones((12, 1))
    with pytest.raises(InputError, match="4 runs are too few for 3 domains"):
        fit(mixtures[:4], losses[:4])
    with pytest.raises(InputError, match="run 2 adds up to 2"):
        fit(np.where(np.arange(12)[:, None] == 2, 2 * mixtures, mixtures), losses)
    with pytest.raises(InputError, match="a loss of run 5"):
        fit(mixtures, np.where(np.arange(12)[:, None] == 5, np.nan, losses))
    with pytest.raises(ConfigError, match=r"add up to 0\.8"):
        optimum(TWO, caps=[0.4, 0.4])
    with pytest.raises(ConfigError, match="no mixture to stay near"):
        optimum(TWO, penalty=0.1)
