"""The losses of the last steps, from which the robust form of loss reweighting takes its range.

The cap of LinUpper is relative to the largest loss of the step, so that one outlier takes most of
the weight. The 2nd and the 98th percentile of the last steps move little with it; losses outside
count as on the edge.

Source: ours; see `mixers.loss_weights` for the method.
Shapes: M examples of this rank in the step, K domains, W losses that are remembered.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mixers.loss_weights import Bounds
from mixers.ranks import all_rows

_PERCENTILES = (0.02, 0.98)


class Window(NamedTuple):
    """The losses of the last steps, of all ranks; plain tensors, so it can be saved and resumed."""

    losses: Tensor
    """(W,) nats, oldest first."""
    domains: Tensor
    """(W,) indices in [0, K)."""
    steps: Tensor
    """(W,) the step that each belongs to."""


def empty_window() -> Window:
    """A window before the first step."""
    none = torch.zeros(0, dtype=torch.int64)
    return Window(torch.zeros(0, dtype=torch.float64), none, none)


def remember(
    window: Window,
    losses: Tensor,
    *,
    step: int,
    num_steps: int,
    domains: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Window:
    """The window with the losses of one more step, those of all ranks, and without old ones.

    Args:
        window: as it was; left unchanged.
        losses: (M,) of this rank.
        step: its number.
        num_steps: how many steps are remembered, this one included.
        domains: (M,) indices.
        group: the ranks that share the step.
    """
    values = losses.detach()
    of = torch.zeros(len(values)) if domains is None else domains
    rows = torch.stack([values.double().cpu(), of.double().cpu()], dim=1)
    rows = all_rows(rows.to(values.device), group).cpu()
    keep = window.steps > step - num_steps
    return Window(
        torch.cat([window.losses[keep], rows[:, 0]]),
        torch.cat([window.domains[keep], rows[:, 1].long()]),
        torch.cat([window.steps[keep], torch.full((len(rows),), step)]),
    )


def window_bounds(window: Window, *, num_domains: int = 1) -> Bounds:
    """The 2nd and 98th percentile of the losses in the window, by domain.

    Args:
        window: what was seen.
        num_domains: K; with 1, the domains in the window count as one.
    """
    low = torch.full((num_domains,), math.inf, dtype=torch.float64)
    high = torch.full((num_domains,), -math.inf, dtype=torch.float64)
    shares = torch.tensor(_PERCENTILES, dtype=torch.float64)
    for domain in range(num_domains):
        chosen = window.losses[window.domains == domain] if num_domains > 1 else window.losses
        if len(chosen):
            low[domain], high[domain] = torch.quantile(chosen, shares)
    return Bounds(low, high)
