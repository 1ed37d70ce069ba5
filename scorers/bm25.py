"""BM25: how many of the target's telling words an example shares, in words alone.

    idf(t)   = ln(1 + (N - n_t + 0.5) / (n_t + 0.5))
    tf(t, d) = f_t(d) / (f_t(d) + k1 (1 - b + b |d| / avg |d|))
    s(q, d)  = sum over distinct words t of q of idf(t) tf(t, d) / sum over t of q of idf(t)
    bm25(d)  = mean, or maximum, of s(q, d) over the target's rows q

with n_t of the N examples of the pool holding t, f_t(d) the times that t stands in d, and |d| the
words of d.

Source: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond",
Foundations and Trends in Information Retrieval 3(4), 2009. The idf and the missing factor k1 + 1
are those of Lucene: Kamphuis, de Vries, Boytsov and Lin, "Which BM25 Do You Mean?", ECIR 2020.

Departures: s is a share of the query's whole weight, in [0, 1), so that target rows of different
lengths compare; a word counts once in a query however often it stands there (k3 = 0). No word is
cut to its stem or left out.
Cost: two readings of the texts, no model. The mean is one product with a single vector whatever the
target's size; the maximum costs distinct words of the pool's texts times target rows.
Shapes: N rows of a block, V words of the target, Q target rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from curate.config import STRICT
from curate.errors import ConfigError

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

_NUMBERS = 1 << 23
"""Of a dense piece of queries or of scores."""


def inverse_frequencies(found_in: Counts, num_rows: int) -> Floats:
    """(V,) idf of each word, above 0.

    Args:
        found_in: (V,) examples of the pool that hold the word.
        num_rows: examples of the pool.
    """
    return np.log1p((num_rows - found_in + 0.5) / (found_in + 0.5))


def query_weights(queries: Any, idf: Floats) -> Any:
    """(Q, V) sparse: each query's words, by idf, adding up to 1.

    Args:
        queries: (Q, V) sparse, an entry for every word of a query, whatever its value.
        idf: (V,).
    """
    found = queries.astype(np.float64)
    found.data = idf[found.indices]
    sums = np.asarray(found.sum(axis=1)).ravel()
    found.data /= np.repeat(np.where(sums > 0, sums, 1.0), np.diff(found.indptr))
    return found


def saturated(counts: Any, lengths: Counts, *, mean_length: float, k1: float, b: float) -> Any:
    """(N, V) sparse: tf of each word of each row, in (0, 1).

    Args:
        counts: (N, V) sparse, how often a word stands in a row.
        lengths: (N,) all words of each row.
        mean_length: over the pool.
        k1: how slowly repetition saturates; 0 makes any number of times the same.
        b: how much a long row is discounted, 0 not at all to 1.
    """
    found = counts.astype(np.float64)
    penalties = k1 * (1 - b + b * lengths / mean_length)
    found.data /= found.data + np.repeat(penalties, np.diff(found.indptr))
    return found


def best_match(rows: Any, queries: Any, *, numbers: int = _NUMBERS) -> tuple[Floats, Counts]:
    """Largest score of each row over all queries, and which query gives it, the first of equals.

    Args:
        rows: (N, V) sparse, of `saturated`.
        queries: (Q, V) sparse, of `query_weights`.
        numbers: most numbers of a dense piece; changes nothing but memory and time.

    Returns:
        (N,) in [0, 1), and (N,) in [0, Q).
    """
    num_rows, num_words = rows.shape
    best, which = np.full(num_rows, -1.0), np.zeros(num_rows, dtype=np.int64)
    some_queries = max(1, min(256, numbers // max(1, num_words)))
    some_rows = max(1, numbers // some_queries)
    for first in range(0, queries.shape[0], some_queries):
        # Sparse by dense, as rows times queries shares nearly all of its words: the product of two
        # sparse matrices would be as full, and slower.
        piece = np.ascontiguousarray(queries[first : first + some_queries].toarray().T)
        for start in range(0, num_rows, some_rows):
            scores = rows[start : start + some_rows] @ piece  # (n, queries)
            own = scores.argmax(axis=1)
            values = scores[np.arange(len(own)), own]
            place = slice(start, start + len(own))
            better = values > best[place]
            which[place] = np.where(better, first + own, which[place])
            best[place] = np.where(better, values, best[place])
    return best, which


@dataclass(frozen=True, slots=True, kw_only=True)
class BM25:
    """Word overlap with `target`, the lexical baseline."""

    __pydantic_config__: ClassVar = STRICT

    combine: Literal["mean", "max"] = "mean"
    """Over the rows of the target: how like all of them, or how like the nearest one."""
    k1: float = 1.2
    """How slowly repetition saturates."""
    b: float = 0.75
    """How much a long example is discounted, 0 to 1."""
    ngrams: tuple[int, int] = (1, 1)
    """Shortest and longest run of words or characters that counts as a word."""
    words: Literal["words", "characters"] = "words"
    """What a run consists of; for languages without spaces characters, with ngrams: [2, 2]."""

    needs: ClassVar[frozenset[str]] = frozenset({"bm25", "bm25_row"})
    columns: ClassVar[Mapping[str, str]] = {
        "bm25": "share of the target rows' word weight that is found, 0 to 1; high is like the"
        " target",
        "bm25_row": "place in the target of the nearest row, from 0, with combine: max; else null",
    }

    def __post_init__(self) -> None:
        if not (self.k1 >= 0 and 0 <= self.b <= 1):
            raise ConfigError(
                f"k1 is {self.k1} and b {self.b}", fix="set k1 to 0 or more and b from 0 to 1"
            )
        if not 1 <= self.ngrams[0] <= self.ngrams[1] <= 20:
            raise ConfigError(f"ngrams is {list(self.ngrams)}", fix="write [1, 1]")

    def score(self, quantities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: quantities[name] for name in self.columns}
