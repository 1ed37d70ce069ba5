"""Losses as functions of the mixture: what every fit offers, and how well it foretells other runs.

Shapes: n runs, m domains of the mixture, q losses.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from curate.errors import InputError
from curate.evaluate.agreement import rank_correlation

Floats = npt.NDArray[np.float64]

FOLDS = 5
"""Parts of the runs that are left out in turn."""


class Law(Protocol):
    """What a fit gives."""

    def losses(self, mixtures: Floats, /) -> Floats:
        """(n, q) predicted losses of mixtures (n, m)."""
        ...


class SmoothLaw(Law, Protocol):
    """A law with derivatives, whose optimum is found by following them."""

    def gradients(self, mixture: Floats, /) -> Floats:
        """(q, m) derivatives of the losses at one mixture (m,)."""
        ...


Fit = Callable[[Floats, Floats], Law]
"""(n, m) mixtures and (n, q) losses to a law."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """How well runs are foretold that a law was not fitted on."""

    spearman: Floats
    """(q,) rank correlation over all runs; NaN where losses do not differ."""
    error: Floats
    """(q,) mean absolute difference, nats."""
    foretold: Floats
    """(n, q) what the law of the other folds says of each run."""


def held_out(
    fit: Fit, mixtures: Floats, losses: Floats, *, folds: int = FOLDS, seed: int = 0
) -> HeldOut:
    """Each run foretold by a law of the other folds.

    Args:
        fit: makes a law of some of the runs.
        mixtures: (n, m).
        losses: (n, q).
        folds: parts that are left out in turn.
        seed: of the assignment to folds.

    Raises:
        InputError: too few runs for that many folds.
    """
    places = np.random.default_rng(seed).permutation(len(mixtures)) % folds
    foretold = np.empty_like(losses)
    for fold in np.unique(places):
        own = places == fold
        foretold[own] = fit(mixtures[~own], losses[~own]).losses(mixtures[own])
    return HeldOut(spearman(foretold, losses), np.abs(foretold - losses).mean(0), foretold)


def spearman(foretold: Floats, losses: Floats) -> Floats:
    """(q,) rank correlations of the columns; NaN where one side does not vary."""
    return np.array(
        [
            rank_correlation(one, two) if np.ptp(one) > 0 and np.ptp(two) > 0 else np.nan
            for one, two in zip(foretold.T, losses.T, strict=True)
        ]
    )


def check_runs(mixtures: Floats, losses: Floats, *, least: int) -> None:
    """Refuse what no law can be fitted to.

    Args:
        mixtures: (n, m).
        losses: (n, q).
        least: runs that the law needs.

    Raises:
        InputError: too few runs, a mixture that is none, or a loss that is no number.
    """
    num, size = mixtures.shape
    if num < least:
        raise InputError(
            f"{num} runs are too few for {size} domains",
            fix=f"give {3 * (size + 1)} or more, with different mixtures",
        )
    wrong = (mixtures < 0).any(1) | (np.abs(mixtures.sum(1) - 1) > 1e-3)
    if wrong.any():
        row = int(wrong.argmax())
        raise InputError(
            f"the mixture of run {row} adds up to {mixtures[row].sum():.6g}, or has shares below 0",
            fix="give shares of the tokens that add up to 1",
        )
    if not np.isfinite(losses).all():
        row = int((~np.isfinite(losses)).any(1).argmax())
        raise InputError(f"a loss of run {row} is no finite number", fix="leave the run out")
