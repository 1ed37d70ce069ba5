"""Loss weights of the kept examples: clipped, mean 1, and what they cost in sample size.

Shapes: N rows.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from curate.errors import CurateError
from curate.plan.expression import Values


def relative_weights(values: Values, *, mean: float, clip: tuple[float, float]) -> Values:
    """(N,) weights relative to the mean, clipped; 1 where there is no value.

    Args:
        values: (N,) of the expression; negative ones count as 0, NaN as no value.
        mean: mean of the values, above 0.
        clip: smallest and largest weight.
    """
    positive = np.maximum(values, 0.0) / mean
    return np.where(np.isnan(values), 1.0, np.clip(positive, *clip))


def effective_size(total: float, square: float) -> float:
    """Kish's effective number of examples, (sum w)^2 / sum w^2; 0 where there are none."""
    return total**2 / square if square > 0 else 0.0


@dataclass(slots=True)
class WeightSums:
    """Streamed sums over kept rows; a row's total weight is weight times copies."""

    rows: int = 0
    copies: int = 0
    total: float = 0.0
    """Sum of the total weights."""
    square: float = 0.0
    """Sum of their squares."""
    low: float = float("inf")
    high: float = float("-inf")
    without: int = 0
    """Kept rows without a value."""

    def add(self, weight: Values, copies: NDArray[np.int64]) -> None:
        """Add rows; those with NaN or without copies count for nothing but `without`."""
        kept = copies > 0
        valued = kept & ~np.isnan(weight)
        self.without += int(kept.sum()) - int(valued.sum())
        weight, copies = weight[valued], copies[valued]
        self.rows += len(weight)
        self.copies += int(copies.sum())
        self.total += float((weight * copies).sum())
        self.square += float(((weight * copies) ** 2).sum())
        if len(weight):
            self.low = min(self.low, float(weight.min()))
            self.high = max(self.high, float(weight.max()))

    @property
    def mean(self) -> float:
        """Weight of the average copy; 0 where there is none."""
        return self.total / self.copies if self.copies else 0.0

    @property
    def effective_share(self) -> float:
        """Effective sample size as a share of the rows, in (0, 1]; 1 where there are none."""
        return effective_size(self.total, self.square) / self.rows if self.rows else 1.0


def check_effective_share(sums: WeightSums, *, least: float, force: bool) -> None:
    """Refuse a plan in which a few examples carry nearly all of the weight.

    Raises:
        CurateError: the effective sample size is below the least share of the kept rows.
    """
    if force or sums.effective_share >= least:
        return
    effective = effective_size(sums.total, sums.square)
    raise CurateError(
        f"the weights and copies leave {effective:,.0f} effective examples of {sums.rows:,} kept, "
        f"{100 * sums.effective_share:.2g} %, below plan.min_effective_share ({100 * least:.2g} %)",
        fix="narrow plan.weights.clip or lower plan.max_repeats; plan.force: true writes it anyway",
    )
