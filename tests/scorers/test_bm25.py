"""BM25 by hand, and against a loop over queries, words and documents."""

import math

import numpy as np
import pytest
from scipy.sparse import csr_array, random_array

from curate.errors import ConfigError
from scorers.bm25 import BM25, best_match, inverse_frequencies, query_weights, saturated


def test_three_documents_by_hand():
    """`cat sat`, `cat cat cat`, `dog sat here today`; the query is `cat here cat`."""
    idf = inverse_frequencies(np.array([2, 1]), 3)  # cat, here
    assert idf[0] == pytest.approx(math.log(1 + 1.5 / 2.5))
    assert idf[1] == pytest.approx(math.log(1 + 2.5 / 1.5))
    counts = csr_array(np.array([[1.0, 0], [3, 0], [0, 1]]))
    rows = saturated(counts, np.array([2, 3, 4]), mean_length=3.0, k1=1.2, b=0.75)
    query = query_weights(csr_array(np.array([[2.0, 1.0]])), idf)
    found = (rows @ query.T).toarray().ravel()
    whole = idf.sum()
    expected = [
        idf[0] / whole * 1 / (1 + 1.2 * (0.25 + 0.75 * 2 / 3)),
        idf[0] / whole * 3 / (3 + 1.2),
        idf[1] / whole * 1 / (1 + 1.2 * (0.25 + 0.75 * 4 / 3)),
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def by_loop(
    documents: list[list[int]], queries: list[list[int]], k1: float, b: float
) -> np.ndarray:
    """(N, Q) from nothing but lists of words."""
    mean = sum(map(len, documents)) / len(documents)
    found = np.zeros((len(documents), len(queries)))
    for i, document in enumerate(documents):
        for j, query in enumerate(queries):
            whole = 0.0
            for word in set(query):
                holding = sum(word in other for other in documents)
                idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
                whole += idf
                times = document.count(word)
                if times:
                    length = 1 - b + b * len(document) / mean
                    found[i, j] += idf * times / (times + k1 * length)
            found[i, j] /= whole
    return found


@pytest.mark.parametrize(("k1", "b"), [(1.2, 0.75), (0.0, 0.5), (2.0, 0.0)])
def test_mean_and_maximum_are_those_of_a_loop(k1: float, b: float):
    draw = np.random.default_rng(0)
    documents = [draw.integers(0, 12, draw.integers(1, 9)).tolist() for _ in range(40)]
    queries = [draw.integers(0, 12, draw.integers(1, 6)).tolist() for _ in range(7)]
    expected = by_loop(documents, queries, k1, b)

    def table(texts: list[list[int]]) -> csr_array:
        return csr_array(np.stack([np.bincount(text, minlength=12) for text in texts]))

    counts, lengths = table(documents), np.array([len(d) for d in documents])
    found_in = (counts.toarray() > 0).sum(axis=0)
    weights = query_weights(table(queries), inverse_frequencies(found_in, 40))
    rows = saturated(counts, lengths, mean_length=float(lengths.mean()), k1=k1, b=b)
    np.testing.assert_allclose((rows @ weights.T).toarray(), expected, rtol=1e-12)
    for numbers in (1, 12 * 3, 1 << 20):  # pieces of one row and one query, of three, of all
        best, which = best_match(rows, weights, numbers=numbers)
        np.testing.assert_allclose(best, expected.max(axis=1), rtol=1e-12)
        np.testing.assert_allclose(expected[np.arange(40), which], best, rtol=1e-12)


def test_scores_stay_below_one_and_a_row_with_nothing_in_common_has_none():
    rows = saturated(
        random_array((50, 20), density=0.3, rng=np.random.default_rng(0), format="csr"),
        np.full(50, 30), mean_length=20.0, k1=1.2, b=0.75,
    )  # fmt: skip
    queries = random_array((5, 20), density=0.2, rng=np.random.default_rng(1), format="csr")
    best, _ = best_match(rows, query_weights(queries, np.linspace(0.1, 3, 20)))
    assert (best >= 0).all()
    assert (best < 1).all()
    for numbers in (1, 1 << 20):  # of equal queries the first, whatever the pieces
        weights = query_weights(queries, np.ones(20))
        nothing, which = best_match(csr_array((3, 20)), weights, numbers=numbers)
        assert nothing.tolist() == [0, 0, 0]
        assert which.tolist() == [0, 0, 0]


@pytest.mark.parametrize("options", [{"k1": -1.0}, {"b": 1.5}, {"ngrams": (2, 1)}])
def test_options_without_a_meaning_are_refused(options: dict[str, object]):
    with pytest.raises(ConfigError):
        BM25(**options)  # pyright: ignore[reportArgumentType]
