"""Convolutions over one or two axes: a Linear layer on the patches that the kernel sees.

Grouped and depth-wise ones are one such layer for each group.

Shapes: N examples, C channels, O outputs, L places of the kernel, G groups, K numbers under it.
"""

from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn
from torch.nn import functional

from curate.models.gradients.forms import Form, Outer, Whole, raised
from curate.models.gradients.layout import Layout


def applies(module: nn.Module) -> bool:
    kind = type(module).forward
    return kind is nn.Conv2d.forward or kind is nn.Conv1d.forward


def forms(
    module: nn.Module, inputs: tuple[Tensor, ...], grad: Tensor, layout: Layout
) -> Iterator[tuple[str, Form]]:
    conv = cast("nn.Conv1d | nn.Conv2d", module)
    given, back = raised(inputs[0]), raised(grad)
    groups = conv.groups
    seen = _patches(conv, given)  # (n, C * K, L)
    seen = seen.unflatten(1, (groups, -1)).mT  # (n, G, L, K)
    out = back.flatten(2).unflatten(1, (groups, -1)).mT  # (n, G, L, O / G)
    # A row of the batch may hold several images; their places are put one after the other.
    right = layout.rows(seen, 3).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    left = layout.rows(out, 3).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    yield "weight", Outer(left, right, groups)
    if conv.bias is not None:
        yield "bias", Whole(layout.rows(back.flatten(2).sum(2)).sum(1))


def _patches(conv: nn.Conv1d | nn.Conv2d, given: Tensor) -> Tensor:
    padding = list(getattr(conv, "_reversed_padding_repeated_twice"))  # noqa: B009
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    given = functional.pad(given, padding, mode) if any(padding) else given
    kernel, dilation, stride = conv.kernel_size, conv.dilation, conv.stride
    if len(kernel) == 1:
        given = given.unsqueeze(2)
        kernel, dilation, stride = (1, *kernel), (1, *dilation), (1, *stride)
    return functional.unfold(given, kernel, dilation=dilation, stride=stride)
