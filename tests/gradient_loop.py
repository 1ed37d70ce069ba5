"""Per-example gradients the plain way: autograd on one example at a time, nothing of ours."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]
Losses = Callable[[nn.Module, Batch], Tensor]


def gradient_loop(model: nn.Module, losses: Losses, batch: Batch) -> dict[str, Tensor]:
    """Parameter -> (N, ...) gradients in float64; zeros where a parameter has no part."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found: dict[str, list[Tensor]] = {name: [] for name in named}
    for i in range(len(next(iter(batch.values())))):
        one = {key: value[i : i + 1] for key, value in batch.items()}
        total = losses(model, one).sum()
        grads: Any = torch.autograd.grad(total, list(named.values()), allow_unused=True)
        for name, grad in zip(named, grads, strict=True):
            value = torch.zeros_like(named[name]) if grad is None else grad
            found[name].append(value.double())
    return {name: torch.stack(values) for name, values in found.items()}


def squares_of(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.flatten(1).square().sum(1) for name, values in gradients.items()}


def assert_squares(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, rtol: float = 1e-9
) -> None:
    """Every parameter's squares agree, to `rtol` of themselves or 1e-3 of it of the total."""
    assert list(found) == list(wanted)
    total = torch.stack(list(wanted.values())).sum(0)
    for name, values in wanted.items():
        distance = (found[name] - values).abs()
        assert bool((distance <= rtol * values + 1e-3 * rtol * total).all()), (
            f"{name}: {found[name].tolist()} is not {values.tolist()}"
        )


def wavy_losses(model: nn.Module, batch: Batch) -> Tensor:
    """(N,) a loss of any module with one input `x`, different for each example and position."""
    output = model(batch["x"]).flatten(1)
    phase = torch.arange(output.shape[1], dtype=output.dtype)
    return ((output + phase).sin() * batch["c"][:, None]).sum(1)


def batch_of(x: Tensor) -> dict[str, Tensor]:
    scale = 0.5 + torch.arange(len(x), dtype=torch.float64)
    return {"x": x, "c": scale.to(x.dtype if x.is_floating_point() else torch.float64)}
