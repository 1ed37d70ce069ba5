"""k-means over more vectors than memory holds: centroids from a sample, labels block by block.

Shapes: N vectors, d dimensions, k clusters.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from curate.errors import ConfigError, InputError, counted
from curate.vectors.engine import faiss_module, gpu_resources, is_gpu
from curate.vectors.search import nearest
from curate.vectors.store import BLOCK_ROWS, Floats, Vectors


class Assigned(NamedTuple):
    """The nearest centroid of each vector."""

    labels: npt.NDArray[np.int32]
    """(N,) in [0, k); -1 for a row without a vector."""
    distances: Floats
    """(N,) to that centroid, not squared; NaN for a row without a vector."""


def kmeans(
    vectors: Vectors,
    k: int,
    *,
    seed: int,
    iterations: int = 25,
    max_rows_per_centroid: int = 256,
    spherical: bool = False,
    redo: int = 1,
    threads: int = 1,
    device: str = "cpu",
) -> Floats:
    """Centroids (k, d) by Lloyd's steps from random rows; the same every time.

    Args:
        vectors: what to cluster.
        k: how many clusters, at least 1.
        seed: of the sample and of the first centroids.
        iterations: Lloyd's steps.
        max_rows_per_centroid: the sample has at most k times as many rows.
        spherical: whether centroids are scaled to length 1, for vectors compared by cosine.
        redo: how often to begin anew; the best attempt is taken.
        threads: of the CPU.
        device: `cpu` or `cuda`.

    Raises:
        ConfigError: k is not positive, or there are fewer vectors than clusters.
        InputError: there are no vectors, or one has an infinite number.
        MissingDependencyError: faiss, or its build for the GPU asked for, is missing.
    """
    if k < 1:
        raise ConfigError(f"{k} clusters were asked for", fix="ask for at least one")
    usable = vectors.usable()
    if not len(usable):
        raise InputError(
            "no row that could be clustered has a vector",
            fix="look at the summary of `curate embed`, and at what is held out",
        )
    if k > len(usable):
        raise ConfigError(
            f"{counted(k, 'cluster')} were asked for, but there "
            f"{'is' if len(usable) == 1 else 'are'} {counted(len(usable), 'row')} with a vector",
            fix="ask for fewer clusters, or give more data",
        )
    sample = min(len(usable), k * max_rows_per_centroid)
    if sample < len(usable):
        chosen = np.random.default_rng(seed).choice(len(usable), sample, replace=False)
        usable = usable[np.sort(chosen)]
    rows = vectors.take(usable)
    if not np.isfinite(rows).all():
        place = int(usable[np.flatnonzero(~np.isfinite(rows).all(axis=1))[0]])
        raise InputError(
            f"vector {place} has an infinite number",
            fix="make the vectors anew, or normalise them",
        )
    if is_gpu(device):
        gpu_resources()  # says what is missing
    faiss = faiss_module(threads)
    found = faiss.Kmeans(
        vectors.dim, k, niter=iterations, nredo=redo, seed=seed % (1 << 31), spherical=spherical,
        min_points_per_centroid=1, max_points_per_centroid=max_rows_per_centroid,
        gpu=is_gpu(device),
    )  # fmt: skip
    found.train(rows)
    return np.ascontiguousarray(found.centroids, dtype=np.float32)


def assign(
    vectors: Vectors,
    centroids: npt.NDArray[np.floating],
    *,
    threads: int = 1,
    device: str = "cpu",
    block_rows: int = BLOCK_ROWS,
) -> Assigned:
    """The nearest centroid of each vector and its distance; the first of equally near ones.

    Args:
        vectors: (N, d).
        centroids: (k, d).
        threads: of the CPU.
        device: `cpu` or `cuda`.
        block_rows: vectors in memory at a time.
    """
    found = Assigned(
        np.full(len(vectors), -1, dtype=np.int32), np.full(len(vectors), np.nan, dtype=np.float32)
    )
    centres = Vectors([centroids])
    for positions, block in vectors.blocks(block_rows):
        near = nearest(block, centres, 1, metric="l2", threads=threads, device=device)
        found.labels[positions] = near.positions[:, 0]
        found.distances[positions] = near.values[:, 0]
    return found
