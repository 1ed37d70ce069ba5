"""The orders of rows: bijections, random ones, and streams that follow the mixture."""

from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.data.shard_order import LARGEST, Interleaving, Shuffle

Ints = npt.NDArray[np.int64]


def shuffled(size: int, key: int) -> Ints:
    return Shuffle(np.array([size]), [key]).places(np.zeros(size, np.int64), np.arange(size))


def rows_of(sizes: Ints) -> tuple[Ints, Ints]:
    """Component and rank of every row, component after component."""
    component = np.repeat(np.arange(len(sizes)), sizes)
    return component, np.concatenate([np.arange(size) for size in sizes.tolist()])


def stream_of(sizes: Ints) -> Ints:
    """(N,) which component each place of the stream holds."""
    component, rank = rows_of(sizes)
    places = Interleaving(sizes).places(component, rank)
    stream = np.full(len(places), -1)
    stream[places] = component
    assert stream.min() >= 0
    return stream


def chi2(counts: Ints) -> float:
    expected = counts.sum() / counts.size
    return float((np.square(counts - expected) / expected).sum())


# -- shuffled -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 255, 256, 257, 1000, 70_001])
def test_every_place_is_taken_once(size: int):
    assert np.array_equal(np.sort(shuffled(size, 7)), np.arange(size))


def test_components_of_one_call_have_orders_of_their_own():
    sizes, keys = np.array([5, 300, 1, 5000]), [3, 4, 5, 2**64 - 1]
    component, number = rows_of(sizes)
    together = Shuffle(sizes, keys).places(component, number)
    for nth, (size, key) in enumerate(zip(sizes.tolist(), keys, strict=True)):
        assert np.array_equal(together[component == nth], shuffled(size, key))


def test_a_part_of_the_rows_gets_the_same_places():
    order = Shuffle(np.array([10_000]), [1])
    some = np.array([9999, 17, 4])
    assert np.array_equal(order.places(np.zeros(3, np.int64), some), shuffled(10_000, 1)[some])


def test_every_order_of_four_rows_is_as_likely_as_any_other():
    keys = range(24_000)
    sizes = np.full(len(keys), 4)
    component, number = rows_of(sizes)
    places = Shuffle(sizes, keys).places(component, number).reshape(-1, 4)
    _, counts = np.unique(places @ np.array([64, 16, 4, 1]), return_counts=True)
    assert len(counts) == 24
    assert chi2(counts) < 60  # 23 degrees of freedom: 5e-5 of all keys lie beyond


def test_a_row_may_come_to_any_place():
    keys = range(30_000)
    sizes = np.full(len(keys), 300)
    component, number = np.arange(len(keys)), np.full(len(keys), 41)
    places = Shuffle(sizes, keys).places(component, number)
    assert chi2(np.bincount(places, minlength=300)) < 400  # 299 degrees of freedom


def test_neighbours_do_not_stay_near_each_other():
    size = 200_000
    places = shuffled(size, 11).astype(np.float64)
    for lag in (1, 2, 256, 447, 448):  # 448 is a side of the network
        r = np.corrcoef(places[:-lag], places[lag:])[0, 1]
        assert abs(r) < 4 / np.sqrt(size)
    steps = np.diff(places) % size
    assert chi2(np.bincount((steps * 64 // size).astype(int), minlength=64)) < 120


def test_other_keys_give_other_orders():
    first, second = shuffled(100_000, 1), shuffled(100_000, 2)
    assert (first == second).sum() < 12  # one in the mean
    assert (first == np.arange(100_000)).sum() < 12


def test_a_trillion_rows_can_be_shuffled():
    order = Shuffle(np.array([LARGEST]), [5])
    number = np.arange(50_000) + (LARGEST - 50_000)
    places = order.places(np.zeros(50_000, np.int64), number)
    assert places.min() >= 0
    assert places.max() < LARGEST
    assert len(np.unique(places)) == 50_000
    assert chi2(np.bincount(places * 64 // LARGEST, minlength=64)) < 120


# -- interleaved ----------------------------------------------------------------------------------

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=12).map(lambda s: np.array(s))


@given(SIZES)
@settings(max_examples=60)
def test_every_place_of_the_stream_is_taken_once_and_components_keep_their_order(sizes: Ints):
    component, rank = rows_of(sizes)
    places = Interleaving(sizes).places(component, rank)
    assert np.array_equal(np.sort(places), np.arange(sizes.sum()))
    for nth in range(len(sizes)):
        assert (np.diff(places[component == nth]) > 0).all()


def worst_deviation(sizes: Ints) -> float:
    stream = stream_of(sizes)
    seen = np.arange(1, len(stream) + 1)
    return max(
        float(np.abs(np.cumsum(stream == nth) - seen * sizes[nth] / len(stream)).max())
        for nth in range(len(sizes))
    )


@given(SIZES)
@settings(max_examples=60)
def test_every_prefix_follows_the_mixture(sizes: Ints):
    assert worst_deviation(sizes) < 1.68


@pytest.mark.parametrize(
    "sizes",
    [
        [5000] + [1] * 300,  # small ones would all stand in the middle
        [300] * 40,
        [1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987],
        [2**k for k in range(12)],
        [1],
        [7],
    ],
)
def test_prefixes_follow_uneven_mixtures(sizes: list[int]):
    assert worst_deviation(np.array(sizes)) < 1.68


@given(st.integers(1, 400), st.integers(1, 400))
@settings(max_examples=60)
def test_two_components_are_as_near_to_their_shares_as_whole_rows_can_be(one: int, other: int):
    stream = stream_of(np.array([one, other]))
    for seen, ones in enumerate(np.cumsum(stream == 0).tolist(), start=1):
        assert abs(ones - Fraction(seen * one, one + other)) <= Fraction(1, 2)


@given(st.lists(st.integers(1, 1 << 28), min_size=2, max_size=7), st.integers(0, 1 << 30))
@settings(max_examples=60)
def test_division_in_two_steps_is_as_exact_as_in_one(sizes: list[int], seed: int):
    rng = np.random.default_rng(seed)
    component = rng.integers(0, len(sizes), 50)
    rank = (rng.random(50) * np.array(sizes)[component]).astype(np.int64)
    in_one = Interleaving(np.array(sizes)).places(component, rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("curate.data.shard_order._SAFE", 0)
        in_two = Interleaving(np.array(sizes)).places(component, rank)
    assert np.array_equal(in_one, in_two)


@pytest.mark.parametrize("sizes", [[3, 5, 9, 40], [1 << 20, 3 << 20, 77]])
def test_a_trillion_rows_follow_the_mixture_too(sizes: list[int]):
    large = np.array(sizes) * (LARGEST // sum(sizes))
    for nth, size in enumerate(large.tolist()):
        rank = np.r_[np.arange(100), size // 3 + np.arange(100), size - 100 + np.arange(100)]
        places = Interleaving(large).places(np.full(300, nth), rank)
        assert (np.diff(places) > 0).all()
        for seen, place in zip(rank.tolist(), places.tolist(), strict=True):
            share = Fraction((place + 1) * size, int(large.sum()))
            assert abs(seen + 1 - share) < Fraction(168, 100)


def test_ten_thousand_components_are_placed_without_a_table_of_all_pairs():
    sizes = np.full(10_000, 20)
    sizes[0] = 100_000
    stream = stream_of(sizes)
    seen = np.arange(1, len(stream) + 1)
    assert np.abs(np.cumsum(stream == 0) - seen * (100_000 / len(stream))).max() < 1.68
