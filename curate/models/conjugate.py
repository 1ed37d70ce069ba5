"""The damped exact answer, by conjugate gradients on Gauss-Newton products; a check of the others.

    H v = 1/n sum_b c_b sum_t J_bt^T ( diag(p) - p p^T ) J_bt v      one jvp, one vjp
    (H + d) u = g_q;  score(i, q) = <g_i, u>

p the softmax of a position's logits, J their derivative; c_b = 1 for losses that are sums over
tokens and 1/n_b for means. This is the Fisher matrix with labels drawn from the model, in full.

Source: Martens, "Deep learning via Hessian-free optimization", ICML 2010; Pearlmutter, "Fast Exact
Multiplication by the Hessian", 1994, for the products.
Departures: d may differ from layer to layer, as EK-FAC's does. An approximate inverse, such as
EK-FAC's own, can precondition: it changes how soon the answer is found, not the answer.
Cost: about two training steps over the sample for each iteration and query.

Shapes: M counted positions, V classes or tokens, n examples.
"""

import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from curate.models.example_losses import Reduction
from curate.models.tasks import Batch, Task

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 20.0

Vector = dict[str, Tensor]
"""Parameter -> a tensor of its shape."""


class Solved(NamedTuple):
    """What conjugate gradients reached."""

    solution: Vector
    residual: float
    """|b - A x| / |b|"""
    num_iterations: int


class GaussNewton:
    """Products of vectors with the mean curvature of some examples.

    Args:
        model: in eval mode.
        task: that makes the batches.
        batches: of all examples, on the model's device.
        names: parameters that the vectors are over.
        reduction: of an example's loss over its counted positions.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        batches: Sequence[Batch],
        names: Sequence[str],
        *,
        reduction: Reduction = "sum",
    ) -> None:
        self._logits = _Logits(model, task)
        self._batches = list(batches)
        self._reduction = reduction
        known = dict(model.named_parameters())
        self._values = {name: known[name].detach() for name in names}
        self._num = sum(len(next(iter(batch.values()))) for batch in batches)
        with torch.no_grad():  # what a task finds out about a model, it finds out in a plain call
            self._logits(self._batches[0])

    @torch.no_grad()
    def product(self, vector: Mapping[str, Tensor]) -> Vector:
        """H v."""
        total = {name: torch.zeros_like(value) for name, value in self._values.items()}
        tangents = ({name: vector[name] for name in self._values},)
        for batch in self._batches:

            def forward(values: Vector, batch: Batch = batch) -> Tensor:
                named = {f"model.{name}": value for name, value in values.items()}
                return functional_call(self._logits, named, (batch,))

            # Fused attention has no derivative in forward mode.
            with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of torch, about itself
                found: Any = jvp(forward, (self._values,), tangents)
                logits, moved = found
                pulled: Any = vjp(forward, self._values)[1](self._outer(logits, moved))
            for name, value in pulled[0].items():
                total[name] += value
        return {name: value / self._num for name, value in total.items()}

    def _outer(self, logits: Tensor, moved: Tensor) -> Tensor:
        """(M, V) curvature of the loss with respect to the logits, times `moved`."""
        share = logits.softmax(1)
        found = share * (moved - (share * moved).sum(1, keepdim=True))
        if self._reduction == "sum":
            return found
        owner = self._logits.owner
        assert owner is not None
        return found / owner.bincount()[owner][:, None].to(found)


def conjugate_gradients(
    product: Callable[[Vector], Vector],
    right: Mapping[str, Tensor],
    damping: Mapping[str, float],
    *,
    inverse: Callable[[Vector], Vector] | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 200,
) -> Solved:
    """x with (A + damping) x = right, for a product with a positive semidefinite A.

    Args:
        product: A v.
        right: the right side.
        damping: parameter -> what is added to A's diagonal, above 0.
        inverse: about (A + damping)^-1 v, symmetric and positive definite; None: v itself.
        tolerance: of the residual, as a share of the right side's length.
        max_iterations: after which the last one is given, and the log says so.
    """
    x = {name: torch.zeros_like(value) for name, value in right.items()}
    rest = {name: value.clone() for name, value in right.items()}
    turned = rest if inverse is None else inverse(rest)
    along = dict(turned)
    start = _dot(rest, rest)
    square, slope = start, _dot(rest, turned)
    iterations = 0
    told = time.monotonic()
    while iterations < max_iterations and square > tolerance**2 * start:
        moved = product(along)
        moved = {name: value + damping[name] * along[name] for name, value in moved.items()}
        step = slope / _dot(along, moved)
        x = {name: value + step * along[name] for name, value in x.items()}
        rest = {name: value - step * moved[name] for name, value in rest.items()}
        turned = rest if inverse is None else inverse(rest)
        square, before, slope = _dot(rest, rest), slope, _dot(rest, turned)
        along = {name: value + slope / before * along[name] for name, value in turned.items()}
        iterations += 1
        if time.monotonic() > told + _SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            log.info("conjugate gradients: %d iterations of at most %d, %.1e is left",
                     iterations, max_iterations, (square / start) ** 0.5)  # fmt: skip
    residual = (square / start) ** 0.5 if start > 0 else 0.0
    if residual > tolerance:
        log.warning("conjugate gradients stopped after %d steps with a residual of %.1e",
                    iterations, residual)  # fmt: skip
    return Solved(x, residual, iterations)


class _Logits(nn.Module):
    """The logits of the counted positions as a module, so that parameters can be replaced."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self._task = task
        self.owner: Tensor | None = None

    def forward(self, batch: Batch) -> Tensor:
        flat = self._task.logits_and_targets(self.model, dict(batch))
        self.owner = flat.owner
        return flat.logits


def _dot(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    return float(sum((one[name].double() * two[name].double()).sum() for name in one))
