"""From the scores of some rows to scores of all: by their nearest neighbours, or by ridge.

    s_j = sum_r kappa_jr s_r / sum_r kappa_jr,  kappa_jr = exp(cos(h_j, h_r) / tau)

over the K nearest measured rows r; or h_j w + b by least squares with a penalty on w, which the
error of leaving one row out chooses.

Shapes: Q rows to be given scores, M rows measured, d dimensions, K neighbours, C score columns,
L penalties.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from curate.vectors.search import Neighbours, nearest
from curate.vectors.store import Floats, Vectors

Scores = npt.NDArray[np.float64]

PENALTIES = tuple(10.0**power for power in range(-6, 4))
"""Tried as multiples of the mean eigenvalue of the vectors' scatter."""

_BLOCK_ROWS = 8192


def unit(rows: npt.NDArray[np.floating]) -> Floats:
    """(Q, d) rows at length 1; NaN where a row is zero, which has no direction, or no vector."""
    wide = rows.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    norms[norms == 0] = np.nan
    return (wide / norms).astype(np.float32)


def by_neighbours(
    queries: Floats, core: Floats, scores: Scores, *, k: int, temperature: float, threads: int = 1
) -> Scores:
    """(Q, C) weighted means of the scores of the nearest measured rows; NaN without a vector.

    Args:
        queries: (Q, d) of length 1.
        core: (M, d) of length 1, without NaN.
        scores: (M, C) finite.
        k: how many neighbours, M at most count.
        temperature: tau; small values trust the nearest alone.
        threads: of the CPU.
    """
    found = nearest(queries, Vectors([core]), k, metric="inner", threads=threads)
    return weighted_means(found, scores, temperature=temperature)


def weighted_means(found: Neighbours, scores: Scores, *, temperature: float) -> Scores:
    """(Q, C) means of the neighbours' scores with weights exp(cosine / tau).

    Args:
        found: cosines and rows of the neighbours, (Q, K) each.
        scores: (M, C).
        temperature: tau.
    """
    cosines = found.values.astype(np.float64)
    # Less the largest: exp(1 / 0.001) is infinite.
    weights = np.exp((cosines - cosines[:, :1]) / temperature)
    weights = np.where(found.positions < 0, 0.0, weights)
    means = np.einsum("qk,qkc->qc", weights, scores[found.positions])
    total = weights.sum(axis=1, keepdims=True)
    return np.divide(means, total, out=np.full_like(means, np.nan), where=total > 0)


class Ridge(NamedTuple):
    """A linear map from vectors to scores."""

    centre: npt.NDArray[np.float64]
    """(d,) mean of the vectors."""
    weights: npt.NDArray[np.float64]
    """(d, C)."""
    intercept: npt.NDArray[np.float64]
    """(C,) mean of the scores."""
    penalties: npt.NDArray[np.float64]
    """(C,) multiples of the mean eigenvalue that were chosen."""

    def predict(self, rows: Floats) -> Scores:
        """(Q, C); NaN without a vector."""
        found = np.empty((len(rows), len(self.intercept)))
        for some, block in _blocks(rows):
            found[some] = (block - self.centre) @ self.weights + self.intercept
        return found


def fit_ridge(rows: Floats, scores: Scores) -> Ridge:
    """Least squares with the penalty, for each column, that leaves the least error.

    The error is that of leaving out one row, which has a closed form: the residual over
    1 - h_ii, with H the matrix that takes scores to their fit.

    Args:
        rows: (M, d) without NaN, M at least 2.
        scores: (M, C) finite.
    """
    centre = rows.mean(axis=0, dtype=np.float64)
    intercept = scores.mean(axis=0)
    product = np.zeros((rows.shape[1], scores.shape[1]))
    for some, block in _blocks(rows):
        product += (block - centre).T @ (scores[some] - intercept)
    values, axes = _principal(rows, centre)
    scale = float(values.sum()) / rows.shape[1] or 1.0
    inverse = 1.0 / (values + scale * np.array(PENALTIES)[:, None])  # (L, d)
    along = axes.T @ product  # (d, C)
    errors = np.zeros((len(PENALTIES), scores.shape[1]))
    for some, block in _blocks(rows):
        turned = (block - centre) @ axes
        left = 1.0 - 1.0 / len(rows) - np.square(turned) @ inverse.T  # (n, L)
        for number, factors in enumerate(inverse):
            residual = scores[some] - intercept - turned @ (along * factors[:, None])
            errors[number] += np.square(residual / left[:, number, None]).sum(axis=0)
    best = errors.argmin(axis=0)
    weights = axes @ (along * inverse[best].T)
    return Ridge(centre, weights, intercept, np.array(PENALTIES)[best])


def _principal(
    rows: Floats, centre: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Eigenvalues and axes (d, .) of the scatter of the rows; all but at most M are 0."""
    if len(rows) < rows.shape[1]:
        _, roots, turned = np.linalg.svd(rows.astype(np.float64) - centre, full_matrices=False)
        return np.square(roots), turned.T
    scatter = np.zeros((rows.shape[1],) * 2)
    for _, block in _blocks(rows):
        block = block - centre
        scatter += block.T @ block
    values, axes = np.linalg.eigh(scatter)
    return np.maximum(values, 0.0), axes


def _blocks(rows: Floats) -> Iterator[tuple[slice, npt.NDArray[np.float64]]]:
    """A few rows at a time, in float64."""
    for first in range(0, len(rows), _BLOCK_ROWS):
        some = slice(first, first + _BLOCK_ROWS)
        yield some, rows[some].astype(np.float64)
