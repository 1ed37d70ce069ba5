"""Each scorer's own numbers; the shared pass is tested with `curate.models.quantities`."""

import math

import pytest
import torch

from curate.errors import ConfigError
from scorers.catalog import build_scorer
from scorers.el2n import EL2N
from scorers.entropy import Entropy
from scorers.length import Length
from scorers.loss import Loss
from scorers.margin import Margin
from scorers.random import Random, uniform


def test_el2n_is_the_mean_norm_and_the_whole_matrix_norm():
    norms = {"error_norms": torch.tensor([0.744609]), "error_frob": torch.tensor([1.467701])}
    found = EL2N().score(norms)
    assert found["el2n"].item() == pytest.approx(0.744609)
    assert found["el2n_frob"].item() == pytest.approx(1.467701)


def test_perplexity_is_the_exponential_of_the_loss_and_stays_finite():
    found = Loss().score({"loss": torch.tensor([0.0, math.log(50), 5000.0])})
    assert found["perplexity"].tolist() == pytest.approx([1.0, 50.0, math.exp(88)], rel=1e-5)
    assert torch.isfinite(found["perplexity"]).all()
    assert found["loss"][2] == 5000.0


def test_margin_over_checkpoints_is_the_published_area():
    """Logits (2,1), (0,1), (1,0), (0,2), (3,0) with y = 0: margins 1, -1, 1, -2, 3; mean 0.4."""
    import numpy as np

    from curate.models.quantities import terms
    from scorers.apply import columns_of

    logits = torch.tensor([[2.0, 1], [0, 1], [1, 0], [0, 2], [3, 0]])
    margins = terms(logits, torch.zeros(5, dtype=torch.long)).margin
    assert margins.tolist() == [1, -1, 1, -2, 3]
    each = [{"margin": np.array([value])} for value in margins.tolist()]
    assert columns_of(Margin(), each, [0] * 5)["margin"][0] == pytest.approx(0.4)


def test_entropy_and_length_hand_on_what_was_measured():
    assert Entropy().score({"entropy": torch.tensor([0.7])})["entropy"].item() == pytest.approx(0.7)
    found = Length().score({"num_tokens": torch.tensor([3.0]), "num_chars": torch.tensor([9.0])})
    assert (found["num_tokens"].item(), found["num_chars"].item()) == (3, 9)


def test_random_draws_are_uniform_and_below_one():
    draws = uniform([("s", "f", row) for row in range(20_000)], seed=0)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = torch.histc(draws, bins=10, min=0, max=1)
    # 2,000 expected in each tenth, standard deviation 42.
    assert (counts - 2000).abs().max() < 200
    assert Random().score({"uniform": draws})["random"] is draws


def test_a_random_draw_depends_on_seed_and_key_and_on_nothing_else():
    one = uniform([("s", "f", 5)], seed=0)
    assert uniform([("s", "f", 4), ("s", "f", 5)], seed=0)[1] == one
    others = [(("s", "f", 5), 1), (("s", "f", 6), 0), (("s", "g", 5), 0), (("sf", "", 5), 0)]
    assert all(uniform([key], seed=seed) != one for key, seed in others)


def test_an_option_that_a_scorer_does_not_have_is_refused_by_its_key():
    with pytest.raises(ConfigError, match=r"score\.scorers\.el2n.*scale"):
        build_scorer("el2n", {"scale": 2})
