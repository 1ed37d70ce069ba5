"""Norms in float32 against `vmap(grad)`, to a hundred-thousandth; and what adding up must give."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from curate.models.gradients import Engine

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def class_losses(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def token_losses(model: nn.Module, batch: Any) -> Tensor:
    """Sums over the targets that are not masked."""
    logits = model(batch["ids"], use_cache=False).logits[:, :-1]
    losses = functional.cross_entropy(logits.mT, batch["ids"][:, 1:], reduction="none")
    return (losses * batch["counted"]).sum(1)


def mean_token_losses(model: nn.Module, batch: Any) -> Tensor:
    return token_losses(model, batch) / batch["counted"].sum(1)


def network(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


def transformer(*, tied: bool) -> nn.Module:
    """Two blocks with norms before their parts, learned positions."""
    sizes: dict[str, Any] = {"vocab_size": 31, "n_embd": 24, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**sizes, n_positions=16, tie_word_embeddings=tied)
    config._attn_implementation = "eager"  # pyright: ignore[reportPrivateUsage]
    return GPT2LMHeadModel(config).eval()


def vectors() -> dict[str, Tensor]:
    return {"x": torch.randn(5, 7), "y": torch.tensor([0, 2, 1, 1, 0])}


def images() -> dict[str, Tensor]:
    return {"x": torch.randn(4, 2, 9, 8), "y": torch.tensor([0, 2, 1, 1])}


def texts() -> dict[str, Tensor]:
    ids = torch.randint(0, 31, (4, 12))
    ids[0, 2] = ids[0, 7]
    counted = (torch.rand(4, 11) < 0.7).float()
    counted[:, 0] = 1
    return {"ids": ids, "counted": counted}


CASES: dict[str, Any] = {
    "mlp": (lambda: network(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3)), class_losses, vectors),
    "cnn": (
        lambda: network(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(),
                        nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(36, 3)),
        class_losses, images,
    ),
    "transformer": (lambda: transformer(tied=False), token_losses, texts),
    "transformer, mean": (lambda: transformer(tied=False), mean_token_losses, texts),
    "transformer, tied": (lambda: transformer(tied=True), token_losses, texts),
    "transformer, tied, mean": (lambda: transformer(tied=True), mean_token_losses, texts),
}  # fmt: skip


def by_vmap(model: nn.Module, losses: Any, batch: dict[str, Tensor]) -> Tensor:
    """(N,) norms of the gradients that torch.func gives."""

    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, given: Any) -> Tensor:
            return losses(self.model, given).sum()

    values = {f"model.{name}": p.detach() for name, p in model.named_parameters()}

    def loss_of(values: dict[str, Tensor], one: dict[str, Tensor]) -> Tensor:
        alone = {key: value[None] for key, value in one.items()}
        return functional_call(Scored(), values, (alone,))

    found: dict[str, Tensor] = vmap(grad(loss_of), in_dims=(None, 0))(values, batch)
    return torch.cat([value.flatten(1) for value in found.values()], 1).double().norm(dim=1)


@pytest.mark.parametrize("name", CASES)
def test_norms_are_those_of_vmap(name: str):
    torch.manual_seed(0)
    make, losses, given = CASES[name]
    model, batch = make(), given()
    engine = Engine(model)
    found = engine.measure(losses, batch, num_examples=len(next(iter(batch.values()))))
    torch.testing.assert_close(
        found.total().sqrt(), by_vmap(model, losses, batch), rtol=1e-5, atol=0
    )
    assert engine.slow == []


def test_norms_add_up_to_the_norm_of_the_sum_only_where_gradients_are_parallel():
    torch.manual_seed(0)
    model, batch = network(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3)), vectors()
    same = {key: value[[1, 1, 1]] for key, value in batch.items()}
    for given, is_parallel in ((batch, False), (same, True)):
        num = len(given["y"])
        norms = Engine(model).measure(class_losses, given, num_examples=num).total().sqrt()
        grads = torch.autograd.grad(class_losses(model, given).sum(), list(model.parameters()))
        whole = torch.cat([each.flatten() for each in grads]).double().norm()
        assert norms.sum() >= whole * (1 - 1e-6)
        assert torch.isclose(norms.sum(), whole, rtol=1e-5).item() is is_parallel
