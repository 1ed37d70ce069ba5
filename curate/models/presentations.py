"""Means and spreads over the times that an example was shown in one training run.

Shapes: E presentation rounds (epochs, or checkpoints in order of step), N examples.
"""

import torch
from torch import Tensor

from curate.errors import ConfigError


def rounds(values: Tensor, *, skip_first: int = 0, epochs: int | None = None) -> Tensor:
    """The rounds that count, first to last.

    Args:
        values: (E, N).
        skip_first: rounds left out at the start.
        epochs: the last round that counts, from 1; None takes all. A shorter run gives what it has.

    Returns:
        (E', N), E' at least 1.

    Raises:
        ConfigError: no round is left.
    """
    chosen = values[skip_first:epochs]
    if not len(chosen):
        raise ConfigError(
            f"no epoch is left: the run has {len(values)}, skip_first is {skip_first}"
            f" and epochs is {epochs}",
            fix="train for more epochs, or lower skip_first",
        )
    return chosen


def check_rounds(*, skip_first: int = 0, epochs: int | None = None) -> None:
    """Refuse options of a scorer that leave nothing to look at.

    Raises:
        ConfigError: `skip_first` is negative, or `epochs` does not lie above it.
    """
    if skip_first < 0:
        raise ConfigError(f"skip_first is {skip_first}", fix="set it to 0 or 1")
    if epochs is not None and epochs <= skip_first:
        raise ConfigError(
            f"epochs is {epochs}: no epoch is left",
            fix=f"set it to {skip_first + 1} or more, or remove it",
        )


def target_probabilities(losses: Tensor) -> Tensor:
    """(E, N) probability of the label, exp(-loss); of a sequence the geometric mean per token."""
    return (-losses).exp()


def mean_shown(values: Tensor) -> Tensor:
    """(N,) mean over the rounds in which an example was shown; NaN where there is none.

    Args:
        values: (E, N), NaN where an example was not shown.
    """
    return values.nanmean(dim=0)


def variance_shown(values: Tensor) -> Tensor:
    """(N,) mean squared distance from the mean (divided by the number of rounds, not one less).

    Args:
        values: (E, N), NaN where an example was not shown.

    Returns:
        0 and up; NaN where it was shown less than twice: one number has no spread.
    """
    spread = (values - values.nanmean(dim=0)).square().nanmean(dim=0)
    return torch.where(num_shown(values) < 2, torch.nan, spread)


def num_shown(values: Tensor) -> Tensor:
    """(N,) int64 rounds in which an example was shown."""
    return values.isfinite().sum(dim=0)
