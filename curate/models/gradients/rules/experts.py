"""Experts of a mixture, fused into 3-D weights: a Linear layer for each pair (example, expert).

    h = act(gate) * up,  [gate, up] = W1_e x_t        y_t += w_te W2_e h

The hidden gradient is computed again from the input, so that it does not matter which kernel ran
the experts. Different experts are different rows of the parameter: their squares add up.

Shapes: S tokens of the batch, k experts of each, E experts, H width, I width of an expert,
M pairs (example, expert) that occur.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from curate.errors import CurateError
from curate.models.gradients.forms import Form, Outer, Routed, raised
from curate.models.gradients.layout import Layout

_NAMES = {"gate_up_proj", "down_proj"}


class _Slots(NamedTuple):
    """One row for each (token, expert it is sent to)."""

    given: Tensor
    """(S * k, H)"""
    before: Tensor
    """(S * k, 2 I), with a graph that begins here"""
    after: Tensor
    """(S * k, I)"""
    token: Tensor
    expert: Tensor
    weight: Tensor


def applies(module: nn.Module) -> bool:
    """Whether the module computes the formula above, seen on a trial input."""
    own = dict(module.named_parameters(recurse=False))
    if own.keys() != _NAMES or any(value.dim() != 3 for value in own.values()):
        return False
    if getattr(module, "is_transposed", False) or not hasattr(module, "act_fn"):
        return False
    first = own["gate_up_proj"]
    count, _, width = first.shape
    num = 2 * count
    hidden = torch.linspace(-2, 2, num * width, device=first.device).view(num, width)
    hidden = hidden.to(first.dtype)
    index = torch.arange(num, device=first.device)[:, None] % count
    weight = torch.linspace(0.5, 1, num, device=first.device)[:, None].to(first.dtype)
    try:
        with torch.no_grad():
            found = cast(Any, module)(hidden, index, weight)
            slots = _slots(module, hidden, index, weight)
            out = _by_expert(slots.after, cast(Tensor, module.down_proj), slots.expert)
            wanted = torch.zeros_like(hidden, dtype=out.dtype)
            wanted.index_add_(0, slots.token, out * slots.weight[:, None])
    except (TypeError, RuntimeError, ValueError, AttributeError):
        return False
    tolerance = 0.03 if first.dtype.itemsize == 2 else 1e-4
    scale = float(wanted.abs().max())
    return found.shape == wanted.shape and torch.allclose(
        found.to(wanted.dtype), wanted, rtol=tolerance, atol=tolerance * scale
    )


def forms(
    module: nn.Module, inputs: tuple[Tensor, ...], grad: Tensor, layout: Layout
) -> Iterator[tuple[str, Form]]:
    hidden, index, weight = inputs
    slots = _slots(module, hidden, index, weight)
    down = cast(Tensor, module.down_proj)
    back = raised(grad)[slots.token] * slots.weight[:, None]  # (slots, H)
    moved = _by_expert(back, down.mT, slots.expert)  # (slots, I)
    with torch.enable_grad():
        (inner,) = torch.autograd.grad(slots.after, slots.before, moved)
    count = down.shape[0]
    owners = layout.owners(len(hidden))
    if owners is None:
        raise CurateError(
            f"experts were given {len(hidden)} tokens, which do not divide into"
            f" {layout.num_examples} examples",
            fix="leave the experts out of the parameters that are measured",
        )
    owner = owners.to(hidden.device)[slots.token]
    present = owner >= 0  # not padding between packed examples
    owner, expert = owner[present], slots.expert[present]
    pairs, place = torch.unique(owner * count + expert, return_inverse=True)
    by_pair = Layout(len(pairs), place)
    routes = (pairs // count, pairs % count, layout.num_examples, count)
    for name, left, right in (
        ("gate_up_proj", inner, slots.given),
        ("down_proj", back, slots.after.detach()),
    ):
        yield (
            name,
            Routed(Outer(by_pair.rows(left[present]), by_pair.rows(right[present])), *routes),
        )


def _slots(module: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor) -> _Slots:
    first = cast(Tensor, module.gate_up_proj)
    token, column = torch.nonzero(index < len(first), as_tuple=True)
    expert = index[token, column]
    given = raised(hidden)[token]
    before = _by_expert(given, first, expert).detach().requires_grad_()
    with torch.enable_grad():
        after = _gated(module, before)
    return _Slots(given, before, after, token, expert, raised(weight)[token, column])


def _gated(module: nn.Module, before: Tensor) -> Tensor:
    own = getattr(module, "_apply_gate", None)
    if own is not None:
        return own(before)
    gate, up = before.chunk(2, dim=-1)
    return cast(Any, module.act_fn)(gate) * up


def _by_expert(values: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
    """Each row through the matrix of its expert."""
    found = values.new_empty(len(values), weight.shape[1])
    for number in torch.unique(expert).tolist():
        chosen = expert == number
        found[chosen] = functional.linear(values[chosen], raised(weight[number]))
    return found
