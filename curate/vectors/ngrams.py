"""Texts as hashed n-grams: vectors without any model.

    c_j = sum over n-grams g with h(g) = j of s(g)          v_j = sign(c_j) ln(1 + |c_j|)

with a hash h into d places and a hashed sign s, so that inner products of c are those of the n-gram
counts but for noise of order 1/sqrt(d); the logarithm damps n-grams that one text repeats.

Source: Weinberger et al., "Feature Hashing for Large Scale Multitask Learning", ICML 2009,
arXiv:0902.2206.

Shapes: N texts, d dimensions.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Unit = Literal["words", "characters"]

_ROWS = 4_096


def hashed_ngrams(
    texts: Sequence[str], *, dim: int, ngrams: tuple[int, int], unit: Unit
) -> npt.NDArray[np.float32]:
    """(N, d) vectors; NaN where a text has no n-gram.

    Args:
        texts: N; letters are lower-cased.
        dim: d.
        ngrams: shortest and longest run.
        unit: of which a run consists.
    """
    from sklearn.feature_extraction.text import HashingVectorizer

    options: dict[str, Any] = {
        "analyzer": "char" if unit == "characters" else "word",
        "token_pattern": r"\w+",
        "norm": None,
        "dtype": np.float32,
    }
    hashing = HashingVectorizer(n_features=dim, ngram_range=ngrams, alternate_sign=True, **options)
    found = np.full((len(texts), dim), np.nan, dtype=np.float32)
    for start in range(0, len(texts), _ROWS):
        counts: Any = hashing.transform(texts[start : start + _ROWS])
        there = np.flatnonzero(np.diff(counts.indptr))  # rows with anything in them
        counts.data = np.sign(counts.data) * np.log1p(np.abs(counts.data))
        found[start + there] = counts[there].toarray()
    return found
