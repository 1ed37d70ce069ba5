"""Variability of data maps: the page's sequence, both forms, gaps and the epoch limit."""

import math
import statistics
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from curate.errors import ConfigError
from scorers.catalog import build_scorer
from scorers.variability import Variability

LOGITS = np.array([[2.0, 1], [0, 1], [1, 0], [0, 2], [3, 0]])
"""Five epochs, two classes, y = 0."""
PROBABILITIES = np.exp(LOGITS[:, 0]) / np.exp(LOGITS).sum(1)


def scored(probabilities: np.ndarray, **options: Any) -> dict[str, Tensor]:
    losses = torch.from_numpy(-np.log(probabilities)).reshape(len(probabilities), -1)
    return Variability(**options).score({"loss_by_epoch": losses})


def test_the_published_sequence_has_the_population_deviation():
    found = scored(PROBABILITIES)
    assert found["variability"].item() == pytest.approx(0.313577, abs=1e-6)
    assert found["variability"].item() != pytest.approx(0.350590, abs=1e-3)
    assert found["variability_ci"].item() == pytest.approx(0.317407, abs=1e-6)


def test_a_round_without_the_example_does_not_count():
    generator = np.random.default_rng(0)
    probabilities = generator.uniform(0.01, 0.99, (7, 30))
    probabilities[generator.random((7, 30)) < 0.3] = np.nan
    found = scored(probabilities)
    for index in range(30):
        shown = [float(p) for p in probabilities[:, index] if not math.isnan(p)]
        if len(shown) < 2:
            continue
        variance = statistics.pvariance(shown)
        wider = (variance + variance**2 / (len(shown) - 1)) ** 0.5
        assert found["variability"][index].item() == pytest.approx(variance**0.5)
        assert found["variability_ci"][index].item() == pytest.approx(wider)


def test_one_presentation_has_no_spread_and_a_constant_one_has_none():
    found = scored(np.array([[0.4, np.nan, 0.5], [np.nan, np.nan, 0.5]]))
    for column in found.values():
        assert math.isnan(column[0])
        assert math.isnan(column[1])
        assert column[2].item() == 0


def test_it_looks_up_to_the_epoch_that_is_asked_for():
    found = scored(PROBABILITIES, epochs=3)["variability"].item()
    assert found == pytest.approx(statistics.pstdev(PROBABILITIES[:3].tolist()))


def test_an_epoch_limit_of_none_at_all_is_refused():
    with pytest.raises(ConfigError, match="epochs is -1"):
        build_scorer("variability", {"epochs": -1})
