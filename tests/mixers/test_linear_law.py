"""The linear law: what made the losses is found again, and its optimum is a corner."""

import numpy as np
import pytest

from curate.errors import InputError
from mixers.law_optimum import smooth_optimum, wanted
from mixers.linear_law import LinearLaw, fit


def test_the_law_that_made_the_losses_is_found_again():
    generator = np.random.default_rng(0)
    corners = generator.uniform(2, 5, (4, 3))  # loss of each target at each corner
    mixtures = generator.dirichlet(np.ones(3), 20)
    found = fit(mixtures, mixtures @ corners.T)
    np.testing.assert_allclose(found.losses(np.eye(3)), corners.T, atol=1e-12)
    np.testing.assert_allclose(found.slopes.sum(1), 0, atol=1e-12)


def test_a_domain_that_no_run_has_gets_no_say():
    mixtures = np.random.default_rng(1).dirichlet(np.ones(2), 12)
    mixtures = np.column_stack([mixtures, np.zeros(12)])
    found = fit(mixtures, mixtures[:, :1] * -2 + 5)
    np.testing.assert_allclose(found.slopes, [[-1, 1, 0]], atol=1e-12)


def test_its_optimum_is_a_corner_until_the_penalty_makes_it_a_tilted_natural_mixture():
    law = LinearLaw(np.array([3.0]), np.array([[-0.2, 0.05, 0.15]]))
    natural = np.array([0.1, 0.6, 0.3])
    corner = smooth_optimum(law, wanted(3, 1, natural=natural))
    np.testing.assert_allclose(corner, [1, 0, 0], atol=1e-9)
    caps = smooth_optimum(law, wanted(3, 1, natural=natural, caps=[0.3, 0.5, 1]))
    np.testing.assert_allclose(caps, [0.3, 0.5, 0.2], atol=1e-9)
    held = smooth_optimum(law, wanted(3, 1, natural=natural, penalty=0.1))
    tilted = natural * np.exp(-law.slopes[0] / 0.1)
    np.testing.assert_allclose(held, tilted / tilted.sum(), atol=1e-6)


def test_too_few_runs_are_refused():
    with pytest.raises(InputError, match="3 runs are too few for 4 domains"):
        fit(np.eye(4)[:3], np.ones((3, 1)))
