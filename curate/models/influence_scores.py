"""What metrics of influence make of losses, rows, and scores by sub-task; the scores themselves are
inner products, see `curate.models.scan`.

    cosine  cos(phi_q, phi_i) = <phi_q / |phi_q|, phi_i> / |phi_i|
    trak    f = log(p / (1 - p)), p = exp(-loss):   grad f = -phi / (1 - p),   Q = 1 - p

Sources: see `scorers.influence`.

Shapes: n rows, k numbers of a row, G sub-tasks, B rows of a block.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from curate.errors import InputError

Floats = npt.NDArray[np.float64]

LEAST_UNLIKELY = 1e-6
"""Where 1 - p is smaller, float32 logits no longer tell p from 1: gradients of the log odds are
divided by this instead."""


def unlikeliness(losses: Floats) -> Floats:
    """(n,) 1 - p, the weights Q of TRAK.

    Args:
        losses: (n,) of the examples, nats, at least 0; NaN stays.
    """
    return -np.expm1(-losses)


def odds_factors(losses: Floats) -> Floats:
    """(n,) what turns a loss' gradient into minus that of the log odds of the example, 1 / (1 - p).

    The signs of an example and of a query cancel in every product of the two.

    Args:
        losses: (n,) of the examples, nats, at least 0; NaN stays.
    """
    return 1 / np.maximum(unlikeliness(losses), LEAST_UNLIKELY)


def unit_factors(rows: Tensor) -> Floats:
    """(n,) 1 / |phi|; 0 for rows of zeros, which are like nothing.

    Args:
        rows: (n, k) of any float type.
    """
    lengths = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).cpu().numpy()
    return np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)


class TaskSums:
    """Adds up rows by sub-task, so that not all are in memory at once.

    Args:
        names: of the sub-tasks.
        width: k.
    """

    def __init__(self, names: Sequence[str], width: int) -> None:
        self._names = list(names)
        self._totals = torch.zeros(len(names), width, dtype=torch.float64)
        self.counts = np.zeros(len(names), dtype=np.int64)
        """(G,) rows of each."""

    def add(self, rows: Tensor, groups: npt.NDArray[np.int64]) -> None:
        """With more rows.

        Args:
            rows: (n, k).
            groups: (n,) sub-task of each.
        """
        self._totals.index_add_(0, torch.from_numpy(np.array(groups)), rows.double())
        self.counts += np.bincount(groups, minlength=len(self._names))

    def means(self) -> Tensor:
        """(G, k) float64.

        Raises:
            InputError: a sub-task has no row.
        """
        if not self.counts.all():
            name = self._names[int(self.counts.argmin())]
            raise InputError(
                f"no target example of {name!r} has a gradient",
                fix="look at the reasons for which the target's examples were set aside",
            )
        return self._totals / torch.from_numpy(self.counts)[:, None]


class OverTasks:
    """Mean or max over sub-tasks, a few of them at a time.

    Args:
        how: mean or max.
        size: B.
    """

    def __init__(self, how: Literal["mean", "max"], size: int) -> None:
        self._how = how
        self._num = 0
        self._kept = np.zeros(size) if how == "mean" else np.full(size, -np.inf)

    def add(self, scores: Floats) -> None:
        """With scores (g, B) of more sub-tasks; NaN stays."""
        self._num += len(scores)
        if self._how == "mean":
            self._kept = self._kept + scores.sum(0)
        else:
            self._kept = np.maximum(self._kept, scores.max(0))

    def value(self) -> Floats:
        """(B,)"""
        return self._kept / self._num if self._how == "mean" else self._kept
