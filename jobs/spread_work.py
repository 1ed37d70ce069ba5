"""What workers do for `spread` at first: choose the core set, and copy its rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from curate.config import parse
from curate.data.example import KEY
from curate.data.layout import RunFolder
from curate.data.partitions import Output
from curate.data.reading import payload_schema, read_portable
from curate.data.tables import read_examples, read_table, write_table
from curate.errors import ConfigError, InputError, counted
from curate.vectors.clusters import assign, kmeans
from curate.vectors.coreset import evenly, group_distances, near_median, strata_order
from curate.vectors.store import Positions, Vectors
from jobs.representations import open_vectors, representation
from jobs.settings import Settings, parse_settings
from scorers.spread import Spread

NAME = "spread"

LEAST = 20
"""Fewer examples in the core set say nothing about fidelity."""

_MOST_CLUSTERS = 256
_ROWS_PER_CLUSTER = 20

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Places:
    """Where the files of one inner scorer lie, in `spread/<scorer>/` of the run."""

    root: Path

    @property
    def choice(self) -> Output:
        """Key and position of the core set, and the row of each in its source's file."""
        return Output(self.root / "choice.parquet")

    def rows(self, source: str) -> Output:
        """The rows of the core set, with all columns of the input."""
        return Output(self.root / "data" / f"{source}.parquet")

    @property
    def core(self) -> Path:
        """The run folder of the core set."""
        return self.root / "core"

    @property
    def scores(self) -> Output:
        """What was measured, by the keys of the whole run."""
        return Output(self.root / "scores.parquet")

    @property
    def fit(self) -> Output:
        """The linear map, and in its mark what cross-validation said."""
        return Output(self.root / "fidelity.safetensors")

    @property
    def gate(self) -> Output:
        """Which columns are spread, and how."""
        return Output(self.root / "gate.json")


def places(run: RunFolder, options: Spread) -> Places:
    return Places(run.root / NAME / options.name.rpartition(":")[2])


@dataclass(frozen=True, slots=True)
class Work:
    """What a task's payload says."""

    settings: Settings
    options: Spread
    run: RunFolder
    places: Places
    stamp: str

    def vectors(self) -> Vectors:
        """Of all examples."""
        return open_vectors(self.run, representation(self.settings, self.options.vectors))


def open_work(payload: Mapping[str, Any]) -> Work:
    settings = parse_settings(payload["settings"])
    options = parse(Spread, dict(payload["options"]))
    run = RunFolder(Path(settings.run))
    return Work(settings, options, run, places(run, options), str(payload["fingerprint"]))


def choose_work(payload: dict[str, Any]) -> dict[str, Any]:
    """Choose the core set among all examples that have a vector."""
    work = open_work(payload)
    options = work.options
    columns = [*KEY, "label", "num_chars"]
    examples = pl.concat([read_examples(work.run, p, columns) for p in work.run.partitions()])
    vectors = work.vectors()
    usable = _usable(vectors)
    size = _checked_size(options, len(usable), examples.height)
    pool = examples[usable]
    bits = draws(pool, work, "choice")
    if options.choose == "uniform":
        chosen = np.sort(np.argsort(bits, kind="stable")[:size])
    elif options.choose == "median":
        groups, distances = _grouped(work, vectors, usable, pool["label"], size)
        chosen = near_median(groups, distances, bits, size)
    else:
        groups = _clusters(work, vectors, usable, size)
        order = strata_order(groups, pool["num_chars"].to_numpy(), bits)
        start = xxhash.xxh3_64_intdigest(_seed_text(work, "start").encode()) >> 32
        chosen = evenly(order, size, start=start)
    table = pool[chosen].select(KEY).with_columns(
        pl.Series("position", usable[chosen]),
        pl.int_range(pl.len()).over("source").alias("core_row"),
    )  # fmt: skip
    work.places.choice.write(
        lambda path: write_table(table, path), work.stamp, rows=table.height, pool=examples.height
    )
    return {"rows": table.height}


def _usable(vectors: Vectors) -> Positions:
    """(n,) rows whose vector has a direction."""
    found = [where[np.any(block != 0, axis=1)] for where, block in vectors.blocks()]
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def _checked_size(options: Spread, num: int, num_all: int) -> int:
    if num < LEAST:
        raise InputError(
            f"{counted(num, 'example has a vector', 'examples have a vector')} of"
            f" {num_all:,}: too few to spread scores among, which takes {LEAST}",
            fix=f"measure all of them with {options.name} itself",
        )
    size = options.size(num)
    if size < LEAST:
        raise ConfigError(
            f"spread.core {options.core:g} makes a core set of {size} of {num:,} examples, which"
            f" takes {LEAST} or more for its cross-validation",
            fix=f"raise spread.core, or measure all examples with {options.name} itself",
        )
    if size > num:
        raise ConfigError(
            f"spread.core asks for {size:,} examples, and {num:,} have a vector",
            fix="set it to fewer, or to a share such as 0.05",
        )
    check_neighbours(options, size)
    return size


def check_neighbours(options: Spread, size: int) -> None:
    """Refuse more neighbours than there are."""
    if options.neighbours > size:
        raise ConfigError(
            f"spread.neighbours is {options.neighbours}, but the core set has {size} examples",
            fix="lower spread.neighbours, or raise spread.core",
        )


def _clusters(work: Work, vectors: Vectors, usable: Positions, size: int) -> Positions:
    """(n,) cluster of each usable row."""
    k = work.options.clusters or min(_MOST_CLUSTERS, max(1, size // _ROWS_PER_CLUSTER))
    seed = xxhash.xxh3_64_intdigest(_seed_text(work, "clusters").encode()) & 0x7FFF_FFFF
    threads = work.settings.cluster.threads
    centroids = kmeans(vectors, k, seed=seed, threads=threads)
    return assign(vectors, centroids, threads=threads).labels[usable].astype(np.int64)


def _grouped(
    work: Work, vectors: Vectors, usable: Positions, labels: pl.Series, size: int
) -> tuple[Positions, Scores]:
    """Class, or cluster where an example has no label, and distance from its mean: (n,) each."""
    groups = np.zeros(len(vectors), dtype=np.int64)
    if labels.null_count():
        groups[usable] = _clusters(work, vectors, usable, size)
    else:
        groups[usable] = np.unique(labels.to_numpy(), return_inverse=True)[1]
    return groups[usable], group_distances(vectors, groups)[usable]


def draws(keys: pl.DataFrame, work: Work, what: str) -> npt.NDArray[np.uint64]:
    """(n,) random bits of each example, from the seeds, the purpose and its key."""
    text = _seed_text(work, what)
    found = [
        xxhash.xxh3_64_intdigest(f"{text}\0{source}\0{file}\0{row}".encode())
        for source, file, row in keys.select(KEY).iter_rows()
    ]
    return np.array(found, dtype=np.uint64)


def _seed_text(work: Work, what: str) -> str:
    return f"{work.settings.seed}\0{NAME}\0{work.options.seed}\0{what}"


def rows_work(payload: dict[str, Any]) -> dict[str, Any]:
    """Copy the rows of one source's core set, with all columns."""
    work = open_work(payload)
    name = str(payload["source"])
    source = work.settings.sources[name]
    choice = read_table(work.places.choice.path).filter(pl.col("source") == name)
    found: list[pa.Table] = []
    parts = [part for part in work.run.partitions() if part.source == name]
    for part in parts:
        end = part.first_row + part.num_rows
        own = choice.filter(
            pl.col("file") == part.file, pl.col("row").is_between(part.first_row, end - 1)
        )
        found.append(read_portable(work.run, part, source, own["row"].to_numpy()))
    table = pa.concat_tables(found, promote_options="permissive")
    table = table.replace_schema_metadata(payload_schema(work.run, parts).metadata)
    work.places.rows(name).write(
        lambda path: pq.write_table(table, path, compression="zstd"), work.stamp,
        rows=table.num_rows,
    )  # fmt: skip
    return {"rows": table.num_rows}
