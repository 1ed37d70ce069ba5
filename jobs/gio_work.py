"""The scorer `gio` on a worker: target, projection, clusters, and the table of a partition.

Shapes: N rows of a partition, n target points, d dimensions before and p after the projection.
"""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
from safetensors.numpy import load_file

from curate.config import parse
from curate.data.example import KEY, TRAIN
from curate.data.layout import RunFolder
from curate.data.partitions import Partition, remove_strays
from curate.data.tables import read_examples, read_table, write_table
from curate.models.epochs import random_seed
from curate.vectors.clusters import assign, kmeans
from curate.vectors.projection import Projection
from curate.vectors.search import nearest
from curate.vectors.store import Floats, Positions, Vectors, save
from jobs.gio import (
    NAME,
    assigned_output,
    centroids_output,
    device_of,
    places_output,
    points_output,
    prepared_output,
    steps_output,
)
from jobs.run import Receipt
from jobs.settings import Settings, parse_settings
from scorers.gio import GIO

log = logging.getLogger(__name__)

ROWS_OF_CLUSTER = 10
"""There are no more centroids than a cluster for so many rows."""


class Work(NamedTuple):
    """What every task has at hand."""

    settings: Settings
    run: RunFolder
    options: GIO
    vectors: str
    """The representation."""
    stamp: str

    @property
    def engine(self) -> dict[str, Any]:
        """Where faiss runs."""
        return {"threads": self.settings.cluster.threads, "device": device_of(self.settings)}

    def seed(self, purpose: str) -> int:
        return random_seed(self.settings.seed, NAME, self.options.seed, purpose)


def open_work(payload: dict[str, Any]) -> Work:
    settings = parse_settings(payload["settings"])
    return Work(
        settings,
        RunFolder(Path(settings.run)),
        parse(GIO, payload["options"]),
        payload["vectors"],
        payload["fingerprint"],
    )


class Prepared(NamedTuple):
    """The target, and the space in which it is compared."""

    projection: Projection | None
    target: Floats
    """(n, p) different points, or their centroids."""
    contents: npt.NDArray[np.uint64]
    """Content hash of each target row; none where centroids stand for them."""
    points: Positions
    """The target point of each of these rows."""

    def project(self, rows: Floats) -> Floats:
        return rows if self.projection is None else self.projection.apply(rows)


def read_prepared(run: RunFolder) -> Prepared:
    found = load_file(prepared_output(run).path)
    projection = None
    if "mean" in found:
        projection = Projection(found["mean"], found["components"], found["variances"])
    return Prepared(projection, found["target"], found["contents"], found["points"])


def has_vector(rows: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
    """(N,) where the numbers are finite and not all zero: a vector of zeros points nowhere."""
    return np.isfinite(rows).all(axis=1) & (rows != 0).any(axis=1)


def candidates(work: Work, part: Partition) -> npt.NDArray[np.bool_]:
    """(N,) rows that may be chosen: not held out, and not of the source that is chosen already."""
    split = read_examples(work.run, part, ["split"])["split"]
    return (split == TRAIN).to_numpy() & (part.source != work.options.start_source)


def project_work(payload: dict[str, Any]) -> Receipt:
    """The candidates of one partition in the space of the comparison."""
    work, part = open_work(payload), Partition(**payload["partition"])
    prepared = read_prepared(work.run)
    vectors = Vectors.open([work.run.vectors(part, work.vectors).path])
    found = np.full((len(vectors), prepared.target.shape[1]), np.nan, dtype=np.float32)
    may, zeros = candidates(work, part), 0
    for positions, block in vectors.blocks(1 << 14):
        there = has_vector(block)
        zeros += int((~there).sum())
        there &= may[positions]
        found[positions[there]] = prepared.project(block[there])
    num = int(np.isfinite(found[:, 0]).sum())
    facts = {"rows": len(found), "candidates": num, "zeros": zeros}
    if zeros:
        log.warning("%s: %d examples of %s have a vector of zeros or infinite numbers and cannot"
                    " be chosen", NAME, zeros, part.name)  # fmt: skip
    points_output(work.run, part).write(lambda path: save(path, found), work.stamp, **facts)
    return facts


def open_points(work: Work) -> Vectors:
    """All candidates, projected."""
    parts = work.run.partitions()
    return Vectors.open([points_output(work.run, part).path for part in parts])


def centroids_work(payload: dict[str, Any]) -> Receipt:
    """k-means of the candidates."""
    work = open_work(payload)
    marks = [points_output(work.run, part).mark() or {} for part in work.run.partitions()]
    num_rows = sum(mark["candidates"] for mark in marks)
    num = max(1, min(work.options.clusters, num_rows // ROWS_OF_CLUSTER))
    if num < work.options.clusters:
        log.info("%s: %d clusters in place of %d, as there are %d candidates", NAME, num,
                 work.options.clusters, num_rows)  # fmt: skip
    found = kmeans(open_points(work), num, seed=work.seed("centroids"), **work.engine)
    facts = {"clusters": num, "candidates": num_rows}
    centroids_output(work.run).write(lambda path: save(path, found), work.stamp, **facts)
    return facts


def assign_work(payload: dict[str, Any]) -> Receipt:
    """Cluster of each candidate of one partition, and its distance to the nearest target point."""
    work, part = open_work(payload), Partition(**payload["partition"])
    points = Vectors.open([points_output(work.run, part).path])
    rows = points.part(0)
    labels = np.full(len(rows), -1, dtype=np.int32)
    if work.options.mode == "centroids":
        centroids = Vectors.open([centroids_output(work.run).path]).part(0)
        labels = assign(points, centroids, **work.engine).labels
    there = np.isfinite(rows[:, 0])
    distances = np.full(len(rows), np.nan, dtype=np.float32)
    target = Vectors([read_prepared(work.run).target])
    distances[there] = nearest(rows[there], target, 1, metric="l2", **work.engine).values[:, 0]
    keys = read_examples(work.run, part, KEY)
    table = keys.with_columns(
        pl.Series("cluster", labels), pl.Series("distance", distances).fill_nan(None)
    )
    assigned_output(work.run, part).write(
        lambda path: write_table(table, path), work.stamp, rows=table.height
    )
    return {"rows": table.height}


def table_work(payload: dict[str, Any]) -> Receipt:
    """The quantities of one partition; null where an example is not chosen."""
    work, part = open_work(payload), Partition(**payload["partition"])
    parts = work.run.partitions()
    starts = np.cumsum([0, *((work.run.examples(own).mark() or {})["rows"] for own in parts)])
    index = int(payload["index"])
    places = np.load(places_output(work.run).path, mmap_mode="r")
    place = np.array(places[starts[index] : starts[index + 1]])  # (N,) float32
    chosen = np.isfinite(place)
    steps = read_table(steps_output(work.run).path)
    counts = steps["examples"].to_numpy()
    step = np.searchsorted(np.cumsum(counts), np.nan_to_num(place), side="right")
    assigned = read_table(assigned_output(work.run, part).path)

    def of_step(name: str) -> pl.Series:
        values = np.full(len(place), np.nan, dtype=np.float32)
        values[chosen] = steps[name].to_numpy()[step[chosen]]
        return pl.Series(name.replace("divergence", "kl"), values).fill_nan(None)

    cluster = assigned["cluster"].cast(pl.Float32)
    table = assigned.select(KEY).with_columns(
        pl.Series("gio", place).fill_nan(None),
        *(of_step(name) for name in ("step", "divergence", "weight")),
        pl.Series("cluster", cluster).set(cluster < 0, None),
        assigned["distance"],
    )
    facts = {"chosen": int(chosen.sum()), "unscored": int((~chosen).sum())}
    work.run.quantities(part, NAME).write(
        lambda path: write_table(table, path), work.stamp, rows=table.height, **facts
    )
    names = {own.name for own in parts}
    remove_strays(work.run.root / NAME / "assigned", names)
    return {"rows": table.height, **facts}
