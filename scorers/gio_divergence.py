"""Estimates of KL(p_X || p_W) from nearest neighbours, in logarithms of distances.

Shapes: n target points, m selected points, d dimensions.
"""

import math

import torch
from torch import Tensor

FLOOR = 1e-5
"""Distances are at least this, so that a repeated point has a logarithm."""

_BLOCK_NUMBERS = 1 << 24
"""Distances that exist at a time while all candidates are looked at."""


def log_distances(points: Tensor, others: Tensor) -> Tensor:
    """Logarithms of all distances, by direct difference.

    Args:
        points: (n, d)
        others: (m, d)

    Returns:
        (n, m), at least ln(1e-5).
    """
    # |x|^2 - 2xy + |y|^2 would cancel where points are close, which is where it matters.
    far = torch.cdist(points, others, compute_mode="donot_use_mm_for_euclid_dist")
    return far.clamp_min_(FLOOR).log_()


def log_radii(target: Tensor, k: int) -> Tensor:
    """(n,) logarithm of the distance of each target point to its k-th neighbour, itself left out.

    Args:
        target: (n, d), n above k.
        k: 1 or more.
    """
    found: list[Tensor] = []
    start = 0
    for block in blocks_of(target, target):
        near = log_distances(block, target)
        rows = torch.arange(len(near), device=near.device)
        near[rows, rows + start] = torch.inf
        found.append(near.kthvalue(k, dim=1).values)
        start += len(block)
    return torch.cat(found)


def divergence(
    log_radius: Tensor, log_nearest: Tensor, *, d: int, k: int, own_k: int, m: int
) -> float:
    """KL_knn.

    Args:
        log_radius: (n,) ln rho_k of each target point.
        log_nearest: (n,) ln nu_l of each target point.
        d: dimensions.
        k: neighbour on the target's side.
        own_k: the l-th neighbour on the selection's side.
        m: selected points, at least own_k.
    """
    n = len(log_radius)
    mean = (log_nearest.double() - log_radius.double()).mean()
    return float(d * mean) + math.log(k * m / (own_k * (n - 1)))


def mean_divergence(log_radius: Tensor, mean_phi: float, *, d: int, k: int, m: int) -> float:
    """KL_avg, from the mean of phi over the m selected points."""
    n = len(log_radius)
    rest = math.log(k * m / (n - 1)) - math.lgamma(m + 1) / m
    return mean_phi - d * float(log_radius.double().mean()) + rest


def phi(target: Tensor, points: Tensor, own: Tensor | None = None) -> Tensor:
    """(m,) float64 mean log distance of each point to the target, times d.

    Args:
        target: (n, d)
        points: (m, d)
        own: (m,) the target point that each is a copy of, left out of its mean; -1 for none.
    """
    means: list[Tensor] = []
    start = 0
    for block in blocks_of(points, target):
        near = log_distances(block, target).double()
        total, count = near.sum(1), torch.full((len(block),), float(len(target)))
        if own is not None:
            mine = own[start : start + len(block)]
            has = (mine >= 0).nonzero()[:, 0]
            total[has] -= near[has, mine[has]]
            count[has.cpu()] -= 1
        means.append(total / count.to(total) * target.shape[1])
        start += len(block)
    return torch.cat(means)


def blocks_of(points: Tensor, others: Tensor) -> tuple[Tensor, ...]:
    """Rows of `points`, so many at a time that a table of distances to `others` stays small."""
    return points.split(max(1, _BLOCK_NUMBERS // max(1, len(others))))
