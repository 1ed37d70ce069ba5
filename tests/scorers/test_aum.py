"""Area under the margin: the page's sequence, its shift, gaps and the epochs that count."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from curate.errors import ConfigError
from curate.models.quantities import terms
from scorers.aum import AUM
from scorers.catalog import build_scorer

LOGITS = torch.tensor([[2.0, 1], [0, 1], [1, 0], [0, 2], [3, 0]], dtype=torch.float64)
"""Five epochs, two classes, y = 0."""
MARGINS = torch.tensor([[1.0], [-1], [1], [-2], [3]], dtype=torch.float64)


def scored(margins: Tensor, **options: Any) -> list[float]:
    return AUM(**options).score({"margin_by_epoch": margins})["aum"].tolist()


def test_the_published_sequence_has_the_published_area():
    assert scored(MARGINS) == pytest.approx([0.4])
    assert scored(MARGINS, skip_first=1) == pytest.approx([0.25])


def test_a_constant_added_to_all_logits_changes_nothing():
    labels = torch.zeros(5, dtype=torch.long)
    for shift in (0.0, 100.0, -7.5):
        margins = terms(LOGITS + shift, labels).margin[:, None]
        torch.testing.assert_close(margins, MARGINS)
        assert scored(margins) == pytest.approx([0.4])


def test_a_round_without_the_example_does_not_count():
    margins = torch.tensor([[1.0, math.nan], [math.nan, math.nan], [4.0, -3.0]])
    assert scored(margins) == [2.5, -3.0]
    assert math.isnan(scored(torch.full((2, 1), math.nan))[0])


def test_it_looks_from_and_up_to_the_epochs_that_are_asked_for():
    assert scored(MARGINS, epochs=3) == pytest.approx([1 / 3])
    assert scored(MARGINS, skip_first=1, epochs=3) == pytest.approx([0])


def test_skipping_every_epoch_of_a_run_is_refused():
    with pytest.raises(ConfigError, match=r"the run has 5, skip_first is 5"):
        scored(MARGINS, skip_first=5)
    with pytest.raises(ConfigError, match="no epoch is left"):
        build_scorer("aum", {"skip_first": 2, "epochs": 2})
    with pytest.raises(ConfigError, match="skip_first is -1"):
        build_scorer("aum", {"skip_first": -1})
