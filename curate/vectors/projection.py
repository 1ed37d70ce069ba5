"""Fewer dimensions by principal components, from one streamed covariance.

Shapes: N vectors, d dimensions before and p after.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from curate.errors import ConfigError, counted
from curate.vectors.store import BLOCK_ROWS, Floats, Vectors

Doubles = npt.NDArray[np.float64]


class Projection(NamedTuple):
    """A linear map onto the directions along which vectors vary most."""

    mean: Doubles
    """(d,) taken off first."""
    components: Doubles
    """(p, d) orthonormal rows, the largest variance first; of each the entry of largest size is
    positive."""
    variances: Doubles
    """(p,) along the components."""

    def apply(self, rows: npt.NDArray[np.floating]) -> Floats:
        """(n, p) the rows (n, d) seen along the components; NaN stays NaN."""
        return ((rows.astype(np.float64) - self.mean) @ self.components.T).astype(np.float32)


def fit_pca(
    vectors: Vectors, dims: int, *, seed: int, sample: int = 100_000, block_rows: int = BLOCK_ROWS
) -> Projection:
    """The `dims` leading principal components.

    Args:
        vectors: (N, d); rows without a vector do not count.
        dims: p, at most d.
        seed: of the sample.
        sample: of how many rows at most the covariance is taken.
        block_rows: vectors in memory at a time.

    Raises:
        ConfigError: there are fewer dimensions than asked for, or no vectors.
    """
    usable = vectors.usable()
    if not 1 <= dims <= vectors.dim or not len(usable):
        raise ConfigError(
            f"{counted(dims, 'component')} of {counted(len(usable), 'vector')} with "
            f"{vectors.dim} dimensions were asked for",
            fix=f"ask for 1 to {vectors.dim} components of at least one vector",
        )
    if sample < len(usable):
        chosen = np.random.default_rng(seed).choice(len(usable), sample, replace=False)
        usable = usable[np.sort(chosen)]
    blocks = [usable[first : first + block_rows] for first in range(0, len(usable), block_rows)]
    mean = sum((_rows(vectors, block).sum(axis=0) for block in blocks), np.zeros(vectors.dim))
    mean /= len(usable)
    scatter = np.zeros((vectors.dim, vectors.dim))
    for block in blocks:
        centred = _rows(vectors, block) - mean
        scatter += centred.T @ centred
    variances, directions = np.linalg.eigh(scatter / len(usable))
    components = directions[:, ::-1][:, :dims].T  # eigh goes upwards
    largest = np.abs(components).argmax(axis=1)
    signs = np.where(np.take_along_axis(components, largest[:, None], axis=1) < 0, -1.0, 1.0)
    components = np.ascontiguousarray(components * signs)
    return Projection(mean, components, np.maximum(variances[::-1][:dims], 0.0))


def _rows(vectors: Vectors, positions: npt.NDArray[np.int64]) -> Doubles:
    return vectors.take(positions).astype(np.float64)
