"""What is said of the layers whose curvature is taken."""

import logging

import pytest

from curate.models.kfac_layers import layers_of
from curate.models.mlp import MLP


def test_what_counts_is_said_once_for_models_of_one_kind(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            layers_of(MLP(num_features=4, num_classes=3, hidden=(7,)))
        assert caplog.text.count("curvature of 2 layers with 100 %") == 1
        layers_of(MLP(num_features=4, num_classes=3, hidden=(7, 5)))
    assert caplog.text.count("curvature of") == 2
