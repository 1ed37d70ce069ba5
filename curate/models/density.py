"""A classifier of two samples, fitted on folds and calibrated: the log ratio of their densities.

Shapes: N examples of both samples, F features, K folds.
"""

import logging
import warnings
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import expit

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Places = npt.NDArray[np.int64]
Contents = npt.NDArray[np.uint64]

ALL_FOLDS = -1
"""Fold of an example that no model is fitted on: all of them judge it."""

_STEPS = 500
_NEWTON_STEPS = 100


def draws(contents: Contents, seed: int) -> Contents:
    """(N,) 64 random bits from each content and the seed (the finaliser of splitmix64)."""
    mixed = contents ^ np.uint64((seed * 0x9E3779B97F4A7C15) % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


class Folds(NamedTuple):
    """Which model judges a content: the one that saw neither it nor a copy."""

    contents: Contents
    """(T,) of the target, ascending, each once."""
    folds: Places
    """(T,) theirs, in [0, K), as even as can be."""
    num_folds: int
    seed: int

    @classmethod
    def of_target(cls, contents: Contents, *, num_folds: int, seed: int) -> "Folds":
        """Folds of the target's contents (n,), and with them those of all others."""
        own = np.unique(contents)
        ranks = np.argsort(np.argsort(draws(own, seed), kind="stable"), kind="stable")
        return cls(own, ranks % num_folds, num_folds, seed)

    def of(self, contents: Contents, is_train: Bools) -> Places:
        """(N,) folds of examples; `ALL_FOLDS` where an example is held out and no target's copy."""
        place = np.minimum(np.searchsorted(self.contents, contents), len(self.contents) - 1)
        is_copy = self.contents[place] == contents
        own = (draws(contents, self.seed) % np.uint64(self.num_folds)).astype(np.int64)
        found = np.where(is_copy, self.folds[place], own)
        return np.where(is_train | is_copy, found, ALL_FOLDS)


class Line(NamedTuple):
    """Calibration of a log ratio: slope times it, plus offset."""

    slope: float
    """At least 0."""
    offset: float


class Ratio(NamedTuple):
    """One linear model of the log ratio for each fold, fitted on the others."""

    weights: npt.NDArray[np.float32]
    """(K, F)."""
    biases: Floats
    """(K,) with the odds of the samples' sizes taken out."""
    line: Line

    def log_ratios(self, matrix: Any, folds: Places) -> Floats:
        """(N,) by the model of each example's own fold, or the mean of all for `ALL_FOLDS`.

        Args:
            matrix: (N, F) dense or sparse.
            folds: (N,) in [0, K), or `ALL_FOLDS`.
        """
        return self.line.slope * self.raw(matrix, folds) + self.line.offset

    def raw(self, matrix: Any, folds: Places) -> Floats:
        """(N,) the same before calibration."""
        every = np.asarray(matrix @ self.weights.T, dtype=np.float64) + self.biases  # (N, K)
        own = every[np.arange(len(folds)), np.maximum(folds, 0)]
        return np.where(folds == ALL_FOLDS, every.mean(axis=1), own)


def fit_ratio(
    matrix: Any, is_target: Bools, folds: Places, *, num_folds: int, penalty: float
) -> tuple[Ratio, Floats]:
    """Fit a model for each fold on the others, and calibrate what they say of what they left out.

    Args:
        matrix: (N, F) dense or sparse, both samples.
        is_target: (N,) which sample.
        folds: (N,) in [0, K); every fold's complement holds both samples.
        num_folds: K.
        penalty: weight of half the squared coefficients against the summed loss.

    Returns:
        The models, and (N,) calibrated log ratios of the examples themselves, each by the model
        that did not see it.
    """
    weights = np.zeros((num_folds, matrix.shape[1]), dtype=np.float32)
    biases = np.zeros(num_folds)
    for fold in range(num_folds):
        rows = np.flatnonzero(folds != fold)
        own = is_target[rows]
        weights[fold], bias = _fitted(matrix[rows], own, penalty)
        biases[fold] = bias - np.log(own.sum() / (~own).sum())
    models = Ratio(weights, biases, Line(1.0, 0.0))
    raw = models.raw(matrix, folds)
    models = models._replace(line=calibration(raw, is_target))
    return models, models.log_ratios(matrix, folds)


def calibration(scores: Floats, is_target: Bools) -> Line:
    """Platt's line through log ratios, with the odds of the samples' sizes taken out.

    The likelihood of slope and offset, with targets (n_t + 1) / (n_t + 2) and 1 / (n_s + 2) in
    place of 1 and 0, so that samples that are told apart perfectly have a finite slope.

    Args:
        scores: (N,) log ratios, each by a model that did not see the example.
        is_target: (N,) which sample; both are there.

    Returns:
        The line; slope 0 and offset 0, a ratio of 1 for all, where higher scores do not mean more
        of the target.
    """
    num_target = int(is_target.sum())
    num_pool = len(is_target) - num_target
    aim = np.where(is_target, (num_target + 1) / (num_target + 2), 1 / (num_pool + 2))
    odds = np.log(num_target / num_pool)
    centre, spread = float(scores.mean()), float(scores.std())
    if spread == 0:
        return Line(0.0, 0.0)
    design = np.stack([(scores - centre) / spread, np.ones(len(scores))], axis=1)
    found = _newton(design, aim, np.array([0.0, odds]))
    if found[0] <= 0:
        return Line(0.0, 0.0)
    slope = found[0] / spread
    return Line(float(slope), float(found[1] - slope * centre - odds))


def _newton(design: Floats, aim: Floats, start: Floats) -> Floats:
    """Least cross-entropy of a logistic model with two parameters; steps are halved at need."""

    def loss(at: Floats) -> float:
        scores = design @ at
        return float((np.logaddexp(0, scores) - aim * scores).sum())

    at, current = start, loss(start)
    for _ in range(_NEWTON_STEPS):
        share = expit(design @ at)
        gradient = design.T @ (share - aim)
        curvature = (design * (share * (1 - share))[:, None]).T @ design
        step = np.linalg.solve(curvature + 1e-10 * np.eye(2), gradient)
        size = 1.0
        while (tried := loss(at - size * step)) > current and size > 1e-6:
            size /= 2
        if tried >= current:
            return at
        at, current = at - size * step, tried
    return at


def _fitted(matrix: Any, is_target: Bools, penalty: float) -> tuple[npt.NDArray[Any], float]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1 / penalty, max_iter=_STEPS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(matrix, is_target)
    if caught:
        log.warning("density_ratio: a fit stopped after %d steps, before it had converged", _STEPS)
    return np.asarray(model.coef_)[0], float(np.asarray(model.intercept_)[0])
