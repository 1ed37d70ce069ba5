"""Inputs projected in the forward pass: the same numbers, and less that is kept."""

from typing import Any

import pytest
import torch
from gradient_loop import batch_of, gradient_loop, wavy_losses
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from curate.models.gradients import Engine, Seen, Sides, Wanted


class Twice(nn.Module):
    """A layer that is called twice, a transposed one, and one whose input is another's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.second = Conv1D(10, 12)
        self.third = nn.Linear(12, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(torch.tanh(self.first(x))))
        return self.second(x) + self.third(x)


def twice() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Twice().double().eval()
        nn.init.normal_(model.second.weight)
    return model


def sides_of(model: nn.Module, dim: int = 2) -> dict[str, Sides]:
    draw = torch.Generator().manual_seed(1)

    def side(length: int) -> Tensor:
        return torch.randn(length, min(dim, length), generator=draw, dtype=torch.float64)

    return {
        name: Sides(side(p.shape[0]), side(p.shape[1] if p.dim() > 1 else 1))
        for name, p in model.named_parameters()
    }


def inputs(*shape: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(2)
    return batch_of(torch.randn(*shape, generator=draw, dtype=torch.float64))


def assert_projected(found: Any, whole: Any, sides: Any) -> None:
    assert found.keys() == sides.keys()
    for name, (left, right) in sides.items():
        wanted = left.T @ whole[name].reshape(len(whole[name]), len(left), -1) @ right
        torch.testing.assert_close(found[name].double(), wanted.double())


@pytest.mark.parametrize("shape", [(4, 12), (4, 5, 12)])
def test_layers_of_every_kind_have_the_projections_of_a_plain_loop(shape: tuple[int, ...]):
    model, batch = twice(), inputs(*shape)
    sides = sides_of(model)
    wanted = Wanted(squares=False, projections=sides)
    found = Engine(model).measure(wavy_losses, batch, num_examples=4, wanted=wanted)
    assert_projected(found.projections, gradient_loop(model, wavy_losses, batch), sides)


def test_what_else_is_wanted_comes_from_the_same_pass():
    """Squares, a direction, whole gradients or what is told need the input itself."""
    model, batch = twice(), inputs(4, 5, 12)
    sides, whole = sides_of(model), gradient_loop(model, wavy_losses, batch)
    told: list[Seen] = []
    direction = {"first.weight": torch.ones(12, 12).double()}
    for wanted in (
        Wanted(projections=sides),
        Wanted(squares=False, projections=sides, directions={"one": direction}),
        Wanted(squares=False, projections=sides, whole=["second.weight"]),
        Wanted(squares=False, projections=sides, tell=told.append),
    ):
        found = Engine(model).measure(wavy_losses, batch, num_examples=4, wanted=wanted)
        assert_projected(found.projections, whole, sides)
        if found.squares:
            squares = whole["third.weight"].flatten(1).square().sum(1)
            torch.testing.assert_close(found.squares["third.weight"], squares)
        if found.inner:
            torch.testing.assert_close(found.inner["one"], whole["first.weight"].sum((1, 2)))
        if found.whole:
            torch.testing.assert_close(found.whole["second.weight"], whole["second.weight"])
    right = {seen.form.right.shape[-1] for seen in told if seen.name == "third.weight"}  # pyright: ignore
    assert right == {12}


def language_model(**options: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=40,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, **options).eval()


def token_losses(model: nn.Module, batch: Any) -> Tensor:
    ids = batch["ids"]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    each = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return each.view(len(ids), -1).sum(1)


def tokens() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {"ids": torch.randint(0, 40, (3, 16), generator=draw)}


def body_sides(model: nn.Module) -> dict[str, Sides]:
    sides = sides_of(model)
    return {
        name: Sides(*(side.float() for side in pair))
        for name, pair in sides.items()
        if "proj" in name
    }


def saved_numbers(model: nn.Module, wanted: Wanted) -> int:
    """Numbers of all tensors that autograd keeps for the way back, one storage once."""
    engine = Engine(model, only=wanted.projections.__contains__)
    engine.measure(token_losses, tokens(), num_examples=3)  # compares itself with autograd
    kept: dict[int, Tensor] = {}

    def pack(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value
        return value

    with saved_tensors_hooks(pack, lambda value: value):
        engine.measure(token_losses, tokens(), num_examples=3, wanted=wanted)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(
        value.untyped_storage().nbytes() // 4 for place, value in kept.items()
        if place not in weights
    )  # fmt: skip


def test_less_is_kept_for_the_way_back():
    """Of each block at least the input of the last layer, of the output layer, and of q, k, v."""
    model = language_model()
    sides = body_sides(model)
    small = saved_numbers(model, Wanted(squares=False, projections=sides))
    large = saved_numbers(model, Wanted(squares=True, projections=sides))
    assert large - small >= 2 * 3 * 16 * (64 + 32)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("way", ["plain", "checkpointed", "bfloat16"])
def test_a_language_model_has_the_projections_of_a_plain_loop(way: str):
    model = language_model(dtype=torch.bfloat16) if way == "bfloat16" else language_model()
    sides = body_sides(model)
    exact = gradient_loop(language_model().double(), token_losses, tokens())
    if way == "checkpointed":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    engine = Engine(model, only=sides.__contains__)
    wanted = Wanted(squares=False, projections=sides)
    found = engine.measure(token_losses, tokens(), num_examples=3, wanted=wanted).projections
    error = 0.1 if way == "bfloat16" else 1e-4
    for name, (left, right) in sides.items():
        truth = left.double().T @ exact[name] @ right.double()
        distance = (found[name].double() - truth).flatten(1).norm(dim=1)
        assert (distance <= error * truth.flatten(1).norm(dim=1)).all(), name
        assert found[name].dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_half_precision_is_projected_the_same_on_a_gpu():
    found: dict[str, dict[str, Tensor]] = {}
    for device in ("cpu", "cuda"):
        model = language_model(dtype=torch.bfloat16).to(device)
        sides = {name: Sides(*(s.sign().to(device) for s in pair))
                 for name, pair in body_sides(model).items()}  # fmt: skip
        engine = Engine(model, only=sides.__contains__)
        batch = {key: value.to(device) for key, value in tokens().items()}
        wanted = Wanted(squares=False, projections=sides)
        found[device] = engine.measure(
            token_losses, batch, num_examples=3, wanted=wanted
        ).projections
    for name, value in found["cpu"].items():
        distance = (found["cuda"][name].cpu() - value).norm()
        assert distance <= 0.1 * value.norm(), name
