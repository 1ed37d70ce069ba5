"""The most similar earlier row, against two plain loops in float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.vectors.pairs import best_among, best_earlier, mean_direction
from curate.vectors.store import Floats, Positions, Vectors


def cosine(left: Floats, right: Floats) -> float:
    a, b = left.astype(float).tolist(), right.astype(float).tolist()
    lengths = (sum(x * x for x in a) * sum(x * x for x in b)) ** 0.5
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths


def earlier_by_loop(rows: Floats, order: Positions) -> tuple[list[float], list[int]]:
    values: list[float] = []
    others: list[int] = []
    for i, own in enumerate(order.tolist()):
        best, other = 0.0, -1
        for before in order[:i].tolist():
            similarity = cosine(rows[own], rows[before])
            if similarity > best + 1e-6:
                best, other = similarity, before
        values.append(min(best, 1.0))
        others.append(other)
    return values, others


@pytest.mark.parametrize("block_rows", [1, 3, 7, 64])
def test_every_row_finds_the_best_of_those_before_it(block_rows: int):
    generator = np.random.default_rng(1)
    rows = generator.standard_normal((40, 5)).astype(np.float32) * 3
    rows[[7, 30]] = rows[2], -rows[2]
    vectors = Vectors([rows[:11], rows[11:]])
    order = generator.permutation(40)[:35].astype(np.int64)
    found = best_earlier(vectors, order, block_rows=block_rows)
    values, others = earlier_by_loop(rows, order)
    assert found.values == pytest.approx(values, abs=1e-6)
    assert found.others.tolist() == others


@pytest.mark.parametrize("block_rows", [1, 4, 64])
def test_every_row_finds_the_best_of_some_others(block_rows: int):
    rows = np.random.default_rng(2).standard_normal((30, 4)).astype(np.float32)
    mine, among = np.arange(0, 30, 2), np.arange(1, 19, 2)
    found = best_among(Vectors([rows]), mine, among, block_rows=block_rows)
    for row, value, other in zip(mine, found.values, found.others, strict=True):
        products = {int(o): cosine(rows[row], rows[o]) for o in among}
        best = max(products, key=lambda o: products[o])
        assert value == pytest.approx(max(0.0, products[best]), abs=1e-6)
        assert other == (best if products[best] > 0 else -1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 25), st.integers(1, 9), st.integers(0, 3))
def test_neither_blocks_nor_parts_nor_lengths_matter(count: int, block_rows: int, seed: int):
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((count, 3)).astype(np.float32)
    scaled = rows * generator.uniform(0.5, 2, (count, 1)).astype(np.float32)
    order = generator.permutation(count).astype(np.int64)
    cut = count // 2
    one = best_earlier(Vectors([rows]), order)
    two = best_earlier(Vectors([scaled[:cut], scaled[cut:]]), order, block_rows=block_rows)
    assert one.others.tolist() == two.others.tolist()
    assert one.values == pytest.approx(two.values, abs=1e-6)


def test_of_equal_rows_the_first_by_precedence_is_named():
    rows = np.ones((6, 2), dtype=np.float32)
    order = np.array([4, 1, 5, 0], dtype=np.int64)
    found = best_earlier(Vectors([rows]), order, block_rows=2)
    assert found.others.tolist() == [-1, 4, 4, 4]
    assert found.values.tolist() == [0, 1, 1, 1]


def test_opposite_and_lonely_rows_have_nobody():
    rows = np.array([[1, 0], [-1, 0], [0, 1]], dtype=np.float32)
    found = best_earlier(Vectors([rows]), np.arange(3))
    assert found.others.tolist() == [-1, -1, -1]
    assert found.values.tolist() == [0, 0, 0]
    assert len(best_earlier(Vectors([rows]), np.zeros(0, np.int64)).values) == 0
    alone = best_among(Vectors([rows]), np.arange(3), np.zeros(0, np.int64))
    assert alone.others.tolist() == [-1, -1, -1]


def test_the_mean_direction_has_length_one_and_counts_rows_alike():
    rows = np.array([[5, 0], [0, 1], [np.nan, np.nan]], dtype=np.float32)
    assert mean_direction(Vectors([rows])) == pytest.approx(np.full((1, 2), 0.5**0.5))
    assert mean_direction(Vectors([rows[2:]])).shape == (0, 2)
