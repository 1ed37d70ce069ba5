"""Long lists of the best rows, against a full sort in float64."""

import numpy as np
import pytest

from curate.vectors.ranking import Best, cosine_blocks, products, unit_rows
from curate.vectors.store import Vectors


def rows_of(count: int, dim: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)


def lists_of(queries: np.ndarray, vectors: Vectors, skip: np.ndarray, k: int) -> list[list[int]]:
    best = Best(len(queries), k)
    for first, positions, values in cosine_blocks(queries, vectors, skip, block_rows=37):
        best.add(first, positions, values)
    return [own.tolist() for own in best.lists()]


def cosines(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    wide, other = queries.astype(np.float64), rows.astype(np.float64)
    norms = np.linalg.norm(other, axis=1, keepdims=True)
    return wide @ (other / np.where(norms > 0, norms, 1)).T


@pytest.mark.parametrize("k", [1, 7, 60, 500])
def test_the_lists_are_the_heads_of_a_full_sort(k: int):
    rows, queries = rows_of(300, 12, 0), unit_rows(rows_of(70, 12, 1))
    rows[[5, 140]] = np.nan
    skip = np.random.default_rng(2).random(300) < 0.2
    found = lists_of(queries, Vectors([rows[:111], rows[111:]]), skip, k)
    values = cosines(queries, np.nan_to_num(rows))
    values[:, skip | np.isnan(rows).any(axis=1)] = -np.inf
    there = int(np.isfinite(values[0]).sum())
    for own, lane in zip(found, values, strict=True):
        assert own == np.argsort(-lane, kind="stable")[: min(k, there)].tolist()


def test_equal_rows_stand_in_order_of_position_wherever_they_are():
    """Copies of one row all over the blocks of a product, and in parts of odd sizes."""
    rows = rows_of(5000, 384, 0)
    copies = np.sort(np.random.default_rng(1).choice(5000, 400, replace=False))
    rows[copies] = rows[copies[0]]
    parts = [rows[a:b] for a, b in [(0, 1), (1, 1500), (1500, 1503), (1503, 5000)]]
    query = unit_rows(rows[copies[:1]] + 0.1 * rows_of(1, 384, 3))
    (found,) = lists_of(query, Vectors(parts), np.zeros(5000, np.bool_), 250)
    assert found == copies[:250].tolist()


def test_a_product_is_the_same_wherever_its_pair_stands():
    queries, rows = unit_rows(rows_of(130, 384, 0)), unit_rows(rows_of(2100, 384, 1))
    whole = products(queries, rows)
    order = np.random.default_rng(2).permutation(2100)
    assert np.array_equal(products(queries[::-1][:90], rows[order])[:, :77],
                          whole[::-1][:90][:, order[:77]])  # fmt: skip
    assert np.allclose(whole, cosines(queries, rows), atol=1e-6)


def test_a_zero_vector_has_the_cosine_zero_and_lengths_do_not_matter():
    rows = np.array([[0, 0], [3, 4], [0.3, 0.4], [-30, -40]], np.float32)
    found = products(unit_rows(rows[1:2]), unit_rows(rows))
    assert np.allclose(found, [[0, 1, 1, -1]])
    assert np.array_equal(unit_rows(rows)[0], [0, 0])
