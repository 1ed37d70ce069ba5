"""Boosted law: a domain's loss by regression trees that correct each other (LightGBM).

    L_i(p) = sum_r 0.01 tree_r(p)

Source: Liu et al., "RegMix: Data Mixture as Regression for Language Model Pre-training", ICLR 2025,
arXiv:2407.01492, and the notebook of its authors (1,000 rounds, learning rate 0.01).

Departures: the notebook stops early on the mixtures it then reports on; here a part of the given
runs decides the number of rounds, and the trees are grown again on all of them. Leaves hold less
than a tenth of the runs, as with 20, LightGBM's own number, 32 runs give a constant. Patience is 20
rounds in place of 3.
Trees do not extrapolate, and are flat between the runs: below some 128 of them a law with a formula
is better.
Cost: some seconds for each loss and 500 runs.
Shapes: n runs, m domains of the mixture, q losses.
"""

import math
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from curate.errors import MissingDependencyError
from mixers.laws import Floats, check_runs

_ROUNDS = 1000
_PATIENCE = 20
_VALIDATION = 5
"""One run in so many decides when to stop."""


@dataclass(frozen=True, slots=True)
class BoostedLaw:
    """Losses of all targets, as sums of trees."""

    boosters: tuple[Any, ...]
    """(q,) of LightGBM."""

    def losses(self, mixtures: Floats) -> Floats:
        """(n, q) predicted losses of mixtures (n, m)."""
        return np.column_stack([each.predict(mixtures, num_threads=1) for each in self.boosters])


def lightgbm() -> Any:
    """The library.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return import_module("lightgbm")
    except ImportError as error:
        raise MissingDependencyError(
            "fit: boosted needs LightGBM, which is not installed",
            fix="pip install 'curate-data[mixlaw]', or set mix.fit to log_linear",
        ) from error


def fit(mixtures: Floats, losses: Floats, *, seed: int = 0) -> BoostedLaw:
    """Trees for each loss.

    Args:
        mixtures: (n, m) rows on the simplex.
        losses: (n, q) nats.
        seed: of the runs that decide when to stop.

    Raises:
        InputError: too few runs, a mixture that is none, or a loss that is no number.
        MissingDependencyError: LightGBM is not installed.
    """
    library = lightgbm()
    check_runs(mixtures, losses, least=mixtures.shape[1])
    places = np.random.default_rng(seed).permutation(len(mixtures)) % _VALIDATION
    return BoostedLaw(tuple(_fit_one(library, mixtures, own, places == 0) for own in losses.T))


def smallest_leaf(num_runs: int) -> int:
    """Runs in a leaf at least: less than a tenth of all, and never more than LightGBM's 20."""
    return max(1, min(20, math.ceil(num_runs / 10) - 1))


def _fit_one(
    library: Any, mixtures: Floats, losses: Floats, stopping: npt.NDArray[np.bool_]
) -> Any:
    """Trees of one loss; as many as are best for the runs that were put aside."""
    first = _grown(
        library,
        mixtures[~stopping],
        losses[~stopping],
        _ROUNDS,
        (mixtures[stopping], losses[stopping]),
    )
    return _grown(library, mixtures, losses, max(1, first.best_iteration))


def _grown(
    library: Any,
    mixtures: Floats,
    losses: Floats,
    rounds: int,
    other: tuple[Floats, Floats] | None = None,
) -> Any:
    """A booster; with `other` runs, stopped when these no longer get better."""
    options = {
        "objective": "regression",
        "learning_rate": 0.01,
        "min_data_in_leaf": smallest_leaf(len(mixtures)),
        "deterministic": True,
        "force_row_wise": True,
        "num_threads": 1,
        "seed": 0,
        "verbosity": -1,
    }
    data = library.Dataset(mixtures, losses, params=options)
    if other is None:
        return library.train(options, data, rounds)
    held = library.Dataset(*other, reference=data)
    stop = library.early_stopping(_PATIENCE, verbose=False)
    return library.train(options, data, rounds, valid_sets=[held], callbacks=[stop])
