"""Cuts against a plain sort of all rows."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.plan.select import END, Block, Found, Search, Target, find_cuts, is_before

Row = tuple[int, int, int, int]
"""group, key, tie, tokens"""

# Few values, and values that share leading bits, so that ties and deep searches happen.
halves = st.one_of(
    st.integers(0, 3),
    st.integers(0, 2**64 - 1),
    st.sampled_from([2**64 - 1, 2**63, 2**63 + 1, 2**40, 2**40 + 1]),
)
rows = st.lists(
    st.tuples(st.integers(-1, 2), halves, halves, st.integers(0, 9)),
    max_size=60,
    unique_by=lambda row: (row[0], row[1], row[2]),
)
targets = st.lists(
    st.builds(
        Target,
        group=st.integers(0, 3),
        amount=st.integers(-1, 120),
        unit=st.sampled_from(["rows", "tokens"]),
        cover=st.booleans(),
    ),
    max_size=6,
)


def blocks_of(table: list[Row], size: int) -> list[Block]:
    found: list[Block] = []
    for start in range(0, max(1, len(table)), size):
        part = table[start : start + size]
        found.append(
            Block(
                np.array([row[0] for row in part], np.int64),
                np.array([row[1] for row in part], np.uint64),
                np.array([row[2] for row in part], np.uint64),
                np.array([row[3] for row in part], np.int64),
            )
        )
    return found


def by_sorting(table: list[Row], target: Target) -> tuple[set[tuple[int, int]], int]:
    """Positions in front of the cut and their tokens, taken one by one from the front."""
    ordered = sorted((key, tie, tokens) for g, key, tie, tokens in table if g == target.group)
    taken: set[tuple[int, int]] = set()
    used = tokens_used = 0
    for key, tie, tokens in ordered:
        cost = 1 if target.unit == "rows" else tokens
        if target.cover and used >= target.amount:
            break
        if not target.cover and used + cost > target.amount:
            break
        used += cost
        tokens_used += tokens
        taken.add((key, tie))
    return taken, tokens_used


def in_front(table: list[Row], group: int, cut: int) -> set[tuple[int, int]]:
    block = blocks_of(table, max(1, len(table)))[0]
    cuts = [0, 0, 0, 0]
    cuts[group] = cut
    before = is_before(block.key, block.tie, cuts, block.group)
    return {
        (row[1], row[2])
        for row, is_in in zip(table, before.tolist(), strict=True)
        if is_in and row[0] == group
    }


@settings(max_examples=200)
@given(rows, targets, st.integers(1, 20), st.sampled_from([0, 1, 5, 1000]), st.booleans())
def test_cuts_are_those_of_a_full_sort(
    table: list[Row], wanted: list[Target], size: int, collect: int, no_score: bool
):
    if no_score:
        table = list({(g, tie): (g, 0, tie, tokens) for g, _, tie, tokens in table}.values())
    sizes = {group: sum(row[0] == group for row in table) for group in range(4)}
    search = Search(wanted, sizes, same=64 if no_score else 0, collect=collect)
    passes = 0
    while not search.is_done():
        for block in blocks_of(table, size):
            search.add(block)
        search.end_pass()
        passes += 1
        assert passes <= 10
    found = search.found()
    assert len(found) == len(wanted)
    for target, cut in zip(wanted, found, strict=True):
        expected, tokens = by_sorting(table, target)
        assert in_front(table, target.group, cut.cut) == expected
        assert (cut.rows, cut.tokens) == (len(expected), tokens)


def test_more_groups_than_two_bytes_can_number():
    group = np.array([40_000, 3, 40_000 + (1 << 16), 40_000], np.int64)
    key, tie = np.zeros((2, 4), np.uint64)
    block = Block(group, key, tie + np.arange(4, dtype=np.uint64), np.array([5, 7, 11, 13]))
    target = Target(40_000, 9, "rows")
    assert find_cuts(lambda: [block], [target], {40_000: 2}) == [Found(END, 2, 18)]


@given(rows, targets, st.randoms(use_true_random=False))
def test_neither_the_blocks_nor_their_order_matter(
    table: list[Row], wanted: list[Target], order: Any
):
    sizes = {group: sum(row[0] == group for row in table) for group in range(4)}
    shuffled = list(table)
    order.shuffle(shuffled)
    one = find_cuts(lambda: blocks_of(table, 7), wanted, sizes)
    assert one == find_cuts(lambda: blocks_of(shuffled, 3), wanted, sizes)


@pytest.mark.parametrize("amount", [0, 1, 4_999, 12_345, 39_999, 40_000, 50_000])
def test_many_rows_are_cut_exactly_with_few_passes(amount: int):
    random = np.random.default_rng(0)
    scores = random.integers(0, 50, 40_000).astype(np.uint64)  # heavy ties
    ties = random.permutation(40_000).astype(np.uint64) << np.uint64(40)
    tokens = random.integers(1, 100, 40_000)
    group = np.zeros(40_000, np.int64)
    passes = 0

    def blocks() -> Iterable[Block]:
        nonlocal passes
        passes += 1
        for start in range(0, 40_000, 1000):
            part = slice(start, start + 1000)
            yield Block(group[part], scores[part], ties[part], tokens[part])

    search = Search([Target(0, amount, "rows")], {0: 40_000}, collect=100)
    while not search.is_done():
        for block in blocks():
            search.add(block)
        search.end_pass()
    cut = search.found()[0]
    taken = is_before(scores, ties, [cut.cut], group)
    assert taken.sum() == cut.rows == min(amount, 40_000)
    assert cut.tokens == tokens[taken].sum()
    assert passes <= 6
    order = np.lexsort((ties, scores))
    assert taken[order[: cut.rows]].all()


def test_rows_that_nothing_tells_apart_stay_together():
    table: list[Row] = [(0, 5, 5, 10), (0, 5, 5, 10), (0, 6, 0, 10)]
    search = Search([Target(0, 1, "rows"), Target(0, 1, "rows", cover=True)], {0: 3}, collect=0)
    while not search.is_done():
        search.add(blocks_of(table, 10)[0])
        search.end_pass()
    assert [found.rows for found in search.found()] == [0, 2]


def test_a_group_without_rows_is_within_any_target():
    assert find_cuts(list, [Target(0, 5, "rows")], {}) == [Found(END, 0, 0)]
