"""The round-robin of `rds` against a plain loop over a full table of similarities."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.errors import ConfigError
from scorers.rds import RDS, ranks, take_turns


def plain_turns(table: np.ndarray, free: set[int], limit: int) -> tuple[list[int], list[int]]:
    """Each lane in its turn looks through all that is left for its best, the first of equals."""
    left, rows, lanes = sorted(free), list[int](), list[int]()
    while left and len(rows) < limit:
        lane = len(rows) % len(table)
        best = max(left, key=lambda row: (table[lane, row], -row))
        left.remove(best)
        rows.append(best)
        lanes.append(lane)
    return rows, lanes


class Lists:
    """Heads of full sorts, and how often they were asked for."""

    def __init__(self, table: np.ndarray) -> None:
        self.table, self.fillings = table, 0

    def __call__(self, used: np.ndarray, depth: int) -> Sequence[np.ndarray]:
        self.fillings += 1
        free = np.flatnonzero(~used)
        return [free[np.argsort(-lane[free], kind="stable")][:depth] for lane in self.table]


@given(st.integers(1, 6), st.integers(0, 40), st.integers(1, 60), st.integers(1, 50),
       st.integers(1, 30), st.integers(0, 2**32 - 1))  # fmt: skip
def test_turns_are_those_of_a_plain_loop_whatever_the_lists_hold(
    lanes: int, taken: int, rows: int, limit: int, entries: int, seed: int
):
    """Values of few kinds, so that lanes want the same rows and many are equal."""
    draw = np.random.default_rng(seed)
    table = draw.integers(0, 5, size=(lanes, rows)).astype(np.float32)
    out = np.zeros(rows, np.bool_)
    out[draw.permutation(rows)[: min(taken, rows)]] = True
    found = take_turns(Lists(table), lanes=lanes, taken=out, limit=limit, entries=entries)
    wanted = plain_turns(table, set(np.flatnonzero(~out).tolist()), limit)
    assert (found.rows.tolist(), found.lanes.tolist()) == wanted


def test_short_lists_are_filled_anew_and_change_nothing():
    table = np.random.default_rng(0).normal(size=(5, 3000)).astype(np.float32)
    table[1:] = table[0] + 0.01 * table[1:]  # all want nearly the same rows
    long, short = Lists(table), Lists(table)
    none = np.zeros(3000, np.bool_)
    whole = take_turns(long, lanes=5, taken=none, limit=3000)
    pieces = take_turns(short, lanes=5, taken=none, limit=3000, entries=500)
    assert np.array_equal(whole.rows, pieces.rows)
    assert long.fillings == 1
    assert short.fillings > 20
    assert not none.any()


def test_one_lane_is_its_own_order_and_one_row_its_own_pool():
    table = np.array([[0.1, 0.9, 0.5, 0.9]], np.float32)
    none = np.zeros(4, np.bool_)
    assert take_turns(Lists(table), lanes=1, taken=none, limit=9).rows.tolist() == [1, 3, 2, 0]
    one = take_turns(Lists(table[:, :1]), lanes=1, taken=none[:1], limit=9)
    assert one.rows.tolist() == [0]
    nothing = take_turns(Lists(table), lanes=1, taken=~none, limit=9)
    assert nothing.rows.tolist() == []


def test_behind_the_limit_rows_follow_by_similarity():
    table = np.array([[0.9, 0.8, 0.1, 0.2, 0.5], [0.7, 0.1, 0.3, 0.4, 0.6]], np.float32)
    out = np.array([False, False, False, False, True])
    turns = take_turns(Lists(table), lanes=2, taken=out, limit=2)
    assert turns.rows.tolist() == [0, 3]
    # Best values 0.9 0.8 0.3 0.4: row 1 follows, then row 2; row 4 has no place.
    assert ranks(turns, table.max(axis=0), out).tolist() == [1, 3, 4, 2, 0]


def test_a_limit_below_one_is_refused():
    with pytest.raises(ConfigError, match="limit is 0"):
        RDS(limit=0)
