"""GIO: which examples, added to a selection, make it look most like the target.

Greedily lowers an estimate of KL(p_X || p_W) between target X (n points) and selection W (m points)
in d dimensions. With rho_k(i) the distance of x_i to its k-th neighbour in X without itself, and
nu_l(i) that to its l-th neighbour in W:

    KL_knn = (d/n) sum_i [ln nu_l(i) - ln rho_k(i)] + ln(k m / (l (n - 1)))
    KL_avg = mean over l = 1..m of KL_knn, which is
             mean_w phi(w) - (d/n) sum_i ln rho_k(i) + ln(k m / (n - 1)) - ln(m!)/m
             with phi(w) = (d/n) sum_i ln ||x_i - w||

Source: Everaert and Potts, "GIO: Gradient Information Optimization for Training Dataset Selection",
ICLR 2024, arXiv:2306.11670.

Departures: the authors' code minimises KL_avg, to which each point adds the same whatever is
selected already: it fills one mode of the target before it touches another. `knn` with l = 1 is the
default here; its gain is submodular, so that a lazy greedy search over the pool (or its k-means
centroids) is exact and no gradient is needed. `avg` is there for comparison. The start is a given
selection, or one point of the pool, or random ones; noise far from the target, the authors'
default, makes the first hundred additions arbitrary.
Cost: n (target) x C (candidates) distances once, then about n for each candidate looked at again.
Shapes: n target points, C candidates, m selected points, d dimensions.
"""

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

FLOOR = 1e-5
"""Distances are at least this, so that a repeated point has a logarithm."""

_BLOCK_NUMBERS = 1 << 24
"""Distances that exist at a time while all candidates are looked at."""


class Step(NamedTuple):
    """One addition."""

    candidate: int
    divergence: float
    """After it."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What was added, in order."""

    steps: tuple[Step, ...]
    start: float
    """Divergence before the first addition."""
    shares: tuple[float, ...]
    """For each step the share of target points whose nearest selected point it is."""
    why: str
    """Why it ended: `increase`, `budget`, `max_steps` or `exhausted`."""


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
    return far.clamp_min(FLOOR).log()


def log_radii(target: Tensor, k: int) -> Tensor:
    """(n,) logarithm of the distance of each target point to its k-th neighbour, itself left out.

    Args:
        target: (n, d), n above k.
        k: 1 or more.
    """
    found: list[Tensor] = []
    size = max(1, _BLOCK_NUMBERS // len(target))
    for start in range(0, len(target), size):
        near = log_distances(target[start : start + size], target)
        rows = torch.arange(len(near), device=near.device)
        near[rows, rows + start] = torch.inf
        found.append(near.kthvalue(k, dim=1).values)
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


def phi(target: Tensor, points: Tensor) -> Tensor:
    """(m,) float64 mean log distance of each point to the target, times d."""
    size = max(1, _BLOCK_NUMBERS // len(target))
    means = [
        log_distances(block, target).double().mean(1) * target.shape[1]
        for block in points.split(size)
    ]
    return torch.cat(means)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """When the search ends."""

    patience: int = 1
    """Additions in a row that do not lower the divergence; they are taken back."""
    max_steps: int | None = None
    budget: float | None = None
    """Sum of the candidates' sizes, copies not counted; the last addition may go beyond it."""


def select(
    target: Tensor,
    pool: Tensor,
    start: Tensor,
    *,
    k: int = 5,
    own_k: int = 1,
    estimator: Literal["knn", "avg"] = "knn",
    sizes: Tensor | None = None,
    stop: Stop = Stop(),
) -> Selection:
    """Add the candidate that lowers the divergence most, one after the other.

    Equal candidates are taken in their order. Each is taken once.

    Args:
        target: (n, d), n above k.
        pool: (C, d) candidates.
        start: (m, d) what is selected already, m at least own_k.
        k: neighbour on the target's side.
        own_k: the l-th neighbour on the selection's side; not used by `avg`.
        estimator: `knn` covers the target, `avg` is the authors' and does not.
        sizes: (C,) what each candidate adds to `stop.budget`; 1 each where it is None.
        stop: when the search ends.
    """
    log_radius = log_radii(target, k)
    d = target.shape[1]
    if estimator == "avg":
        chosen = _by_phi(target, pool, start, log_radius, k)
        first = mean_divergence(
            log_radius, float(phi(target, start).mean()), d=d, k=k, m=len(start)
        )
    else:
        search = _Lazy(target, pool, start) if own_k == 1 else _Plain(target, pool, start, own_k)
        first = divergence(log_radius, search.nearest, d=d, k=k, own_k=own_k, m=len(start))
        chosen = _by_gain(search, log_radius, d=d, k=k, own_k=own_k, m=len(start))
    steps, why = _until(chosen, first, stop, sizes)
    added = torch.tensor([step.candidate for step in steps], dtype=torch.int64)
    return Selection(steps, first, _shares(target, pool[added.to(pool.device)]), why)


def _until(
    chosen: Iterator[Step], first: float, stop: Stop, sizes: Tensor | None
) -> tuple[tuple[Step, ...], str]:
    """The steps up to the end, those that did not lower the divergence taken back."""
    steps: list[Step] = []
    best, kept, spent = first, 0, 0.0
    for step in chosen:
        steps.append(step)
        if step.divergence < best:
            best, kept = step.divergence, len(steps)
        elif len(steps) - kept >= stop.patience:
            return tuple(steps[:kept]), "increase"
        spent += 1.0 if sizes is None else float(sizes[step.candidate])
        if stop.budget is not None and spent >= stop.budget:
            return tuple(steps[:kept]), "budget"
        if stop.max_steps is not None and len(steps) >= stop.max_steps:
            return tuple(steps[:kept]), "max_steps"
    return tuple(steps[:kept]), "exhausted"


def _by_phi(
    target: Tensor, pool: Tensor, start: Tensor, log_radius: Tensor, k: int
) -> Iterator[Step]:
    """KL_avg depends on the mean of phi alone: the best order is that of phi."""
    total, m = float(phi(target, start).sum()), len(start)
    values = phi(target, pool)
    for candidate in values.argsort(stable=True).tolist():
        total, m = total + float(values[candidate]), m + 1
        yield Step(candidate, mean_divergence(log_radius, total / m, d=target.shape[1], k=k, m=m))


class _Lazy:
    """l = 1: gains only shrink, so that most need not be computed again."""

    def __init__(self, target: Tensor, pool: Tensor, start: Tensor) -> None:
        self.target, self.pool = target, pool
        self.nearest = log_distances(target, start).amin(1)  # (n,)
        gains = torch.cat([self._gains(block) for block in _blocks(pool, target)])
        self._heap = [(-gain, candidate) for candidate, gain in enumerate(gains.tolist())]
        heapq.heapify(self._heap)

    def best(self) -> int | None:
        """The candidate with the largest gain, the first of equals; None where none is left."""
        while self._heap:
            _, candidate = self._heap[0]
            gain = float(self._gains(self.pool[candidate : candidate + 1])[0])
            heapq.heapreplace(self._heap, (-gain, candidate))
            if self._heap[0][1] == candidate:
                return candidate
        return None

    def add(self, candidate: int) -> None:
        heapq.heappop(self._heap)
        own = log_distances(self.pool[candidate : candidate + 1], self.target)[0]
        self.nearest = torch.minimum(self.nearest, own)

    def _gains(self, points: Tensor) -> Tensor:
        """(m,) float64 mean decrease of ln nu_1."""
        near = log_distances(points, self.target)  # (m, n)
        return (self.nearest - near).clamp_min(0).double().mean(1)


class _Plain:
    """Any own_k: every candidate is looked at in every step, over a matrix of all distances."""

    def __init__(self, target: Tensor, pool: Tensor, start: Tensor, own_k: int) -> None:
        self._near = log_distances(pool, target)  # (C, n)
        self._own = (
            log_distances(target, start).topk(own_k, largest=False).values
        )  # (n, l) ascending
        self._free = torch.ones(len(pool), dtype=torch.bool, device=pool.device)

    @property
    def nearest(self) -> Tensor:
        """(n,) ln nu_l"""
        return self._own[:, -1]

    def best(self) -> int | None:
        if not self._free.any():
            return None
        floor = self._own[:, -2] if self._own.shape[1] > 1 else None
        after = self._near if floor is None else torch.maximum(self._near, floor)
        gains = (self.nearest - after).clamp_min(0).double().mean(1)
        return int(gains.masked_fill(~self._free, -1).argmax())

    def add(self, candidate: int) -> None:
        self._free[candidate] = False
        both = torch.cat([self._own, self._near[candidate][:, None]], 1)
        self._own = both.topk(self._own.shape[1], largest=False).values


def _by_gain(
    search: _Lazy | _Plain, log_radius: Tensor, *, d: int, k: int, own_k: int, m: int
) -> Iterator[Step]:
    while (candidate := search.best()) is not None:
        search.add(candidate)
        m += 1
        yield Step(candidate, divergence(log_radius, search.nearest, d=d, k=k, own_k=own_k, m=m))


def _blocks(pool: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    return pool.split(max(1, _BLOCK_NUMBERS // len(target)))


def _shares(target: Tensor, added: Tensor) -> tuple[float, ...]:
    """Share of the target points that are nearest to each added point."""
    if len(added) == 0:
        return ()
    owner = torch.cat([log_distances(block, added).argmin(1) for block in _blocks(target, added)])
    return tuple((owner.bincount(minlength=len(added)) / len(target)).tolist())
