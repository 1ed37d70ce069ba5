"""Inputs that are projected in the forward pass, where only projections are wanted.

A Linear layer's input is kept for the way back. Of (x P_i) only p columns are kept in its place,
while x is still in the cache; layers behind, whose own gradients need x, keep it all the same.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from curate.models.gradients.capture import Shrink
from curate.models.gradients.forms import Form, Outer, onto, product
from curate.models.gradients.request import Sides, Wanted
from curate.models.gradients.rules import linear

_WORTH = 2
"""How many times fewer columns must be left."""


def shrink_inputs(wanted: Wanted, weight_of: Callable[[nn.Module], str | None]) -> Shrink | None:
    """What is kept of Linear layers' inputs; None where more than projections is wanted of all.

    Args:
        wanted: of the pass.
        weight_of: Linear layer -> name of its weight, if its rule measures it.
    """
    if wanted.squares or wanted.tell is not None or not wanted.projections:
        return None
    others = {name for direction in wanted.directions.values() for name in direction}
    chosen = wanted.projections.keys() - others - set(wanted.whole)

    def shrink(module: nn.Module, given: Tensor) -> Tensor | None:
        name = weight_of(module)
        if name is None or name not in chosen:
            return None
        side = wanted.projections[name][0 if linear.is_transposed(module) else 1]
        if _WORTH * side.shape[1] > side.shape[0]:
            return None
        with torch.no_grad():
            return onto(given, side)

    return shrink


def finish(module: nn.Module, form: Form, sides: Sides) -> Tensor:
    """(N, p, q) the projection of a weight, from the form of an input that was shrunk."""
    assert isinstance(form, Outer)
    if linear.is_transposed(module):
        return product(form.left.mT, onto(form.right, sides.right))
    return product(onto(form.left, sides.left).mT, form.right)
