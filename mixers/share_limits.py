"""Shares of domains under a limit of epochs: none more than what is left of it can carry.

    cap_i = (max_epochs * n_i - read_i) / sequences that the run has left
    share'_i = min(s * share_i, cap_i),  with s >= 1 such that they sum to 1

Source: none; the redistribution in proportion is what method pages ask of a cap, and the cap is the
share at which a domain's last allowed epoch ends with the run.
Departures: none.
Cost: a few numbers for each domain.
Shapes: K domains.
"""

import torch
from torch import Tensor


def epoch_caps(sizes: Tensor, read: Tensor, *, left: float, max_epochs: float) -> Tensor:
    """(K,) float64 most that each domain can have of the rest of the run.

    Args:
        sizes: (K,) sequences or examples of each domain.
        read: (K,) how many were drawn of each so far, repeats counted.
        left: how many the run has still to draw, above 0.
        max_epochs: most passes over a domain.
    """
    allowed = max_epochs * sizes.double() - read.double()
    return (allowed / left).clamp(min=0)


def capped(shares: Tensor, caps: Tensor) -> Tensor:
    """(K,) the shares under their caps; what is cut off goes to the others, in proportion.

    Where all caps together are less than 1, each domain has its cap's part of the whole, since
    something must be drawn; where all are 0, nothing is changed.

    Args:
        shares: (K,) float64, summing to 1.
        caps: (K,) float64, from 0 up.
    """
    free = shares > 0
    total = caps[free].sum()
    if total <= 0:
        return shares
    if total <= 1:
        return torch.where(free, caps, 0) / total
    found = torch.zeros_like(shares)
    while bool(free.any()):
        # Whoever is over its cap now stays so as the others rise: it is full for good.
        risen = shares * ((1 - found.sum()) / shares[free].sum())
        over = free & (risen > caps)
        if not bool(over.any()):
            return torch.where(free, risen, found)
        found = torch.where(over, caps, found)
        free = free & ~over
    return found / found.sum()
