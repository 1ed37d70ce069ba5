import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.plan.positions import file_hash, gumbel, number_of, ordered_bits, row_hashes

floats = st.floats(allow_nan=False)


@given(st.lists(floats, min_size=1, max_size=30))
def test_bits_sort_as_the_numbers_do(values: list[float]):
    array = np.array(values, np.float64)
    bits = ordered_bits(array)
    for a, bits_a in zip(values, bits.tolist(), strict=True):
        for b, bits_b in zip(values, bits.tolist(), strict=True):
            assert (a < b) == (bits_a < bits_b)


@given(floats)
def test_a_number_comes_back_from_its_bits(value: float):
    assert number_of(int(ordered_bits(np.array([value]))[0])) == value


def test_hashes_of_a_file_never_repeat_and_do_not_depend_on_the_partition():
    start = file_hash("news", "a.parquet", seed=0)
    rows = np.arange(100_000)
    whole = row_hashes(start, rows)
    assert len(np.unique(whole)) == len(rows)
    assert (row_hashes(start, rows[500:700]) == whole[500:700]).all()


@pytest.mark.parametrize(
    ("source", "file", "seed"), [("news", "a", 1), ("news", "b", 0), ("new", "s/a", 0)]
)
def test_another_seed_file_or_source_gives_other_hashes(source: str, file: str, seed: int):
    assert file_hash("news", "a", seed=0) != file_hash(source, file, seed=seed)


def test_names_that_join_to_the_same_path_differ():
    assert file_hash("a/b", "c", seed=0) != file_hash("a", "b/c", seed=0)


def test_hashes_are_even_in_every_bit():
    start = file_hash("news", "a", seed=3)
    hashes = row_hashes(start, np.arange(50_000))
    for bit in range(64):
        share = float(np.mean((hashes >> np.uint64(bit)) & np.uint64(1)))
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(50_000)


def test_gumbel_has_its_mean_and_variance_and_is_independent_of_the_order_of_hashes():
    hashes = row_hashes(file_hash("news", "a", seed=5), np.arange(200_000))
    draws = gumbel(hashes)
    assert draws.mean() == pytest.approx(0.5772156649, abs=0.01)
    assert draws.var() == pytest.approx(math.pi**2 / 6, abs=0.03)
    assert abs(np.corrcoef(draws, hashes.astype(np.float64))[0, 1]) < 0.01
