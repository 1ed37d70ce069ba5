"""What finds and applies clustered domains on a worker.

Shapes: N examples of a partition or of the sample, d dimensions, k clusters.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from curate.data.example import KEY, TRAIN
from curate.data.files import read_json
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.data.reading import read_fields
from curate.data.tables import read_examples, write_table
from curate.vectors.domains import NO_VECTOR, Domains, Words, find_clusters, names_of, place
from curate.vectors.store import Floats, Positions, Vectors, save
from jobs.representations import open_vectors
from jobs.settings import Settings, parse_settings

VERSION = 1
"""Raised when the same vectors and settings would give other domains."""

_READ_PARTITIONS = 64
"""At most so many partitions are read for words."""
_NAMING_ROWS = 20_000
_LEAST_NAMING_ROWS = 50
_NAMING_CHARS = 2_000
_SHOWN_WORDS = 10
_SHOWN_EXAMPLES = 3
_SHOWN_CHARS = 160


def centroids_output(run: RunFolder) -> Output:
    """(k, d) float32."""
    return Output(run.root / "domains" / "centroids.npy")


def names_output(run: RunFolder) -> Output:
    """Name, words and nearest examples of each cluster."""
    return Output(run.root / "domains" / "names.json")


def fit_work(payload: dict[str, Any]) -> dict[str, Any]:
    """Find the clusters on a sample of the training rows, and name them."""
    settings = parse_settings(payload["settings"])
    run = RunFolder(Path(settings.run))
    options = settings.domains
    assert options is not None
    vectors = open_vectors(run, payload["name"])
    sample = _sample(run, vectors, options, payload["seed"])
    rows = vectors.take(sample)
    centroids = find_clusters(rows, options, seed=payload["seed"], threads=settings.cluster.threads)
    placed = place(Vectors([rows]), centroids, threads=settings.cluster.threads)
    away = np.linalg.norm(rows - centroids[placed.labels], axis=1)
    drawn = _Drawn(sample, placed.labels, away, placed.rows)
    values = {"clusters": _named(settings, run, drawn, vectors, options, payload["seed"])}
    text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    stamp = payload["fingerprint"]
    centroids_output(run).write(lambda path: save(path, centroids), stamp)
    names_output(run).write(lambda path: path.write_text(text, encoding="utf-8"), stamp)
    return {"clusters": len(centroids), "sample": len(sample)}


def place_work(payload: dict[str, Any]) -> dict[str, Any]:
    """Write the domain of every example of a partition."""
    settings = parse_settings(payload["settings"])
    run = RunFolder(Path(settings.run))
    part = Partition(**payload["partition"])
    vectors = Vectors.open([run.vectors(part, payload["name"]).path])
    centroids = np.load(centroids_output(run).path, allow_pickle=False)
    placed = place(vectors, centroids, threads=settings.cluster.threads)
    named = read_json(names_output(run).path)["clusters"]
    names = np.array([*(entry["domain"] for entry in named), NO_VECTOR], dtype=object)
    domain = pl.Series("domain", names[placed.labels].tolist(), dtype=pl.String)  # -1 is the last
    table = read_examples(run, part, KEY).with_columns(domain)
    facts = {"rows": table.height, "sizes": placed.rows, "inertia": placed.inertia}
    run.domains(part).write(
        lambda path: write_table(table, path), payload["fingerprint"], **facts,
        clusters=payload["clusters"],
    )  # fmt: skip
    return {"rows": table.height}


@dataclass(frozen=True, slots=True)
class _Drawn:
    """The sample, clustered."""

    positions: Positions
    """(N,) rows of the pool's vectors, ascending."""
    labels: npt.NDArray[np.int32]
    distances: Floats
    sizes: list[int]
    """(k,) rows of each cluster."""


def _sample(run: RunFolder, vectors: Vectors, options: Domains, seed: int) -> Positions:
    """Training rows with a vector, at most `options.sample` of them."""
    splits = [read_examples(run, part, ["split"])["split"] for part in run.partitions()]
    is_train = np.concatenate([(split == TRAIN).to_numpy() for split in splits])
    usable = vectors.usable()
    usable = usable[is_train[usable]]
    if len(usable) <= options.sample:
        return usable
    draw = np.random.default_rng([seed, 1])
    return np.sort(draw.choice(usable, options.sample, replace=False))


def _named(
    settings: Settings, run: RunFolder, drawn: _Drawn, vectors: Vectors, options: Domains,
    seed: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """domain, words, and the nearest examples of each cluster, from some of its texts."""
    num_clusters = len(drawn.sizes)
    words = Words(num_clusters)
    nearest: list[list[tuple[float, int, dict[str, Any]]]] = [[] for _ in range(num_clusters)]
    parts, starts = run.partitions(), vectors.starts
    chosen = _rows_to_read(drawn, starts, seed)
    for number in np.unique(np.searchsorted(starts, drawn.positions[chosen], "right") - 1).tolist():
        positions = drawn.positions[chosen]
        own = chosen[(positions >= starts[number]) & (positions < starts[number + 1])]
        rows = drawn.positions[own] - starts[number]
        keys = read_examples(run, parts[number], KEY)[rows]
        texts = _texts(settings, run, parts[number], rows)
        for at, key, text in zip(own.tolist(), keys.iter_rows(named=True), texts, strict=True):
            cluster = int(drawn.labels[at])
            words.add(cluster, text)
            shown = key | {"text": " ".join(text[:_SHOWN_CHARS].split())}
            best = nearest[cluster]
            best.append((float(drawn.distances[at]), at, shown))
            best.sort(key=lambda entry: entry[:2])
            del best[_SHOWN_EXAMPLES:]
    shares = [size / max(1, len(drawn.labels)) for size in drawn.sizes]
    typical = words.typical(shares, max(_SHOWN_WORDS, options.words))
    names = names_of(typical, options.words)
    return [
        {"domain": name, "words": own, "examples": [entry for _, _, entry in best]}
        for name, own, best in zip(names, typical, nearest, strict=True)
    ]


def _rows_to_read(drawn: _Drawn, starts: Positions, seed: int) -> Positions:
    """Places in the sample: of each cluster its nearest rows and some more, from few partitions."""
    draw = np.random.default_rng([seed, 2])
    parts = np.searchsorted(starts, drawn.positions, "right") - 1
    read = draw.permutation(np.unique(parts))[:_READ_PARTITIONS]
    places = np.flatnonzero(np.isin(parts, read))
    each = max(_LEAST_NAMING_ROWS, _NAMING_ROWS // max(1, len(drawn.sizes)))
    found: list[Positions] = []
    for cluster in range(len(drawn.sizes)):
        own = places[drawn.labels[places] == cluster]
        near = own[np.argsort(drawn.distances[own], kind="stable")[:_SHOWN_EXAMPLES]]
        found.append(np.union1d(near, draw.permutation(own)[:each]))
    return np.sort(np.concatenate(found)) if found else np.zeros(0, dtype=np.int64)


def _texts(settings: Settings, run: RunFolder, part: Partition, rows: Positions) -> list[str]:
    """The texts of some rows; empty where examples are numbers or images."""
    fields = read_fields(run, part, settings.sources[part.source])[rows]
    if not {"text", "prompt", "messages"}.intersection(fields.columns):
        return [""] * len(rows)
    from curate.models.plain_inputs import plain_inputs

    return [str(text)[:_NAMING_CHARS] for text in plain_inputs(fields, None)]
