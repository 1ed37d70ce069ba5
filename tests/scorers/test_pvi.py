"""PVI against closed forms and, through training, against the answers it should give."""

import math

import pytest
import torch

from curate.errors import ConfigError
from scorers.pvi import PVI


def pvi(null: float, given: float) -> float:
    """Of one example, from the probabilities that the two models give its answer."""
    quantities = {
        "null_bits": torch.tensor([-math.log2(null)], dtype=torch.float64),
        "given_bits": torch.tensor([-math.log2(given)], dtype=torch.float64),
    }
    return float(PVI().score(quantities)["pvi"][0])


@pytest.mark.parametrize(("given", "bits"), [(0.9, 1.432959), (0.05, -2.736966), (1.0, 1.584963)])
def test_with_a_uniform_prior_of_three_classes_it_is_the_published_arithmetic(
    given: float, bits: float
):
    assert pvi(1 / 3, given) == pytest.approx(bits, abs=1e-6)


def test_a_model_that_ignores_its_input_has_none():
    assert pvi(0.37, 0.37) == 0


def test_the_prior_bounds_it():
    assert pvi(0.25, 1.0) == 2.0
    assert all(pvi(0.25, given) <= 2.0 for given in (0.01, 0.3, 0.9999))


def test_the_number_of_folds_is_bounded():
    assert PVI(folds=5).folds == 5
    for folds in (1, 6):
        with pytest.raises(ConfigError, match=f"folds is {folds}"):
            PVI(folds=folds)
