"""The greedy search of GIO: which candidate lowers the divergence most, again and again.

With l = 1 the gain of a candidate, sum_i max(0, ln nu_1(i) - ln ||x_i - v||), only shrinks while
points are added (it is submodular). Gains of earlier steps are therefore bounds, and only
candidates whose bound exceeds the best gain known are looked at again. The first bounds come from
one matrix product with the whole pool in the given precision, less the error that it may have;
every gain that decides is taken in float64. The result is that of looking at all candidates in
every step.

Shapes: n target points, C candidates, m selected points, d dimensions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from scorers.gio_divergence import (
    FLOOR,
    blocks_of,
    divergence,
    log_distances,
    log_radii,
    mean_divergence,
    phi,
)

_BOUND_NUMBERS = 1 << 21
"""Distances that exist at a time while first bounds are taken: they stay in the cache."""
_BATCH, _MOST = 64, 1024
"""Candidates that are looked at together: at first, and after some doubling within a step."""
_DIGITS = 1e9
"""Gains are rounded to this, so that equal candidates have equal gains in any batch."""


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
    why: str
    """Why it ended: `increase`, `budget`, `max_steps` or `exhausted`."""


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
    own: Tensor | None = None,
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
        own: (C,) the target point that a candidate is a copy of: their distance does not count;
            -1 for none.
        stop: when the search ends.
    """
    log_radius = log_radii(target, k)
    d = target.shape[1]
    if estimator == "avg":
        chosen = _by_phi(target, pool, start, log_radius, k, own)
        first = mean_divergence(
            log_radius, float(phi(target, start).mean()), d=d, k=k, m=len(start)
        )
    else:
        search: _Search = (
            _Lazy(target, pool, start, own)
            if own_k == 1
            else _Plain(target, pool, start, own_k, own)
        )
        first = divergence(log_radius, search.nearest, d=d, k=k, own_k=own_k, m=len(start))
        chosen = _by_gain(search, log_radius, d=d, k=k, own_k=own_k, m=len(start))
    steps, why = until(chosen, first, stop, sizes)
    return Selection(steps, first, why)


def until(
    chosen: Iterator[Step], first: float, stop: Stop, sizes: Tensor | None
) -> tuple[tuple[Step, ...], str]:
    """The steps up to the end, those that did not lower the divergence taken back; and why.

    Args:
        chosen: all steps of a search.
        first: divergence before them.
        stop: when it ends.
        sizes: (C,) of the candidates, or None where each is 1.
    """
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
    target: Tensor,
    pool: Tensor,
    start: Tensor,
    log_radius: Tensor,
    k: int,
    own: Tensor | None,
) -> Iterator[Step]:
    """KL_avg depends on the mean of phi alone: the best order is that of phi."""
    total, m = float(phi(target, start).sum()), len(start)
    values = phi(target, pool, own)
    for candidate in values.argsort(stable=True).tolist():
        total, m = total + float(values[candidate]), m + 1
        yield Step(candidate, mean_divergence(log_radius, total / m, d=target.shape[1], k=k, m=m))


class _Search(Protocol):
    """Candidates and the selection so far."""

    @property
    def nearest(self) -> Tensor:
        """(n,) ln nu_l"""
        ...

    def best(self) -> int | None:
        """The candidate with the largest gain, the first of equals; None where none is left."""
        ...

    def add(self, candidate: int) -> None: ...


class _Lazy:
    """l = 1: gains only shrink, so that most need not be computed again."""

    def __init__(self, target: Tensor, pool: Tensor, start: Tensor, own: Tensor | None) -> None:
        self._target, self._pool, self._own = target, pool, own
        self._centre = target.mean(0)
        self._wide = (target - self._centre).double()
        self._square = self._wide.square().sum(1)
        self.nearest = _start_distances(target, start)
        self._bounds = _first_bounds(target, pool, self.nearest)
        self._known = torch.zeros(len(pool), dtype=torch.bool, device=pool.device)
        self._left = len(pool)

    def best(self) -> int | None:
        if self._left == 0:
            return None
        self._known.zero_()
        gain, batch = -torch.inf, _BATCH
        while True:
            open_ = ((self._bounds >= gain) & ~self._known).nonzero()[:, 0]
            if len(open_) == 0:
                return int((self._known & (self._bounds == gain)).nonzero()[0, 0])
            if len(open_) > batch:
                open_ = open_[self._bounds[open_].topk(batch).indices]
            batch = min(2 * batch, _MOST)
            gains = self._gains(open_)
            self._bounds[open_] = gains
            self._known[open_] = True
            gain = max(gain, float(gains.max()))

    def add(self, candidate: int) -> None:
        rows = torch.tensor([candidate], device=self._pool.device)
        near = log_distances(self._pool[rows], self._target)
        self.nearest = torch.minimum(self.nearest, _without_own(near, self._own, rows)[0])
        self._bounds[candidate] = -torch.inf
        self._left -= 1

    def _gains(self, candidates: Tensor) -> Tensor:
        """(c,) float64 mean decrease of ln nu_1."""
        # In float64 the product loses no digit that counts above the floor.
        points = (self._pool[candidates] - self._centre).double()
        far = torch.addmm(self._square[None, :], points, self._wide.T, alpha=-2)
        far += points.square().sum(1)[:, None]
        near = far.clamp_min_(FLOOR**2).to(self._target.dtype).log_().mul_(0.5)
        near = _without_own(near, self._own, candidates)
        gains = (self.nearest - near).clamp_min_(0).mean(1, dtype=torch.float64)
        return gains.mul_(_DIGITS).round_().div_(_DIGITS)


def _start_distances(target: Tensor, start: Tensor) -> Tensor:
    """(n,) logarithm of the distance to the nearest point of the start."""
    near = [log_distances(block, start).amin(1) for block in blocks_of(target, start)]
    return torch.cat(near)


def _first_bounds(target: Tensor, pool: Tensor, nearest: Tensor) -> Tensor:
    """(C,) float64, at least the gain of each candidate.

    Squared distances are |x|^2 - 2xy + |y|^2 less the largest error that this can have.
    """
    n, d = target.shape
    centre = target.mean(0)  # less cancels where norms are small
    target = target - centre
    square = target.square().sum(1)
    unit = torch.finfo(target.dtype).eps
    found: list[Tensor] = []
    for block in pool.split(max(1, _BOUND_NUMBERS // n)):
        block = block - centre
        own = block.square().sum(1)
        error = 2 * (d + 8) * unit * (own + float(square.max()))  # (|x| + |y|)^2 is at most twice
        far = torch.addmm(square[None, :], block, target.T, alpha=-2)
        far.add_((own - error)[:, None]).clamp_min_(FLOOR**2).log_()
        gains = far.mul_(-0.5).add_(nearest[None, :]).clamp_min_(0)
        # Logarithms up to 16 in size are off by some units of the last digit themselves.
        found.append(gains.double().mean(1) + 64 * unit + 1 / _DIGITS)
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


class _Plain:
    """Any own_k: every candidate is looked at in every step, over a matrix of all distances."""

    def __init__(
        self, target: Tensor, pool: Tensor, start: Tensor, own_k: int, own: Tensor | None
    ) -> None:
        everyone = torch.arange(len(pool), device=pool.device)
        self._near = _without_own(log_distances(pool, target), own, everyone)  # (C, n)
        self._own = (
            log_distances(target, start).topk(own_k, largest=False).values
        )  # (n, l) ascending
        self._free = torch.ones(len(pool), dtype=torch.bool, device=pool.device)

    @property
    def nearest(self) -> Tensor:
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


def _without_own(near: Tensor, own: Tensor | None, candidates: Tensor) -> Tensor:
    if own is not None:
        mine = own[candidates]
        rows = (mine >= 0).nonzero()[:, 0]
        near[rows, mine[rows]] = torch.inf
    return near


def _by_gain(
    search: _Search, log_radius: Tensor, *, d: int, k: int, own_k: int, m: int
) -> Iterator[Step]:
    while (candidate := search.best()) is not None:
        search.add(candidate)
        m += 1
        yield Step(candidate, divergence(log_radius, search.nearest, d=d, k=k, own_k=own_k, m=m))
