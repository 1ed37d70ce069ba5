"""The published search of GIO: descend to a free point, then take the pool point nearest to it.

    v <- v - lr * s * grad_v KL(X || W + v),   s = ||v_0|| / ||grad KL at v_0||, fixed at the start

It is here to compare with. KL_avg has a logarithmic singularity at every target point and the
length of a step does not shrink, so that v bounces among the target points instead of converging:
which pool point is taken follows the rounding of the last digits. What the authors' code does
wrong is not done here: a selection's start is no part of it, a rejected candidate is not lost, and
`patience` counts.

Shapes: n target points, C candidates, m selected points, d dimensions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from curate.config import STRICT
from scorers.gio_divergence import (
    FLOOR,
    divergence,
    log_distances,
    log_radii,
    mean_divergence,
    phi,
)
from scorers.gio_search import Selection, Step, Stop, until


@dataclass(frozen=True, slots=True, kw_only=True)
class Descent:
    """Options of the authors' `fit`, with its defaults."""

    __pydantic_config__: ClassVar = STRICT

    first: Literal["mean", "previous", "jump"] = "mean"
    """Where each descent begins: the target's mean, where the last one ended, or a random target
    point (`v_init`: mean, prev_opt, jump)."""
    iterations: int = 50
    """Steps of a descent (`grad_desc_iter`); three times as many the first time."""
    lr: float = 0.01
    """Of the descent, times the scale."""
    scale: float | None = None
    """`scale_factor`; by default the norm of the first point over that of its gradient."""


def descend(
    target: Tensor,
    pool: Tensor,
    start: Tensor,
    *,
    k: int = 5,
    estimator: Literal["knn", "avg"] = "avg",
    sizes: Tensor | None = None,
    stop: Stop,
    descent: Descent,
    seed: int = 0,
) -> Selection:
    """Like `scorers.gio_search.select`, by descent in place of looking at every candidate.

    Args:
        target: (n, d), n above k.
        pool: (C, d) candidates.
        start: (m, d) what is selected already.
        k: neighbour on the target's side.
        estimator: whose gradient is followed; `avg` is the authors'.
        sizes: (C,) what each candidate adds to `stop.budget`.
        stop: when the search ends.
        descent: how v moves.
        seed: of `jump`.
    """
    log_radius = log_radii(target, k)
    state = _State(target, start, log_radius, k, estimator)
    steps, why = until(_steps(state, pool, descent, seed), state.value(), stop, sizes)
    return Selection(steps, _State(target, start, log_radius, k, estimator).value(), why)


class _State:
    """The divergence of the selection so far, and its gradient in one more point."""

    def __init__(
        self, target: Tensor, start: Tensor, log_radius: Tensor, k: int, estimator: str
    ) -> None:
        self.target, self._radius, self._k = target, log_radius, k
        self._average = estimator == "avg"
        self._m = len(start)
        self._total = float(phi(target, start).sum()) if self._average else 0.0
        self._nearest = log_distances(target, start).amin(1)

    def value(self) -> float:
        d = self.target.shape[1]
        if self._average:
            return mean_divergence(self._radius, self._total / self._m, d=d, k=self._k, m=self._m)
        return divergence(self._radius, self._nearest, d=d, k=self._k, own_k=1, m=self._m)

    def gradient(self, v: Tensor) -> Tensor:
        """(d,) with respect to v, one point more than there are."""
        away = v - self.target
        square = away.square().sum(1)
        counts = square > FLOOR**2  # at a target point itself the distance is clipped
        if not self._average:
            counts &= 0.5 * square.clamp_min(FLOOR**2).log() < self._nearest
        pull = torch.where(counts, 1 / square.clamp_min(FLOOR**2), 0.0)
        mean = (away * pull[:, None]).mean(0) * self.target.shape[1]
        return mean / (self._m + 1) if self._average else mean

    def add(self, point: Tensor) -> None:
        self._m += 1
        if self._average:
            self._total += float(phi(self.target, point[None])[0])
        self._nearest = torch.minimum(self._nearest, log_distances(point[None], self.target)[0])


def _steps(state: _State, pool: Tensor, descent: Descent, seed: int) -> Iterator[Step]:
    draw = torch.Generator().manual_seed(seed)
    free = torch.ones(len(pool), dtype=torch.bool, device=pool.device)
    v = _first(state.target, descent, draw)
    scale = descent.scale
    if scale is None:
        scale = float(v.norm() / state.gradient(v).norm().clamp_min(1e-12))
    for number in range(len(pool)):
        if number and descent.first != "previous":
            v = _first(state.target, descent, draw)
        for _ in range(descent.iterations * (1 if number else 3)):
            v = v - descent.lr * scale * state.gradient(v)
        far = (pool - v).square().sum(1)
        candidate = int(far.masked_fill(~free, torch.inf).argmin())
        free[candidate] = False
        state.add(pool[candidate])
        yield Step(candidate, state.value())


def _first(target: Tensor, descent: Descent, draw: torch.Generator) -> Tensor:
    if descent.first == "jump":
        return target[int(torch.randint(len(target), (), generator=draw))].clone()
    return target.mean(0)
