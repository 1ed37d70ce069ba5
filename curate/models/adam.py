"""What Adam would make of an example's gradient, from the moments of a training run.

    m_i = beta1 M + (1 - beta1) g_i          v_i = beta2 V + (1 - beta2) g_i^2
    exact      Gamma_i = m_i / sqrt(v_i + eps)
    diagonal   Gamma_i = g_i / sqrt(V + eps)
    factored   as diagonal, with V + eps ~ r c^T / mean(r), r and c being means of rows and columns

The first is of section 3.1 of LESS and not linear in the gradient. The third scales the two sides
of a gradient, whose projection then costs what it cost before.

Source: Xia et al., "LESS: Selecting influential data for targeted instruction tuning", ICML 2024,
arXiv:2402.04333; Shazeer and Stern, "Adafactor", ICML 2018, arXiv:1804.04235 (the factors).
Departures: moments are corrected for their start at 0, as Adam does and the authors' code does not:
within a checkpoint that is one factor for all rows, but dot products of an early checkpoint and a
late one need it. eps is the square of the optimiser's own: with gradients of norm 1 the 1e-8 of the
authors' code exceeds V itself in models of more than 1e8 parameters. V is raised to the 1st
percentile of its numbers above 0, so that what hardly any batch has moved is not blown up.
Cost: exact and diagonal write out each example's gradient, as many products as an ordinary weight
gradient, and 2 P Q p more for the projection.

Shapes: N examples, P rows and Q columns of a parameter.
"""

import math
from typing import Literal, NamedTuple

from torch import Tensor

AdamForm = Literal["exact", "diagonal", "factored"]

_LOWEST_SHARE = 0.01


class Moment(NamedTuple):
    """Adam's state of one parameter."""

    gradient: Tensor
    """M, of the parameter's shape."""
    square: Tensor
    """V, likewise."""
    step: float
    """Updates that are in them."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    """As the optimiser has it, outside the root."""


class Update(NamedTuple):
    """(offset + gain * g) / sqrt(base + growth * g^2), for any gradient g of one parameter."""

    offset: Tensor
    """(P, Q) the part of the first moment that is there already, or zeros (1, 1)."""
    gain: float
    base: Tensor
    """(P, Q) the part of the second one, with eps."""
    growth: float

    def of(self, gradients: Tensor) -> Tensor:
        """(N, P, Q) updates from gradients (N, P, Q)."""
        root = (gradients.square() * self.growth + self.base).rsqrt_()
        return (gradients * self.gain + self.offset).mul_(root)

    def rows(self, chosen: slice) -> "Update":
        """The same for some rows of the parameter."""
        offset = self.offset if len(self.offset) == 1 else self.offset[chosen]
        return self._replace(offset=offset, base=self.base[chosen])


def exact_update(moment: Moment) -> Update:
    """The step that Adam would take next, were its batch this one example.

    Args:
        moment: with tensors (P, Q).
    """
    beta1, beta2 = moment.betas
    first, second = (1 - beta ** (moment.step + 1) for beta in moment.betas)
    return Update(
        offset=moment.gradient * (beta1 / first),
        gain=(1 - beta1) / first,
        base=floored(moment.square) * (beta2 / second) + moment.eps**2,
        growth=(1 - beta2) / second,
    )


def diagonal_update(moment: Moment) -> Update:
    """The gradient over the root of the second moment.

    Args:
        moment: with tensors (P, Q).
    """
    return Update(moment.square.new_zeros(1, 1), 1.0, _spread(moment), 0.0)


def factored_scales(moment: Moment) -> tuple[Tensor, Tensor]:
    """(P,) and (Q,) what rows and columns of a gradient are multiplied by.

    Args:
        moment: with tensors (P, Q).
    """
    spread = _spread(moment)
    rows, columns = spread.mean(1), spread.mean(0)
    return (rows.mean() / rows).sqrt(), columns.rsqrt()


def floored(square: Tensor) -> Tensor:
    """Second moments, those below the 1st percentile of the ones above 0 raised to it."""
    moved = square[square > 0]
    if not len(moved):
        return square
    lowest = moved.kthvalue(math.ceil(_LOWEST_SHARE * len(moved))).values
    return square.clamp(min=float(lowest))


def _spread(moment: Moment) -> Tensor:
    """(P, Q) V + eps."""
    return floored(moment.square) / (1 - moment.betas[1] ** moment.step) + moment.eps**2
