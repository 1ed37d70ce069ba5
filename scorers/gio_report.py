"""How far a selection is from the target, by measures that GIO does not minimise.

Shapes: n and m points, d dimensions, B cells.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def total_variation(
    first: npt.NDArray[np.integer], second: npt.NDArray[np.integer], weights: Floats | None = None
) -> float:
    """Half the sum of the differences of two histograms over cells, 0 to 1.

    Args:
        first: (n,) cell of each point.
        second: (m,) cell of each point.
        weights: (m,) of the second's points; 1 each where None.
    """
    num = int(max(first.max(), second.max())) + 1
    one = np.bincount(first, minlength=num) / len(first)
    two = np.bincount(second, weights, minlength=num)
    return float(np.abs(one - two / two.sum()).sum() / 2)


def squared_mmd(first: Floats, second: Floats, weights: Floats | None = None) -> float:
    """Squared maximum mean discrepancy with a Gaussian kernel, 0 for the same points.

    The kernel's width is the median distance among the first.

    Args:
        first: (n, d)
        second: (m, d)
        weights: (m,) of the second's points; 1 each where None.
    """
    within = _squares(first, first)
    width = float(np.median(within[np.triu_indices(len(first), 1)])) if len(first) > 1 else 1.0
    share = np.full(len(second), 1.0) if weights is None else weights
    share = share / share.sum()

    def kernel(squares: Floats) -> Floats:
        return np.exp(-squares / (2 * max(width, 1e-12)))

    own = float(share @ kernel(_squares(second, second)) @ share)
    cross = float((kernel(_squares(first, second)) @ share).mean())
    return float(kernel(within).mean()) + own - 2 * cross


def _squares(first: Floats, second: Floats) -> Floats:
    found = np.square(first).sum(1)[:, None] + np.square(second).sum(1) - 2 * first @ second.T
    return np.maximum(found, 0.0)
