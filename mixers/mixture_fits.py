"""The fits of proxy runs, how well each foretells runs it has not seen, and which is taken.

Shapes: n runs, m domains of the mixture, q losses.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from curate.errors import InputError, MissingDependencyError
from mixers import boosted_law, linear_law, mixing_law
from mixers.laws import FOLDS, Fit, Floats, HeldOut, Law, held_out, spearman

Choice = Literal["auto", "linear", "log_linear", "boosted"]
"""How losses depend on the mixture; `auto` takes what foretells best."""

FITS: dict[str, Fit] = {
    "linear": linear_law.fit,
    "log_linear": mixing_law.fit,
    "boosted": boosted_law.fit,
}
SPARE_RUNS = 3
"""Runs beyond the number of domains with which a law can be fitted and tested."""
MANY_RUNS = 128
"""From here on trees are better than the log-linear form, below it is the other way round."""
_LEAST_FOR_TREES = 20
"""Runs below which trees are not even tried, unless they are asked for."""
_MARGIN = 0.01
"""Gain in rank correlation for which the usual fit is left."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a fit says of runs it has not seen."""

    by_loss: HeldOut
    target: float
    """Rank correlation of the weighted sum of the losses; NaN where it does not vary."""
    target_error: float
    """Mean absolute difference of the same, nats."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """The chosen law, and how all fits did."""

    name: str
    law: Law
    """Of all runs."""
    told: Mapping[str, Told]
    notes: tuple[str, ...]


def fitted(
    mixtures: Floats, losses: Floats, shares: Floats, *, choice: Choice = "auto", seed: int = 0
) -> Fitted:
    """All fits compared on runs left out in turn, and the chosen one made of all runs.

    Args:
        mixtures: (n, m) rows on the simplex.
        losses: (n, q) nats.
        shares: (q,) weights of the losses, summing to 1.
        choice: a fit, or `auto`.
        seed: of the folds.

    Raises:
        InputError: too few runs, a mixture that is none, or a loss that is no number.
        MissingDependencyError: `boosted` was asked for and LightGBM is not installed.
    """
    num, size = mixtures.shape
    least = size + SPARE_RUNS
    if num < least:
        raise InputError(
            f"{num} runs are too few for {size} domains: {least} can be fitted and tested",
            fix=f"give {3 * (size + 1)} or more, with different mixtures",
        )
    # As many folds as leave enough runs to fit.
    folds = FOLDS if num - -(-num // FOLDS) >= size + 2 else num
    told: dict[str, Told] = {}
    notes: list[str] = []
    for name, fit in FITS.items():
        if name == "boosted" and choice != name and num < _LEAST_FOR_TREES:
            notes.append(f"with fewer than {_LEAST_FOR_TREES} runs, the fit boosted was not tried")
            continue
        try:
            told[name] = _told(fit, mixtures, losses, shares, folds=folds, seed=seed)
        except MissingDependencyError:
            if choice == name:
                raise
            notes.append("LightGBM is not installed, so the fit boosted was not tried")
    name = choice if choice != "auto" else chosen(told, num)
    notes.insert(0, _sentence(told, name, num, folds, by_itself=choice == "auto"))
    return Fitted(name, FITS[name](mixtures, losses), told, tuple(notes))


def chosen(told: Mapping[str, Told], num_runs: int) -> str:
    """The usual fit for so many runs, unless another ranks runs better by more than a hundredth."""
    usual = "boosted" if num_runs >= MANY_RUNS and "boosted" in told else "log_linear"
    ranks = {name: -np.inf if np.isnan(each.target) else each.target for name, each in told.items()}
    best = max(ranks, key=lambda name: ranks[name])
    return best if ranks[best] > ranks[usual] + _MARGIN else usual


def _told(
    fit: Fit, mixtures: Floats, losses: Floats, shares: Floats, *, folds: int, seed: int
) -> Told:
    found = held_out(fit, mixtures, losses, folds=folds, seed=seed)
    one, two = found.foretold @ shares, losses @ shares
    return Told(
        found, float(spearman(one[:, None], two[:, None])[0]), float(np.abs(one - two).mean())
    )


def _sentence(told: Mapping[str, Told], name: str, num: int, folds: int, *, by_itself: bool) -> str:
    """Which fit, why, and how the others did."""
    shown = ", ".join(
        f"{each} {one.target:.3f} ({one.target_error:.3g})" for each, one in told.items()
    )
    why = "taken" if by_itself else "asked for"
    return (
        f"fit {name} {why}; rank correlation of the target over {num} runs, {folds} folds left out"
        f" in turn, and mean error in nats: {shown}"
    )
