"""Token weights against the tables of the formulas and plain loops."""

import math
from typing import Any

import pytest
import torch

from curate.errors import ConfigError
from mixers.token_weights import (
    TokenWeights,
    focal_weights,
    talr_temperature,
    talr_weights,
    tldr_weights,
    token_weights,
)

P = torch.tensor([0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 1], dtype=torch.float64)
NLL = -P.log()
LOSSES = -torch.tensor([[0.9, 0.5, 0.1], [0.25, 0.75, 1.0]], dtype=torch.float64).log()
COUNTED = torch.tensor([[True, True, True], [True, True, False]])


def test_weights_by_probability_are_those_of_the_tables():
    tldr = [2, 1.9995, 1.9511, 1.7071, 1, 0.2929, 0.0489, 0]
    assert tldr_weights(NLL).tolist() == pytest.approx(tldr, abs=6e-5)
    focal = [1, 0.9801, 0.81, 0.5625, 0.25, 0.0625, 0.01, 0]
    assert focal_weights(NLL).tolist() == pytest.approx(focal, abs=1e-9)
    talr = [0.01, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 1]
    assert talr_weights(NLL, 1).tolist() == pytest.approx(talr, abs=1e-9)
    root = [0.01, 0.1, 0.3162, 0.5, 0.7071, 0.8660, 0.9487, 1]
    assert talr_weights(NLL, 2).tolist() == pytest.approx(root, abs=6e-5)


def test_at_an_infinite_temperature_talr_is_the_plain_loss():
    assert talr_weights(NLL[1:], math.inf).tolist() == [1] * 7
    assert focal_weights(NLL, gamma=0).tolist() == [1] * 8


def test_the_temperature_of_talr_is_the_median_of_the_sequences():
    assert float(talr_temperature(torch.tensor([3.0, 1, 2]))) == 2
    assert float(talr_temperature(torch.tensor([3.0, 1, 2, 8]))) == 2.5
    assert float(talr_temperature(torch.tensor([0.0, 0]))) == 1e-6
    found = token_weights(LOSSES, COUNTED, TokenWeights(kind="talr"))
    means = [
        (-math.log(0.9) - math.log(0.5) - math.log(0.1)) / 3,
        (-math.log(0.25) - math.log(0.75)) / 2,
    ]
    tau = sum(means) / 2
    assert found[0].tolist() == pytest.approx([p ** (1 / tau) for p in (0.9, 0.5, 0.1)])
    assert found[1].tolist() == pytest.approx([0.25 ** (1 / tau), 0.75 ** (1 / tau), 0])
    given = token_weights(LOSSES, COUNTED, TokenWeights(kind="talr"), temperature=2.0)
    assert float(given[0, 1]) == pytest.approx(0.5**0.5)


def test_a_whole_sequence_weighs_by_its_mean_probability():
    found = token_weights(LOSSES, COUNTED, TokenWeights(kind="tldr", by_sequence=True))
    assert found[0].tolist() == pytest.approx([math.cos(math.pi * 0.5) + 1] * 3)
    assert found[1].tolist() == pytest.approx([1, 1, 0])


def test_scaled_to_mean_one_over_the_counted_tokens():
    found = token_weights(LOSSES, COUNTED, TokenWeights(kind="focal", unit_mean=True))
    assert float(found.sum()) == pytest.approx(5)
    assert float(found[0, 1] / found[1, 0]) == pytest.approx(0.25 / 0.5625)


def test_the_gradient_flows_through_the_weight_only_where_asked_for():
    def gradient(settings: TokenWeights) -> float:
        loss = torch.tensor([[math.log(2)]], dtype=torch.float64, requires_grad=True)
        weights = token_weights(loss, torch.tensor([[True]]), settings)
        (weights * loss).sum().backward()
        assert loss.grad is not None
        return float(loss.grad)

    assert gradient(TokenWeights(kind="tldr")) == pytest.approx(1)
    # d/dl [(cos(pi e^-l) + 1) l] at l = ln 2:  1 + ln 2 * sin(pi / 2) * pi / 2
    flowing = TokenWeights(kind="tldr", detach=False)
    assert gradient(flowing) == pytest.approx(1 + math.log(2) * math.pi / 2)


def test_a_batch_without_targets_has_no_weights():
    none = torch.zeros(2, 3, dtype=torch.bool)
    for kind in ("tldr", "focal", "talr"):
        settings = TokenWeights(kind=kind, unit_mean=True)
        assert token_weights(LOSSES, none, settings).tolist() == [[0] * 3] * 2


@pytest.mark.parametrize(
    "options",
    [{"kind": "tdlr"}, {"kind": "focal", "gamma": -1}, {"kind": "talr", "by_sequence": True}],
)
def test_settings_that_mean_nothing_are_refused(options: dict[str, Any]):
    with pytest.raises(ConfigError):
        TokenWeights(**options)
