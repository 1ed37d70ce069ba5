"""Small layers without a formula: the layer alone is run again for each example.

For layers with parameters of their own, no children and one tensor in and out: gains of a
residual branch, learned activations, unusual norms.

Shapes: N examples, T positions.
"""

import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call

from curate.models.gradients.forms import Form, Whole
from curate.models.gradients.layout import Layout

_MOST_NUMBERS = 1 << 16
"""Larger layers would fill the memory: they go the whole model's way."""


def applies(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    if next(module.children(), None) is not None or isinstance(module, nn.Embedding):
        return False
    if sum(parameter.numel() for parameter in own) > _MOST_NUMBERS:
        return False
    given = inspect.signature(module.forward).parameters.values()
    needed = [entry for entry in given if entry.default is entry.empty]
    return len(needed) == 1 and needed[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


def forms(
    module: nn.Module, inputs: tuple[Tensor, ...], grad: Tensor, layout: Layout
) -> Iterator[tuple[str, Form]]:
    if layout.owner is not None:
        given, back = layout.rows(inputs[0]), layout.rows(grad)
    else:
        given = inputs[0].unflatten(0, (layout.num_examples, -1))
        back = grad.unflatten(0, (layout.num_examples, -1))
    found: dict[str, list[Tensor]] = {}
    for one, gone in zip(given, back, strict=True):
        fresh = {
            name: parameter.detach().clone().requires_grad_()
            for name, parameter in module.named_parameters(recurse=False)
        }
        with torch.enable_grad():
            output = functional_call(module, fresh, (one.detach(),))
            grads = torch.autograd.grad(output, list(fresh.values()), gone)
        for name, value in zip(fresh, grads, strict=True):
            found.setdefault(name, []).append(value)
    for name, values in found.items():
        yield name, Whole(torch.stack(values))
