"""What `gio` searches in: the candidates of the whole pool, and what is selected before.

Memory: 20 bytes for each example of the pool, and in mode `points` its projected vector too.

Shapes: N examples of the pool, C candidates, m selected points, p dimensions.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from curate.data.counts import read_counts
from curate.data.example import TRAIN
from curate.data.partitions import Partition
from curate.data.tables import read_examples, read_table
from curate.errors import ConfigError
from curate.vectors.clusters import kmeans
from curate.vectors.store import Floats, Positions, Vectors
from jobs.gio import assigned_output, centroids_output
from jobs.gio_work import Prepared, Work, has_vector, open_points
from jobs.representations import open_vectors
from scorers.gio_explode import Integers


class Pool(NamedTuple):
    """The examples that can be chosen, and the candidates that stand for them."""

    members: npt.NDArray[np.int32]
    """(N,) candidate of each example, -1 for none."""
    distances: Floats
    """(N,) to the nearest target point; NaN where there is no vector."""
    costs: Integers
    """(N,) tokens of each example, or 1."""
    points: Floats
    """(C, p)"""
    names: Integers
    """(C,) cluster number, or position of the example."""
    own: Positions
    """(C,) target point that a candidate is a copy of, -1 for none."""


class Start(NamedTuple):
    """What is selected before the search."""

    points: Floats
    """(m, p)"""
    chosen: Positions
    """Positions of examples that are chosen thereby."""


def read_start(work: Work, prepared: Prepared) -> Start:
    """The given source, or as the option says."""
    options = work.options
    draw = np.random.default_rng(work.seed("start"))
    nothing = np.zeros(0, dtype=np.int64)
    if options.start_source is not None:
        parts = work.run.partitions()
        masks = [_is_given(work, part) for part in parts]
        positions = np.flatnonzero(np.concatenate(masks))
        rows = open_vectors(work.run, work.vectors).take(positions)
        there = has_vector(rows)
        if not there.any():
            raise ConfigError(
                f"gio.start_source: no training example of {options.start_source} has a vector",
                fix="remove it, or check the source's texts",
            )
        rows = prepared.project(rows[there])
        return Start(_as_centroids(work, rows), positions[there])
    points = open_points(work)
    usable = points.usable()
    num = 1 if options.start == "point" else min(options.start_size, len(usable))
    positions = np.sort(draw.choice(usable, num, replace=False))
    rows = points.take(positions)
    if options.start == "uniform":
        spread = points.take(draw.choice(usable, min(1000, len(usable)), replace=False))
        both = np.concatenate([prepared.target, spread])
        size = (options.start_size, both.shape[1])
        rows = draw.uniform(both.min(axis=0), both.max(axis=0), size).astype(np.float32)
    return Start(rows, positions if options.start == "random" else nothing)


def _is_given(work: Work, part: Partition) -> npt.NDArray[np.bool_]:
    """(N,) training rows of the source that is selected already."""
    split = read_examples(work.run, part, ["split"])["split"]
    return (split == TRAIN).to_numpy() & (part.source == work.options.start_source)


def _as_centroids(work: Work, rows: Floats) -> Floats:
    """Centroids, as many for so many rows as the pool has: one point counts as much as another."""
    if work.options.mode == "points":
        return rows
    mark = centroids_output(work.run).mark() or {}
    num = max(1, round(len(rows) * mark["clusters"] / mark["candidates"]))
    return kmeans(Vectors([rows]), min(num, len(rows)), seed=work.seed("given"), **work.engine)


def read_pool(work: Work, prepared: Prepared, start: Start, tokens: str | None) -> Pool:
    """All candidates; `tokens` names the tokenizer of a budget, or None where examples count."""
    parts = work.run.partitions()
    tables = [
        read_table(assigned_output(work.run, part).path, ["cluster", "distance"]) for part in parts
    ]
    table = pl.concat(tables)
    distances = table["distance"].fill_null(np.nan).to_numpy()
    costs = np.ones(table.height, dtype=np.int64)
    if tokens is not None:
        counts = [read_counts(work.run, part, tokens)["num_tokens"].to_frame() for part in parts]
        costs = pl.concat(counts)["num_tokens"].to_numpy()
    free = np.isfinite(distances)
    free[start.chosen] = False
    if work.options.mode == "points":
        names = np.flatnonzero(free)
        members = np.full(table.height, -1, dtype=np.int32)
        members[names] = np.arange(len(names))
        points = open_points(work).take(names)
        return Pool(members, distances, costs, points, names, _copies(work, prepared)[names])
    labels = np.where(free, table["cluster"].to_numpy(), -1)
    centroids = Vectors.open([centroids_output(work.run).path]).part(0)
    sizes = np.bincount(labels[labels >= 0], minlength=len(centroids))
    names = np.flatnonzero((sizes > 0) & np.isfinite(centroids).all(axis=1))
    number = np.full(len(centroids) + 1, -1, dtype=np.int32)
    number[names] = np.arange(len(names))
    own = np.full(len(names), -1, dtype=np.int64)
    return Pool(number[labels], distances, costs, centroids[names], names, own)


def _copies(work: Work, prepared: Prepared) -> Positions:
    """(N,) the target point with the same content, -1 for none."""
    parts = work.run.partitions()
    content = pl.concat([read_examples(work.run, part, ["content"]) for part in parts])
    if work.options.copies == "keep" or not len(prepared.contents):
        return np.full(content.height, -1, dtype=np.int64)
    known = pl.DataFrame({"content": prepared.contents, "point": prepared.points})
    known = known.unique("content", keep="first", maintain_order=True)
    joined = content.join(known, on="content", how="left", maintain_order="left")
    return joined["point"].fill_null(-1).to_numpy()
