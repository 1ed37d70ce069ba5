"""MinHash against sets of Python."""

import random

import numpy as np
import pytest

from curate.vectors.minhash import (
    NOTHING,
    NUM_MINIMA,
    Minima,
    band_keys,
    bands_for,
    best_across,
    best_in_buckets,
    minima,
)


def minima_of(texts: list[set[int]]) -> Minima:
    """Minima of sets of 64-bit numbers."""
    places = [place for place, text in enumerate(texts) for _ in text]
    hashes = [number for text in texts for number in sorted(text)]
    return minima(np.array(places, np.int64), np.array(hashes, np.uint64), len(texts))


def numbers(count: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.getrandbits(64) for _ in range(count)]


def test_each_minimum_is_the_smallest_value_of_one_hash_function():
    texts = [set(numbers(5, 1)), set(), set(numbers(9, 2)), {0}]
    found = minima_of(texts)
    factors = np.random.default_rng(0x5EED).integers(0, 1 << 64, (2, NUM_MINIMA), dtype=np.uint64)
    for row, text in zip(found, texts, strict=True):
        for k in range(NUM_MINIMA):
            a, b = int(factors[0, k]), int(factors[1, k])
            values = [((number >> 32) * a + b) % (1 << 64) >> 32 for number in text]
            assert row[k] == min(values, default=int(NOTHING))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.95])
def test_the_share_of_equal_minima_estimates_the_jaccard_similarity(share: float):
    pairs = 60
    errors: list[float] = []
    for seed in range(pairs):
        drawn = numbers(200, seed)
        both = round(200 * share)
        middle = both + (200 - both) // 2
        left, right = set(drawn[:middle]), set(drawn[:both] + drawn[middle:])
        truth = len(left & right) / len(left | right)
        found = minima_of([left, right])
        errors.append(float((found[0] == found[1]).mean()) - truth)
    spread = (share * (1 - share) / NUM_MINIMA) ** 0.5
    assert np.mean(errors) == pytest.approx(0, abs=4 * spread / pairs**0.5)
    assert np.std(errors) == pytest.approx(spread, rel=0.4)


def test_a_repeated_ngram_counts_once():
    once = minima(np.zeros(2, np.int64), np.array([1 << 40, 2 << 40], np.uint64), 1)
    twice = minima(np.zeros(3, np.int64), np.array([1 << 40, 2 << 40, 1 << 40], np.uint64), 1)
    assert (once == twice).all()


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.8, 0.9])
def test_similar_texts_become_candidates_nearly_always(threshold: float):
    num, rows = bands_for(threshold)
    assert num * rows == NUM_MINIMA
    assert 1 - (1 - threshold**rows) ** num > 0.9


def test_rows_share_the_key_of_a_band_where_its_minima_agree():
    own = np.random.default_rng(0).integers(0, 3, (400, NUM_MINIMA), dtype=np.uint32)
    for band in (0, 39):
        keys = band_keys(own, band, 3)
        parts = [tuple(row) for row in own[:, 3 * band : 3 * band + 3].tolist()]
        for i in range(0, 400, 37):
            assert [keys[i] == key for key in keys] == [parts[i] == part for part in parts]


def test_each_row_finds_the_best_earlier_one_of_its_bucket():
    generator = np.random.default_rng(3)
    own = generator.integers(0, 2, (30, NUM_MINIMA), dtype=np.uint32)
    keys = generator.integers(0, 6, 30, dtype=np.uint64)
    found = best_in_buckets(own, keys)
    for row in range(30):
        before = [r for r in range(row) if keys[r] == keys[row]]
        # A bucket's row meets the first and the eight before it.
        seen = sorted({*before[:1], *before[-8:]})
        shares = [float((own[row] == own[r]).mean()) for r in seen]
        assert found.values[row] == pytest.approx(max(shares, default=0))
        expected = seen[int(np.argmax(shares))] if seen else -1
        assert found.others[row] == expected


def test_rows_find_the_best_of_another_kind_in_their_bucket():
    generator = np.random.default_rng(4)
    own = generator.integers(0, 2, (12, NUM_MINIMA), dtype=np.uint32)
    among = generator.integers(0, 2, (20, NUM_MINIMA), dtype=np.uint32)
    keys, other_keys = (generator.integers(0, 4, n, dtype=np.uint64) for n in (12, 20))
    found = best_across(own, keys, among, other_keys)
    for row in range(12):
        seen = np.flatnonzero(other_keys == keys[row])[:8]
        shares = [float((own[row] == among[r]).mean()) for r in seen]
        assert found.values[row] == pytest.approx(max(shares, default=0))
        assert found.others[row] == (seen[int(np.argmax(shares))] if len(seen) else -1)


def test_no_rows_find_nothing():
    own = np.zeros((0, NUM_MINIMA), np.uint32)
    keys = np.zeros(0, np.uint64)
    assert len(best_in_buckets(own, keys).values) == 0
    some = np.zeros((2, NUM_MINIMA), np.uint32)
    assert best_across(some, np.zeros(2, np.uint64), own, keys).others.tolist() == [-1, -1]
