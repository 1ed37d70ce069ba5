"""Clusters of a pool as domains: how they are found, and named by their most typical words.

A word is typical of a cluster where many of its texts have it and few of the others do:

    score(w, c) = p(w | c) (ln(p(w | c) / q(w, c)))^2

with p(w | c) the share of the cluster's texts that have the word at least once, and q(w, c) that of
all other texts of the pool, plus half a text. It is the class-based tf-idf idea with whole texts as
the count, so that one long text names nothing, and with the rest of the pool below, so that words
all texts share come to nothing in any language.

Source of the idea: Grootendorst, "BERTopic: Neural topic modeling with a class-based TF-IDF
procedure", 2022, arXiv:2203.05794. Departures: the formula above in place of tf ln(1 + A / f),
which leaves the commonest words high unless a list of stop words takes them out; and the square,
without which genres are named by their pronouns (we, his) rather than by what they are about.

Shapes: N vectors, d dimensions, k clusters.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from curate.config import STRICT
from curate.errors import ConfigError
from curate.vectors.store import Floats, Vectors

NO_VECTOR = "no-vector"
"""Domain of the rows that have no vector."""

_RUN = re.compile(r"[^\W_]+")
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]+")
_LONGEST_WORD = 30
_LEAST_TEXTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Domains:
    """Settings of `curate domains`."""

    __pydantic_config__: ClassVar = STRICT

    clusters: int = 20
    """How many domains; fewer come out where the vectors have fewer distinct values."""
    vectors: str | None = None
    """Name of the representation; by default the only one."""
    seed: int | None = None
    """Of the clustering; by default that of the run."""
    sample: int = 50_000
    """Clusters are found on at most so many training rows; then every row is put into one."""
    components: int | None = None
    """Directions of largest variance along which clusters are sought; by default in all."""
    attempts: int = 5
    """How often k-means begins anew; the attempt with the least inertia is taken."""
    words: int = 3
    """Words in a name."""

    def __post_init__(self) -> None:
        least = min(self.clusters, self.sample, self.attempts, self.words)
        if least < 1 or (self.components is not None and self.components < 1):
            raise ConfigError(
                "domains: clusters, sample, components, attempts and words must be positive",
                fix="remove them to use the defaults",
            )
        if self.sample < self.clusters:
            raise ConfigError(
                f"domains.sample is {self.sample} for {self.clusters} clusters",
                fix="raise it to a few hundred rows for each cluster",
            )


def find_clusters(rows: Floats, options: Domains, *, seed: int, threads: int = 1) -> Floats:
    """Centroids (k, d), the largest cluster first; clusters without any row are left out.

    Clusters are sought along the components. Their centroids are given in the full space, where
    what lies off the components is the same for all of them and so decides nothing.

    Args:
        rows: (N, d) the sample, all of them vectors.
        options: of the clustering.
        seed: of k-means.
        threads: of the CPU.

    Raises:
        ConfigError: there are fewer rows than clusters.
    """
    from curate.vectors.clusters import assign, kmeans
    from curate.vectors.projection import fit_pca

    vectors, projection = Vectors([rows]), None
    if options.components is not None and options.components < vectors.dim and len(rows):
        projection = fit_pca(vectors, options.components, seed=seed, sample=len(rows))
        vectors = Vectors([projection.apply(rows)])
    centroids = kmeans(
        vectors, options.clusters, seed=seed, redo=options.attempts, threads=threads,
        max_rows_per_centroid=max(1, -(-len(rows) // options.clusters)),
    )  # fmt: skip
    labels = assign(vectors, centroids, threads=threads).labels
    sizes = np.bincount(labels, minlength=len(centroids))
    order = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    centroids = centroids[order]
    if projection is None:
        return centroids
    return (centroids @ projection.components + projection.mean).astype(np.float32)


def words_of(text: str) -> set[str]:
    """The words of a text, each once and in lower case; numbers are none.

    Scripts without spaces are cut into pairs of characters.
    """
    found = set[str]()
    for run in _RUN.findall(text.lower()):
        for unspaced in _UNSPACED.findall(run):
            found.update(unspaced[i : i + 2] for i in range(max(1, len(unspaced) - 1)))
        for word in _UNSPACED.split(run):
            if 1 < len(word) <= _LONGEST_WORD and not word.isnumeric():
                found.add(word)
    return found


class Words:
    """In how many texts of each cluster a word stands; filled text by text."""

    def __init__(self, num_clusters: int) -> None:
        self.counts = [Counter[str]() for _ in range(num_clusters)]
        self.texts = [0] * num_clusters

    def add(self, cluster: int, text: str) -> None:
        """Count one text."""
        self.texts[cluster] += 1
        self.counts[cluster].update(words_of(text))

    def typical(self, shares: Sequence[float], most: int) -> list[list[str]]:
        """The most typical words of each cluster, the best first; none where it has no text.

        Args:
            shares: (k,) of the pool, in each cluster.
            most: how many words.
        """
        pool: dict[str, float] = defaultdict(float)
        for counts, num, share in zip(self.counts, self.texts, shares, strict=True):
            for word, count in counts.items():
                pool[word] += share * count / num
        half = 0.5 / max(1, sum(self.texts))
        found: list[list[str]] = []
        for counts, num, share in zip(self.counts, self.texts, shares, strict=True):
            least = _LEAST_TEXTS if num > _LEAST_TEXTS else 1
            scored: list[tuple[float, str]] = []
            for word, count in counts.items():
                rate = count / num
                others = max(0.0, pool[word] - share * rate) / max(1 - share, half) + half
                if count >= least and rate > others:
                    scored.append((-rate * math.log(rate / others) ** 2, word))
            found.append(_unlike([word for _, word in sorted(scored)], most))
        return found


def _unlike(words: Sequence[str], most: int) -> list[str]:
    """The first words; of two that begin alike only the better one."""
    chosen: list[str] = []
    for word in words:
        if len(chosen) == most:
            break
        if not any(word.startswith(other) or other.startswith(word) for other in chosen):
            chosen.append(word)
    return chosen


def names_of(words: Iterable[Sequence[str]], length: int) -> list[str]:
    """A name for each cluster: its words joined by hyphens, longer where two would be the same.

    Args:
        words: of each cluster, the most typical first.
        length: words of a name.
    """
    taken = {NO_VECTOR}
    names: list[str] = []
    for number, own in enumerate(words, start=1):
        longer = (
            "-".join(own[:size]) for size in range(min(length, len(own)), len(own) + 1) if own
        )
        numbered = f"{'-'.join(own[:length]) or 'cluster'}-{number}"
        name = next((name for name in longer if name not in taken), numbered)
        while name in taken:
            name += "x"
        taken.add(name)
        names.append(name)
    return names


class Placed(NamedTuple):
    """The rows of a partition in their clusters."""

    labels: npt.NDArray[np.int32]
    """(N,) -1 for a row without a vector."""
    rows: list[int]
    """(k,) how many each cluster has."""
    inertia: list[float]
    """(k,) sum of the squared distances to its centroid."""


def place(vectors: Vectors, centroids: Floats, *, threads: int = 1) -> Placed:
    """Put every vector into the cluster of its nearest centroid."""
    from curate.vectors.clusters import assign

    labels, distances = assign(vectors, centroids, threads=threads)
    there = labels >= 0
    squares = np.square(distances[there].astype(np.float64))
    return Placed(
        labels,
        np.bincount(labels[there], minlength=len(centroids)).tolist(),
        np.bincount(labels[there], squares, minlength=len(centroids)).tolist(),
    )
