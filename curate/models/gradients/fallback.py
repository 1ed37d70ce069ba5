"""Parameters that no layer's rule covers: the whole model is differentiated for each example.

A bare class token, a relative-position bias: what is used without a call that has an example axis.

Shapes: N examples.
"""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from curate.errors import CurateError
from curate.models.batches import is_out_of_memory

log = logging.getLogger(__name__)

Batch = Mapping[str, Tensor]
Losses = Callable[[nn.Module, Batch], Tensor]
"""(model, batch) -> (N,) loss of each example, the sum or mean over its counted positions."""


class _Scored(nn.Module):
    """The loss as a module, so that parameters can be replaced for a call."""

    def __init__(self, model: nn.Module, losses: Losses) -> None:
        super().__init__()
        self.model = model
        self._losses = losses

    def forward(self, batch: Batch) -> Tensor:
        return self._losses(self.model, batch).sum()


def one_by_one(
    model: nn.Module, losses: Losses, batch: Batch, names: Sequence[str]
) -> dict[str, Tensor]:
    """Gradients (N, ...) of the named parameters, by `torch.func`, all examples at a time.

    Where it cannot follow the model, by autograd, example by example.

    Args:
        model: no parameter of it requires a gradient.
        losses: of a batch of one too.
        batch: tensors whose first axis is the example.
        names: parameters as `named_parameters` has them.

    Raises:
        CurateError: the loss of a single example cannot be had; names the first parameter.
    """
    scored = _Scored(model, losses)
    parameters = dict(model.named_parameters())
    chosen = {f"model.{name}": parameters[name].detach() for name in names}

    def loss_of(values: dict[str, Tensor], one: dict[str, Tensor]) -> Tensor:
        alone = {key: value[None] for key, value in one.items()}
        return functional_call(scored, values, (alone,))

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel runs one example at a time
            found = vmap(grad(loss_of), in_dims=(None, 0), randomness="error")(chosen, dict(batch))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        # A mask that is looked into (`if mask.all()`), for instance, cannot be followed.
        log.info("torch.func cannot follow the model, examples go one by one: %s", error)
        return _loop(model, losses, batch, names)
    return {name.removeprefix("model."): value for name, value in found.items()}


def _loop(
    model: nn.Module, losses: Losses, batch: Batch, names: Sequence[str]
) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    parameters = dict(model.named_parameters())
    for i in range(min(len(value) for value in batch.values())):
        one = {key: value[i : i + 1] for key, value in batch.items()}
        weight = torch.ones((), device=parameters[names[0]].device)
        try:
            grads = weighted_gradients(model, losses, one, weight, names)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            raise CurateError(
                f"the gradient of parameter {names[0]} cannot be measured for each example:"
                f" {(str(error).strip().splitlines() or [type(error).__name__])[0]}",
                fix="freeze it, or measure a subset of the parameters without it",
            ) from error
        for name in names:
            found[name].append(grads.get(name, torch.zeros_like(parameters[name])))
    return {name: torch.stack(values) for name, values in found.items()}


def weighted_gradients(
    model: nn.Module, losses: Losses, batch: Batch, weights: Tensor, names: Sequence[str]
) -> dict[str, Tensor]:
    """Gradients of the weighted sum of the losses, by one plain pass; no entry where there is none.

    Args:
        model: no parameter of it requires a gradient.
        losses: of the batch.
        batch: of N examples.
        weights: (N,)
        names: parameters as `named_parameters` has them.
    """
    parameters = dict(model.named_parameters())
    chosen = [parameters[name] for name in names]
    for parameter in chosen:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            total = (losses(model, batch) * weights).sum()
        if not total.requires_grad:
            return {}
        grads = cast(
            tuple[Tensor | None, ...], torch.autograd.grad(total, chosen, allow_unused=True)
        )
    finally:
        for parameter in chosen:
            parameter.requires_grad_(False)
    return {name: value for name, value in zip(names, grads, strict=True) if value is not None}
