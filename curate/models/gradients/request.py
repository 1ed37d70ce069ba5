"""What is asked of a pass, and what it gives.

Shapes: N examples, P rows and Q columns of a parameter, p and q of its projection.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from curate.models.gradients.forms import Form, LowRank
from curate.models.gradients.layout import Layout
from curate.models.gradients.sketch import Sketch

Direction = Mapping[str, Tensor | LowRank]
"""Parameter -> a gradient of its shape; a parameter that is missing counts as zero."""


class Sides(NamedTuple):
    """The two sides of a projection left^T G right."""

    left: Tensor
    """(P, p), P being the parameter's first axis; all but the last of a fused weight"""
    right: Tensor
    """(Q, q)"""


class Seen(NamedTuple):
    """One use of a parameter, as it comes on the way back."""

    name: str
    """Of the parameter."""
    form: Form
    layout: Layout
    """Which positions belong to which example."""
    uses: int
    """How many uses of the parameter there are in this pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a pass is to measure; all of it comes from the same one."""

    squares: bool = True
    """Squared gradient norms of every parameter."""
    sketch: Sketch | None = None
    """How squares are estimated where that is much cheaper; None: they are exact."""
    directions: Mapping[str, Direction] = field(default_factory=dict[str, Direction])
    """Any name -> a gradient, to take inner products with."""
    projections: Mapping[str, Sides] = field(default_factory=dict[str, Sides])
    """Parameter -> what to project its gradient on."""
    whole: Collection[str] = ()
    """Parameters whose gradients are wanted as they are, N times their size in memory."""
    tell: Callable[[Seen], None] | None = None
    """Told of every use of a parameter, but for those in a head whose logits are not kept and
    those that are measured the slow way."""


class Gradients(NamedTuple):
    """What was measured, for each example of the batch."""

    squares: dict[str, Tensor]
    """Parameter -> (N,) float64 squared norm of its gradient."""
    inner: dict[str, Tensor]
    """Direction -> (N,) float64 inner product over all its parameters."""
    projections: dict[str, Tensor]
    """Parameter -> (N, p, q)"""
    whole: dict[str, Tensor]
    """Parameter -> (N, ...) of the parameter's shape."""
    alone: dict[str, Tensor]
    """Parameter of the head -> (N,) float64 squared norm of the gradient of its use there alone;
    missing where it has no other use."""

    def total(self) -> Tensor:
        """(N,) float64 squared norm over all parameters."""
        return torch.stack(list(self.squares.values())).sum(0)
