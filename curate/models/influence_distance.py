"""How far fast influence scores are from the damped exact ones, on a few queries.

The exact ones take conjugate gradients, minutes for each query on a small model: this says whether
an approximation can be trusted for a model and its data, and is no way to score.

Shapes: n examples, Q queries.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from curate.models.conjugate import GaussNewton, Vector, conjugate_gradients
from curate.models.example_losses import Reduction
from curate.models.kfac import Curvature
from curate.models.kfac_layers import Layer
from curate.models.kfac_pass import KFACPass
from curate.models.kfac_queries import query_directions
from curate.models.quantities import to_device
from curate.models.tasks import Encoded, Task

log = logging.getLogger(__name__)

QUERIES = 10


class Distance(NamedTuple):
    """Means over the queries."""

    relative_error: float
    """|approximate - exact| / |exact|, after the one factor that fits best: 0 is equal but for a
    scale, which no ranking sees."""
    scale: float
    """That factor, the median: exact over approximate."""
    pearson: float
    spearman: float
    num_queries: int


def distance(approximate: Tensor, exact: Tensor) -> Distance:
    """How far scores are from others.

    Args:
        approximate: (n, Q)
        exact: (n, Q)
    """
    one, two = approximate.double(), exact.double()
    square = one.square().sum(0)
    scale = torch.where(square > 0, (one * two).sum(0) / square, torch.zeros_like(square))
    error = (one * scale - two).norm(dim=0) / two.norm(dim=0)
    return Distance(
        float(error.mean()),
        float(scale.median()),
        float(_correlation(one, two).mean()),
        float(_correlation(_ranks(one), _ranks(two)).mean()),
        one.shape[1],
    )


def exact_scores(
    model: nn.Module,
    task: Task,
    encoded: Encoded,
    chosen: np.ndarray,
    queries: np.ndarray,
    *,
    layers: Sequence[Layer],
    damping: Mapping[str, float],
    device: torch.device,
    reduction: Reduction = "sum",
    batch_tokens: int = 4096,
    curvatures: Mapping[str, Curvature] | None = None,
    tolerance: float = 1e-5,
    residuals: list[float] | None = None,
) -> Tensor:
    """(n, Q) float64 g_i^T (H + d)^-1 g_q, H the Gauss-Newton matrix of the chosen examples.

    Args:
        model: in eval mode, on `device`.
        task: that encoded the examples.
        encoded: holds both.
        chosen: (n,) positions of the training examples.
        queries: (Q,) positions of the queries.
        layers: whose parameters count.
        damping: layer -> d.
        device: where the model is.
        reduction: of an example's loss over its counted positions.
        batch_tokens: budget of a batch.
        curvatures: of EK-FAC with the same damping, to find the same solution in fewer steps.
        tolerance: of the solution.
        residuals: told what each query's solution leaves, as a share of the query's length.
    """
    engine = KFACPass(
        model, task, layers, batch_tokens=batch_tokens, device=device, reduction=reduction
    )
    names = [name for layer in layers for name in layer.parameters]
    share = {name: damping[layer.name] for layer in layers for name in layer.parameters}
    size = max(1, batch_tokens // int(encoded.lengths[chosen].max()))
    batches = [
        to_device(task.collate(encoded, chosen[start : start + size]), device)
        for start in range(0, len(chosen), size)
    ]
    curvature = GaussNewton(model, task, batches, names, reduction=reduction)
    inverse = None if curvatures is None else ekfac_inverse(curvatures, layers)
    directions: list[dict[str, Tensor]] = []
    for number, right in enumerate(engine.parameter_gradients(encoded, queries), 1):
        solved = conjugate_gradients(
            curvature.product, right, share, inverse=inverse, tolerance=tolerance
        )
        directions.append(solved.solution)
        log.info("influence: query %d of %d took %d iterations, %.1e of it is left",
                 number, len(queries), solved.num_iterations, solved.residual)  # fmt: skip
        if residuals is not None:
            residuals.append(solved.residual)
    return engine.scores(encoded, chosen, directions)


def ekfac_inverse(
    curvatures: Mapping[str, Curvature], layers: Sequence[Layer]
) -> Callable[[Vector], Vector]:
    """Gives H^-1 v of a vector over the parameters of some layers.

    Args:
        curvatures: layer -> from `damped`.
        layers: whose parameters the vectors are over.
    """

    def inverse(vector: Vector) -> Vector:
        found: Vector = {}
        for layer in layers:
            own = curvatures[layer.name]
            joined = layer.joined({name: vector[name][None] for name in layer.parameters})
            solved = own.inverse(joined.to(own.left)).to(joined)
            parts = layer.separated(solved, vector)
            found |= {name: value[0] for name, value in parts.items()}
        return found

    return inverse


def ekfac_distance(
    engine: KFACPass,
    encoded: Encoded,
    chosen: np.ndarray,
    queries: np.ndarray,
    *,
    curvatures: Mapping[str, Curvature],
    exact: Tensor,
    rank: int | None = None,
) -> Distance:
    """How far EK-FAC is from the damped exact answer.

    Args:
        engine: of the model.
        encoded: as in `exact_scores`.
        chosen: likewise.
        queries: likewise.
        curvatures: of EK-FAC, fitted on the chosen examples.
        exact: (n, Q) from `exact_scores` with the same damping.
        rank: of the queries; None: not compressed.
    """
    gradients = engine.gradients(encoded, queries)
    directions, _ = query_directions(gradients, curvatures, engine.layers, rank=rank)
    return distance(engine.scores(encoded, chosen, directions), exact)


def _correlation(one: Tensor, two: Tensor) -> Tensor:
    """(Q,) of the columns; 0 where one of them is constant."""
    one, two = one - one.mean(0), two - two.mean(0)
    product = one.norm(dim=0) * two.norm(dim=0)
    return torch.where(product > 0, (one * two).sum(0) / product, torch.zeros_like(product))


def _ranks(values: Tensor) -> Tensor:
    """(n, Q) mean ranks of ties."""
    found = torch.empty_like(values)
    for column in range(values.shape[1]):
        _, place, counts = values[:, column].unique(return_inverse=True, return_counts=True)
        ends = counts.cumsum(0).to(values)
        found[:, column] = (ends - (counts.to(values) - 1) / 2)[place]
    return found
