"""Confidence and correctness of data maps: the page's sequence, gaps and the epoch limit."""

import math

import numpy as np
import pytest
import torch

from curate.errors import ConfigError
from scorers.catalog import build_scorer
from scorers.confidence import Confidence

LOGITS = np.array([[2.0, 1], [0, 1], [1, 0], [0, 2], [3, 0]])
"""Five epochs, two classes, y = 0."""
PROBABILITIES = np.exp(LOGITS[:, 0]) / np.exp(LOGITS).sum(1)


def history(probabilities: np.ndarray, correct: np.ndarray) -> dict[str, torch.Tensor]:
    """(E,) or (E, N) as quantities; a NaN probability is a round without the example."""
    rounds = len(probabilities)
    return {
        "loss_by_epoch": torch.from_numpy(-np.log(probabilities)).reshape(rounds, -1),
        "correct_by_epoch": torch.from_numpy(correct.astype(np.float64)).reshape(rounds, -1),
    }


PUBLISHED = history(PROBABILITIES, LOGITS[:, 0] > LOGITS[:, 1])


def test_the_published_sequence_has_the_published_mean():
    assert PROBABILITIES.tolist() == pytest.approx(
        [0.731059, 0.268941, 0.731059, 0.119203, 0.952574], 1e-5
    )
    found = Confidence().score(PUBLISHED)
    assert found["confidence"].item() == pytest.approx(0.560567, abs=1e-6)
    assert found["correctness"].item() == 3
    mean = 0.560567
    assert found["threshold_closeness"].item() == pytest.approx(mean * (1 - mean), abs=1e-6)


def test_a_round_without_the_example_does_not_count():
    probabilities = np.array([[0.9, 0.9], [np.nan, 0.5], [0.3, 0.3]])
    correct = np.array([[1.0, 1], [np.nan, 1], [0, 0]])
    found = Confidence().score(history(probabilities, correct))
    assert found["confidence"].tolist() == pytest.approx([0.6, (0.9 + 0.5 + 0.3) / 3])
    assert found["correctness"].tolist() == [1, 2]


def test_an_example_that_was_never_shown_has_no_value():
    nothing = np.full(3, np.nan)
    found = Confidence().score(history(nothing, nothing))
    assert all(math.isnan(column.item()) for column in found.values())


def test_it_looks_up_to_the_epoch_that_is_asked_for():
    found = Confidence(epochs=2).score(PUBLISHED)
    assert found["confidence"].item() == pytest.approx(PROBABILITIES[:2].mean())
    assert found["correctness"].item() == 1
    whole = Confidence(epochs=50).score(PUBLISHED)["confidence"]
    assert whole.item() == pytest.approx(PROBABILITIES.mean())


def test_an_epoch_limit_of_none_at_all_is_refused():
    with pytest.raises(ConfigError, match="epochs is 0"):
        build_scorer("confidence", {"epochs": 0})
