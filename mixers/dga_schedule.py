"""DGA's weights as they change: what a measurement makes of them, and the schedule so far.

Source, departures: `mixers.dga`.
Cost: a few numbers for each domain and measurement.
Shapes: K domains, N distributions over them (N = K where none are given), U measurements.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mixers.basis import Basis
from mixers.dga import DGA, update
from mixers.share_limits import capped


class Mix(NamedTuple):
    """Where the weights stand; all of it goes into a checkpoint."""

    log_weights: Tensor
    """(N,) float64, of alpha."""
    shares: Tensor
    """(K,) float64 of the domains, under their caps."""
    steps: Tensor
    """(U,) int64 for each measurement, how many steps went before the first that it decided."""
    schedule: Tensor
    """(U, K) float64 shares from then on."""

    @property
    def mean(self) -> Tensor:
        """(K,) mean of the shares over the measurements; before the first, the start."""
        return self.schedule.mean(0) if len(self.schedule) else self.shares


def first_mix(settings: DGA, basis: Basis) -> Mix:
    """Before the first measurement."""
    weights = settings.start_weights(basis.names)
    shares = basis.shares(weights)
    empty = torch.zeros(0, dtype=torch.int64)
    return Mix(weights.log(), shares, empty, torch.zeros(0, len(shares), dtype=torch.float64))


def next_mix(
    settings: DGA, basis: Basis, mix: Mix, alignment: Tensor, *, begins: int, caps: Tensor | None
) -> Mix:
    """After a measurement.

    Args:
        settings: of the step.
        basis: what weights are on.
        mix: before it; left as it is.
        alignment: (N,) see `update`.
        begins: steps before the first that is drawn by it.
        caps: (K,) most that each domain can have; None without a limit.
    """
    log_weights = update(
        mix.log_weights,
        alignment,
        kappa=settings.kappa,
        beta=settings.beta,
        floor=settings.floor,
    )
    if caps is not None:
        # A domain at its cap must not drown what is learned of the others: all would be at the
        # floor, and alike.
        log_weights = capped(log_weights.exp(), basis.caps(caps)).log()
    shares = basis.shares(log_weights.exp())
    if caps is not None:
        shares = capped(shares, caps)
    return Mix(
        log_weights,
        shares,
        torch.cat([mix.steps, torch.tensor([begins])]),
        torch.cat([mix.schedule, shares[None]]),
    )


def stretches(ends: Tensor, rows: Tensor, *, most: int = 20) -> list[tuple[float, Tensor]]:
    """A schedule in few stretches: share of the run, and shares of the domains (K,) in it.

    Args:
        ends: (R,) ascending, number of the last step of each row; the last ends the run.
        rows: (R, K) shares; those that are alike one after the other are taken together.
        most: where there are more, as many stretches of equal length, each with its mean.
    """
    ends, rows = ends.double(), rows.double()
    last = torch.ones(len(ends), dtype=torch.bool)
    last[:-1] = (rows[1:] != rows[:-1]).any(1)
    ends, rows = ends[last] / ends[-1], rows[last]
    if len(ends) <= most:
        lengths = ends.diff(prepend=ends.new_zeros(1))
        return list(zip(lengths.tolist(), rows, strict=True))
    firsts = torch.cat([ends.new_zeros(1), ends[:-1]])
    found: list[tuple[float, Tensor]] = []
    for number in range(most):
        start, end = number / most, (number + 1) / most
        inside = (ends.clamp(max=end) - firsts.clamp(min=start)).clamp(min=0)  # (R,)
        found.append((1 / most, inside @ rows * most))
    return found
