"""The target of `gio`, and the projection under which the pool is compared with it.

Shapes: n target points, d dimensions before and p after the projection.
"""

import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import xxhash
from safetensors.numpy import save_file

from curate.data.tables import read_examples
from curate.errors import ConfigError, InputError, counted
from curate.vectors.clusters import kmeans
from curate.vectors.projection import fit_pca
from curate.vectors.store import Floats, Positions, Vectors
from jobs.gio import NAME, prepared_output
from jobs.gio_work import Work, candidates, has_vector, open_work
from jobs.representations import open_vectors
from jobs.run import Receipt
from jobs.target import target_folder

log = logging.getLogger(__name__)

_SAMPLE = 20_000
"""Rows of the pool that the projection is fitted on, beside the target."""


def prepare_work(payload: dict[str, Any]) -> Receipt:
    """The target without repeated points, and the projection.

    Raises:
        InputError: fewer than two different target points, or no row of the pool, have a vector.
        ConfigError: target and pool have vectors of different widths.
    """
    work = open_work(payload)
    contents, rows, points, facts = _target(work)
    pool = open_vectors(work.run, work.vectors)
    if pool.dim != rows.shape[1]:
        raise ConfigError(
            f"the target's vectors have {rows.shape[1]} dimensions, the pool's {pool.dim}",
            fix="give both the same columns",
        )
    sample = _sample(work, pool)
    arrays: dict[str, npt.NDArray[Any]] = {}
    projection = None
    dims = work.options.dims
    if dims is not None and dims < pool.dim:
        both = Vectors([rows, sample])
        projection = fit_pca(both, min(dims, len(both)), seed=work.seed("projection"))
        # safetensors writes an array in the order of its memory, whatever its strides say.
        arrays |= {
            name: np.ascontiguousarray(values) for name, values in projection._asdict().items()
        }
        rows = projection.apply(rows)
        facts["variance"] = round(float(projection.variances.sum() / _variance(both)), 6)
    if len(rows) > work.options.max_target:
        num = min(work.options.clusters, len(rows))
        log.info("%s: %d centroids stand for %d target points", NAME, num, len(rows))
        rows = kmeans(Vectors([rows]), num, seed=work.seed("target"), **work.engine)
        contents, points = contents[:0], points[:0]
    arrays |= {"target": rows, "contents": contents, "points": points}
    facts |= {"target": len(rows), "dims": rows.shape[1]}
    prepared_output(work.run).write(lambda path: save_file(arrays, path), work.stamp, **facts)
    return facts


def _target(work: Work) -> tuple[npt.NDArray[np.uint64], Floats, Positions, dict[str, Any]]:
    """Contents of its rows, its different vectors, and which of them each row has."""
    folder = target_folder(work.run)
    vectors = open_vectors(folder, work.vectors)
    rows = vectors.take(np.arange(len(vectors)))
    there = np.flatnonzero(has_vector(rows))
    contents = [read_examples(folder, part, ["content"])["content"] for part in folder.partitions()]
    known = dict[bytes, int]()
    points = np.array(
        [known.setdefault(xxhash.xxh3_128_digest(rows[row]), len(known)) for row in there],
        dtype=np.int64,
    )
    facts = {
        "target_rows": len(rows),
        "target_without": len(rows) - len(there),
        "target_repeated": len(there) - len(known),
    }
    if len(known) < 2:
        raise InputError(
            f"gio: {counted(len(known), 'different target point')} among"
            f" {counted(len(rows), 'target row')}; two are needed to say how dense the target is",
            fix="give more target examples, a hundred or so",
        )
    if facts["target_without"] or facts["target_repeated"]:
        log.warning("%s: of %d target rows %d have no vector and %d repeat another", NAME,
                    len(rows), facts["target_without"], facts["target_repeated"])  # fmt: skip
    first = there[np.unique(points, return_index=True)[1]]
    return pl.concat(contents).to_numpy()[there], rows[first], points, facts


def _sample(work: Work, pool: Vectors) -> Floats:
    """Some candidates of the pool.

    Raises:
        InputError: there are none.
    """
    may = np.concatenate([candidates(work, part) for part in work.run.partitions()])
    free = np.flatnonzero(may)
    order = np.random.default_rng(work.seed("sample")).permutation(len(free))
    for first in range(0, len(free), _SAMPLE):
        rows = pool.take(free[np.sort(order[first : first + _SAMPLE])])
        rows = rows[has_vector(rows)]
        if len(rows):
            return rows
    raise InputError(
        "gio: no training example of the pool has a vector",
        fix="check its texts and the representation; `curate embed` says how many have none",
    )


def _variance(vectors: Vectors) -> float:
    rows = vectors.take(np.arange(len(vectors)))
    return max(float(rows.var(axis=0, dtype=np.float64).sum()), 1e-30)
