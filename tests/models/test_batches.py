from threading import Event

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curate.errors import CurateError
from curate.models.batches import Ahead, for_each_batch, is_out_of_memory

lengths_of_examples = st.lists(st.integers(1, 60), min_size=1, max_size=80)


@given(lengths_of_examples, st.integers(1, 200))
def test_every_example_is_in_one_batch_and_padding_counts(lengths: list[int], budget: int):
    batches: list[np.ndarray] = []
    passed = for_each_batch(np.array(lengths), batches.append, batch_tokens=budget)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert (passed.num_batches, passed.halved) == (len(batches), 0)
    for batch in batches:
        widths = np.array(lengths)[batch]
        assert len(batch) == 1 or len(batch) * widths.max() <= budget


def test_batches_go_from_long_to_short_and_equal_lengths_keep_their_order():
    seen: list[int] = []
    lengths = np.array([3, 5, 3, 5, 4])
    for_each_batch(lengths, lambda batch: seen.extend(batch.tolist()), batch_tokens=10)
    assert seen == [1, 3, 4, 0, 2]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate"
            " memory: you tried to allocate 40 bytes. Error code 12 (Cannot allocate memory)"
        ),
        MemoryError(),
    ],
)
def test_out_of_memory_halves_the_budget_and_loses_nothing(error: BaseException):
    done: list[int] = []
    refused: list[int] = []

    def work(batch: np.ndarray) -> None:
        if len(batch) > 3:
            refused.append(len(batch))
            raise error
        done.extend(batch.tolist())

    passed = for_each_batch(np.full(20, 4), work, batch_tokens=64)
    assert sorted(done) == list(range(20))
    assert refused == [16, 8, 4]
    assert (passed.halved, passed.batch_tokens) == (3, 8)


def test_the_allocator_s_own_error_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_one_example_that_does_not_fit_is_named_by_its_length():
    def work(batch: np.ndarray) -> None:
        raise torch.OutOfMemoryError("no")

    with pytest.raises(CurateError, match="one example of 9 tokens"):
        for_each_batch(np.array([2, 9]), work, batch_tokens=16)


def test_any_other_error_is_not_taken_for_a_lack_of_memory():
    def work(batch: np.ndarray) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        for_each_batch(np.array([2, 9]), work, batch_tokens=16)


def test_the_next_batch_is_made_while_the_current_one_is_worked_on():
    made: list[np.ndarray] = []
    two_are_made = Event()

    def make(members: np.ndarray) -> np.ndarray:
        made.append(members)
        if len(made) == 2:
            two_are_made.set()
        return members * 10

    ahead = Ahead(make, is_threaded=True)
    seen: list[int] = []

    def work(members: np.ndarray) -> None:
        seen.extend(ahead.take(members).tolist())
        assert two_are_made.wait(10)  # the thread is at it while this one waits here

    for_each_batch(np.array([1, 4, 3, 2]), work, batch_tokens=6, begin=ahead.begin)
    ahead.close()
    assert seen == [10, 20, 30, 0]
    assert len(made) == 3


def test_batches_begun_for_a_larger_budget_are_not_used():
    ahead = Ahead(lambda members: members + 100, is_threaded=True)
    seen: list[list[int]] = []

    def work(members: np.ndarray) -> None:
        batch = ahead.take(members)
        if len(batch) > 2:
            raise MemoryError
        seen.append(batch.tolist())

    for_each_batch(np.full(8, 4), work, batch_tokens=16, begin=ahead.begin)
    ahead.close()
    assert seen == [[100, 101], [102, 103], [104, 105], [106, 107]]


def test_without_a_thread_nothing_is_begun():
    made: list[int] = []
    ahead = Ahead(lambda members: made.append(int(members[0])), is_threaded=False)
    ahead.begin(np.array([1]))
    assert made == []
    ahead.take(np.array([1]))
    ahead.close()
    assert made == [1]
