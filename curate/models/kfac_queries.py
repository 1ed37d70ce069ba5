"""Queries of EK-FAC: preconditioned once, compressed, and then directions of the gradient engine.

Shapes: Q queries, O outputs and I inputs of a layer.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from curate.models.gradients import LowRank
from curate.models.gradients.request import Direction
from curate.models.kfac import Curvature, low_rank
from curate.models.kfac_layers import Layer


def query_directions(
    gradients: Mapping[str, Tensor],
    curvatures: Mapping[str, Curvature],
    layers: Sequence[Layer],
    *,
    rank: int | None = None,
) -> tuple[list[Direction], float]:
    """H^-1 G_q of each query, compressed layer by layer; and the mean share of length kept.

    Args:
        gradients: layer -> (Q, O, I).
        curvatures: from `damped`.
        layers: of the gradients.
        rank: of each layer's matrix; None for all of it.
    """
    num = len(next(iter(gradients.values())))
    found: list[dict[str, Tensor | LowRank]] = [{} for _ in range(num)]
    shares: list[float] = []
    for layer in layers:
        own = curvatures[layer.name]
        solved = own.inverse(gradients[layer.name].to(own.left))
        for i, matrix in enumerate(solved):
            sides, share = low_rank(matrix, rank or min(matrix.shape))
            shares.append(share)
            like = gradients[layer.name]
            found[i] |= layer.direction(LowRank(sides.left.to(like), sides.right.to(like)))
    return [dict(one) for one in found], sum(shares) / max(1, len(shares))
