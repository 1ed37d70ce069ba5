"""The most similar earlier row of each row that is the first of its content.

Each task writes `rows` (positions), `similarity`, `earlier` (a position, -1 for none) and
`held_out`, the largest similarity to a held-out row.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.vectors.clusters import assign, kmeans
from curate.vectors.minhash import (
    NOTHING,
    Minima,
    band_keys,
    bands_for,
    best_across,
    best_in_buckets,
)
from curate.vectors.pairs import best_among, best_earlier, mean_direction
from curate.vectors.store import Floats, Positions, Vectors
from jobs.duplicates import (
    cells_output,
    centroids_output,
    num_cells,
    num_rows,
    pairs_output,
    texts_output,
)
from jobs.duplicates_texts import Firsts, Opened, open_firsts, open_task, save_array
from jobs.representations import open_vectors, representation
from scorers.duplicates import CENTRAL, FAR


class Found(NamedTuple):
    """Of some rows, (n,) each."""

    rows: Positions
    similarity: Floats
    earlier: Positions
    held_out: Floats


def fit_work(payload: dict[str, Any]) -> dict[str, Any]:
    """Centroids (k, d) of the cells, of length 1; fewer where fewer rows have a vector."""
    work = open_task(payload)
    vectors = open_vectors(work.run, payload["vectors"])
    usable = len(vectors.usable())
    k = min(int(payload["cells"]), usable)
    if k < 2:
        centroids = mean_direction(vectors)
    else:
        centroids = kmeans(
            vectors, k, seed=work.settings.seed, spherical=True,
            threads=work.settings.cluster.threads, device=payload["device"],
        )  # fmt: skip
    centroids_output(work.run).write(
        lambda path: save_array(path, centroids), work.stamp, cells=len(centroids)
    )
    return {"cells": len(centroids)}


def assign_work(payload: dict[str, Any]) -> dict[str, Any]:
    """The cell of each row of one partition (-1 for none), and the distance from its centre."""
    work = open_task(payload)
    part = Partition(**payload["partition"])
    centroids = np.load(centroids_output(work.run).path)
    whole = open_vectors(work.run, payload["vectors"])
    own = Vectors([whole.part(int(payload["index"]))])
    if len(centroids) > 1:
        cells, distances = assign(
            own,
            centroids,
            threads=work.settings.cluster.threads,
            device=payload["device"],
        )
    else:  # one cell needs no search
        cells = np.full(len(own), -1, dtype=np.int32)
        distances = np.full(len(own), np.nan, dtype=np.float32)
        for positions, block in own.blocks():
            cells[positions] = 0
            distances[positions] = np.linalg.norm(block - centroids[0], axis=1)
    arrays = {"cells": cells, "distances": distances}
    cells_output(work.run, part).write(
        lambda path: save_file(arrays, path), work.stamp, rows=len(cells)
    )
    return {"rows": len(cells)}


def cell_work(payload: dict[str, Any]) -> dict[str, Any]:
    """The most similar earlier row, in some of the cells."""
    work = open_task(payload)
    number, of = int(payload["number"]), int(payload["of"])
    k = num_cells(work.run, work.options)
    firsts = open_firsts(work.run)
    vectors = open_vectors(work.run, representation(work.settings, work.options.vectors))
    parts = [load_file(cells_output(work.run, p).path) for p in work.run.partitions()]
    cells = np.concatenate([part["cells"] for part in parts])
    distances = np.concatenate([part["distances"] for part in parts])
    sign = {FAR: -1.0, CENTRAL: 1.0}.get(work.options.order)
    order = firsts.ranks.astype(np.float64) if sign is None else sign * distances
    found: list[Found] = []
    for cell in range(k * number // of, k * (number + 1) // of):
        rows = np.flatnonzero((cells == cell) & firsts.is_first)
        rows = rows[np.lexsort((rows, order[rows]))]
        found += _in_cell(vectors, firsts, rows)
    return _save(work, number, found)


def _in_cell(vectors: Vectors, firsts: Firsts, rows: Positions) -> list[Found]:
    """Training rows and held-out rows of a cell, in order of precedence."""
    train, held = rows[firsts.is_train[rows]], rows[~firsts.is_train[rows]]
    found: list[Found] = []
    for own in (train, held):
        similar = best_earlier(vectors, own)
        leaked = np.full(len(own), np.nan, dtype=np.float32)
        if own is train:
            leaked = best_among(vectors, own, held).values
        found.append(Found(own, similar.values, similar.others, leaked))
    return found


def band_work(payload: dict[str, Any]) -> dict[str, Any]:
    """The most similar earlier row among the candidates of one band."""
    work = open_task(payload)
    band = int(payload["band"])
    firsts = open_firsts(work.run)
    keys, is_there = _band_keys(work, band)
    rows = np.flatnonzero(is_there & firsts.is_first)
    rows = _shared(rows, keys)
    rows = rows[np.argsort(firsts.ranks[rows], kind="stable")]
    train, held = rows[firsts.is_train[rows]], rows[~firsts.is_train[rows]]
    own, other = _take(work.run, train), _take(work.run, held)
    found: list[Found] = []
    for places, minima in ((train, own), (held, other)):
        similar = best_in_buckets(minima, keys[places])
        earlier = np.where(similar.others >= 0, places[similar.others], -1) if len(places) else (
            similar.others
        )  # fmt: skip
        leaked = np.full(len(places), np.nan, dtype=np.float32)
        if places is train:
            leaked = best_across(own, keys[train], other, keys[held]).values
        found.append(Found(places, similar.values, earlier, leaked))
    return _save(work, band, found)


def _band_keys(work: Opened, band: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """(N,) keys of all rows, and whether they have any n-gram."""
    rows = bands_for(work.options.limit).rows
    keys: list[npt.NDArray[np.uint64]] = []
    there: list[npt.NDArray[np.bool_]] = []
    for part in work.run.partitions():
        minima = np.load(texts_output(work.run, part).path, mmap_mode="r")
        keys.append(band_keys(minima, band, rows))
        there.append(has_ngrams(minima))
    return np.concatenate(keys), np.concatenate(there)


def has_ngrams(minima: Minima) -> npt.NDArray[np.bool_]:
    """(N,)"""
    return np.asarray((minima[:, :8] != NOTHING).any(axis=1))


def _shared(rows: Positions, keys: npt.NDArray[np.uint64]) -> Positions:
    """The rows whose key another of them has too."""
    _, inverse, counts = np.unique(keys[rows], return_inverse=True, return_counts=True)
    return rows[counts[inverse] > 1]


def _take(run: RunFolder, rows: Positions) -> Minima:
    """(n, K) minima of some rows, in their order."""
    found: Minima | None = None
    start = 0
    for part in run.partitions():
        minima = np.load(texts_output(run, part).path, mmap_mode="r")
        if found is None:
            found = np.empty((len(rows), minima.shape[1]), dtype=np.uint32)
        height = num_rows(run, part)
        mine = np.flatnonzero((rows >= start) & (rows < start + height))
        found[mine] = minima[rows[mine] - start]
        start += height
    assert found is not None
    return found


def _save(work: Opened, number: int, found: list[Found]) -> dict[str, Any]:
    empty = Found(
        np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.int64),
        np.zeros(0, np.float32),
    )  # fmt: skip
    arrays = {
        name: np.concatenate([getattr(each, name) for each in (empty, *found)])
        for name in Found._fields
    }
    pairs_output(work.run, number).write(
        lambda path: save_file(arrays, path), work.stamp, rows=len(arrays["rows"])
    )
    return {"rows": len(arrays["rows"])}
