"""Optimiser steps against torch's own AdamW, the learning rate, and going back to a state."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from curate.errors import ConfigError
from curate.models.optimiser import Optimiser, learning_rate, own_random_state
from curate.models.settings import Train

CPU = torch.device("cpu")


class _Loss(NamedTuple):
    mean: Tensor


class _Net(nn.Module):
    """A tied matrix, a norm, dropout and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6, bias=True)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.3)
        self.tied = nn.Linear(6, 6, bias=False)
        self.tied.weight = self.first.weight
        self.frozen = nn.Linear(6, 1)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.tied(self.drop(self.norm(self.first(x)))))


def _net() -> _Net:
    torch.manual_seed(0)
    return _Net()


def _data(steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 6, generator=generator) for _ in range(steps)]


def _loss(x: Tensor):
    return lambda model: _Loss(model(x).square().mean())  # pyright: ignore[reportUnknownLambdaType]


def _optimiser(settings: Train, total: int = 10, seed: int = 0) -> Optimiser:
    return Optimiser(_net(), settings, seed=seed, total_steps=total, device=CPU)


def test_steps_are_those_of_adamw_written_out():
    settings = Train(lr=0.01, weight_decay=0.1, clip_norm=0.5, warmup=0.0, schedule="constant")
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(4, 3)
    weights = model.weight.detach().double().clone()
    bias = model.bias.detach().double().clone()
    optimiser = Optimiser(model, settings, seed=0, total_steps=3, device=CPU)
    first = [torch.zeros_like(weights), torch.zeros_like(bias)]
    second = [torch.zeros_like(weights), torch.zeros_like(bias)]
    for step in range(1, 4):
        x = torch.randn(7, 4, generator=generator)
        optimiser.step(_loss(x))
        # The formulas of AdamW (Loshchilov and Hutter, algorithm 2), gradients by hand.
        out = x.double() @ weights.T + bias
        error = 2 * out / out.numel()
        gradients = [error.T @ x.double(), error.sum(0)]
        norm = torch.sqrt(sum(g.square().sum() for g in gradients) + torch.zeros(()))
        gradients = [g * min(1.0, 0.5 / float(norm)) for g in gradients]
        decays = (0.1, 0.0)  # the bias does not decay
        for i, value in enumerate((weights, bias)):
            first[i] = 0.9 * first[i] + 0.1 * gradients[i]
            second[i] = 0.999 * second[i] + 0.001 * gradients[i].square()
            corrected = first[i] / (1 - 0.9**step)
            root = (second[i] / (1 - 0.999**step)).sqrt() + 1e-8
            value -= 0.01 * decays[i] * value + 0.01 * corrected / root
    torch.testing.assert_close(model.weight.detach().double(), weights, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.bias.detach().double(), bias, rtol=0, atol=1e-6)
    moments = optimiser.moments()
    torch.testing.assert_close(moments.gradient["weight"].double(), first[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(moments.square["bias"].double(), second[1], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_optimiser_goes_on_to_the_bit_dropout_and_running_means_included(stop: int):
    settings = Train(lr=0.01)
    data = _data(8)
    whole = _optimiser(settings)
    for x in data:
        whole.step(_loss(x))
    part = _optimiser(settings)
    for x in data[:stop]:
        part.step(_loss(x))
    tensors = {name: tensor.detach().clone() for name, tensor in part.state().items()}
    facts = part.facts()
    torch.manual_seed(12345)  # another process has another random state
    resumed = _optimiser(settings)
    resumed.load(tensors, facts)
    for x in data[stop:]:
        resumed.step(_loss(x))
    expected = whole.model.state_dict()
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert resumed.facts() == whole.facts()


def test_dropout_differs_between_steps_and_seeds():
    settings = Train(lr=1e-12, weight_decay=0.0)

    def losses(seed: int) -> list[float]:
        optimiser = _optimiser(settings, seed=seed)
        x = torch.ones(5, 6) * torch.arange(5.0)[:, None]
        return [optimiser.step(_loss(x)).losses.mean.item() for _ in range(4)]

    assert losses(0) == losses(0)
    assert len(set(losses(0))) == 4
    assert not set(losses(0)) & set(losses(1))


def test_frozen_parameters_stay_and_are_not_kept_for_resuming():
    optimiser = _optimiser(Train(lr=0.1))
    before = optimiser.model.get_parameter("frozen.weight").clone()
    optimiser.step(_loss(_data(1)[0]))
    assert torch.equal(optimiser.model.get_parameter("frozen.weight"), before)
    assert not [name for name in optimiser.state() if "frozen" in name]
    names = [name for name in optimiser.state() if name.startswith("weight.")]
    assert names == ["weight.first.weight", "weight.first.bias", "weight.norm.weight",
                     "weight.norm.bias"]  # fmt: skip


def test_the_learning_rate_rises_to_its_peak_and_falls_to_almost_nothing():
    settings = Train(lr=2.0, warmup=0.1, schedule="linear")
    rates = [learning_rate(step, total_steps=100, settings=settings) for step in range(1, 101)]
    assert rates[:3] == pytest.approx([0.2, 0.4, 0.6])
    assert max(rates) == rates[9] == 2.0
    assert rates[54] == pytest.approx(2.0 * (1 - 45 / 91))
    assert rates[-1] == pytest.approx(2.0 / 91)


def test_cosine_is_at_half_in_the_middle_and_constant_stays():
    cosine = Train(lr=1.0, warmup=0.0, schedule="cosine")
    assert learning_rate(50, total_steps=99, settings=cosine) == pytest.approx(0.5)
    constant = Train(lr=1.0, warmup=0.5, schedule="constant")
    assert learning_rate(99, total_steps=100, settings=constant) == 1.0


@given(
    st.integers(1, 300),
    st.floats(0, 1),
    st.sampled_from(["cosine", "linear", "constant"]),
)
def test_every_step_has_a_positive_rate_at_most_the_peak(total: int, warmup: float, schedule: str):
    settings = Train(lr=3.0, warmup=warmup, schedule=schedule)  # pyright: ignore[reportArgumentType]
    for step in range(1, total + 1):
        assert 0 < learning_rate(step, total_steps=total, settings=settings) <= 3.0


def test_a_cpu_cannot_train_in_float16():
    with pytest.raises(ConfigError, match="bfloat16"):
        Optimiser(
            _net(), Train(), seed=0, total_steps=1, device=CPU, dtype="float16"
        )  # fmt: skip


def test_bfloat16_computes_in_half_and_keeps_whole_weights():
    seen = list[torch.dtype]()
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 1))
    model[0].register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    optimiser = Optimiser(model, Train(lr=0.1), seed=0, total_steps=1, device=CPU, dtype="bfloat16")
    optimiser.step(_loss(_data(1)[0]))
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in optimiser.model.parameters()} == {torch.float32}


def test_the_caller_keeps_its_random_state():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with own_random_state(CPU):
        _optimiser(Train(lr=0.1)).step(_loss(_data(1)[0]))
    assert torch.equal(torch.rand(3), expected)
