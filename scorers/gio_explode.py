"""From chosen clusters to chosen examples: shares of the target, sizes, order, weights.

Shapes: n target points, S steps, K clusters, N examples of the pool.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scorers.gio_divergence import log_distances

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def owners(target: Tensor, added: Tensor, own: Tensor | None = None) -> Iterator[Integers]:
    """After each addition, (n,) which of those so far is nearest to each target point.

    Args:
        target: (n, d)
        added: (S, d) in order.
        own: (S,) the target point that each is a copy of; their distance does not count.
    """
    best = torch.full((len(target),), torch.inf, dtype=target.dtype, device=target.device)
    owner = torch.zeros(len(target), dtype=torch.int64, device=target.device)
    for step in range(len(added)):
        near = log_distances(added[step : step + 1], target)[0]
        if own is not None and own[step] >= 0:
            near[own[step]] = torch.inf
        nearer = near < best  # of equals the first stays
        owner[nearer] = step
        best[nearer] = near[nearer]
        yield owner.cpu().numpy().copy()


def shares(owner: Integers, num_steps: int) -> Floats:
    """(S,) share of the target points that are nearest to each addition."""
    return np.bincount(owner, minlength=num_steps) / max(1, len(owner))


def capped_sizes(sizes: Integers, share: Floats, most: float | None) -> Integers:
    """How many examples of each chosen cluster are taken.

    n_c = min(size_c, ceil(most * share_c * sum of n)), the largest such numbers: no cluster has
    more than `most` times its share of the target (but for one example), and one that is nearest
    to no target point has none.

    Args:
        sizes: (S,) examples of each.
        share: (S,) of the target.
        most: 1 or more; None takes all.
    """
    if most is None:
        return sizes
    taken = np.where(share > 0, sizes, 0)
    while True:
        # Rounded first: 5 * 0.2 * 10 is 10, whatever its last digit says.
        limits = np.ceil(np.round(most * share * taken.sum(), 6)).astype(np.int64)
        less = np.minimum(taken, limits)
        if (less == taken).all():
            return taken
        taken = less


def whole_steps(
    owner: Iterator[Integers], sizes: Integers, *, most: float | None, budget: float | None
) -> tuple[int, Floats, Integers]:
    """The fewest first steps whose examples reach the budget, or all of them.

    Args:
        owner: from `owners`.
        sizes: (S,) examples (or tokens) of each step's cluster.
        most: as of `capped_sizes`.
        budget: in the unit of `sizes`.

    Returns:
        How many steps, their shares and what is taken of each.
    """
    share, taken = np.zeros(0), np.zeros(0, dtype=np.int64)
    for number, nearest in enumerate(owner, 1):
        if budget is None and number < len(sizes):
            continue
        share = shares(nearest, number)
        taken = capped_sizes(sizes[:number], share, most)
        if budget is not None and taken.sum() >= budget:
            break
    return len(share), share, taken


def ordered(
    steps: npt.NDArray[np.int32], distances: npt.NDArray[np.float32], taken: Sequence[int]
) -> Integers:
    """Positions of the chosen examples: step by step, inside a step the nearest to the target.

    Args:
        steps: (N,) step of each example's cluster, -1 where it was not chosen.
        distances: (N,) to the nearest target point.
        taken: (S,) how many of each step.
    """
    chosen = np.flatnonzero(steps >= 0)
    order = chosen[np.lexsort((chosen, distances[chosen], steps[chosen]))]
    own = steps[order]
    first = np.searchsorted(own, np.arange(len(taken)))
    place = np.arange(len(order)) - first[own]
    return order[place < np.asarray(taken, dtype=np.int64)[own]]


def step_weights(share: Floats, counts: Integers, *, most: float | None) -> Floats:
    """(S,) weight of an example of each step: its step's share of the target over that of the rows.

    Mean 1 over the chosen examples, but for what is clipped.

    Args:
        share: (S,) of the target.
        counts: (S,) chosen examples.
        most: the largest weight; None for no limit.
    """
    weights = np.divide(share * counts.sum(), counts, out=np.zeros(len(share)), where=counts > 0)
    return weights if most is None else np.minimum(weights, most)
