"""Greedy orders against plain loops over all pairs, and against the best of all subsets."""

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.vectors import diverse
from curate.vectors.diverse import Budget, Chosen, farthest_first, most_covering

Greedy = Callable[[np.ndarray, Budget], Chosen]


def rows_of(count: int, dim: int, seed: int, *, whole: bool = False) -> np.ndarray:
    draw = np.random.default_rng(seed)
    if whole:  # sums of small whole numbers are exact in float32, and many distances are equal
        return draw.integers(-3, 4, size=(count, dim)).astype(np.float32)
    return draw.normal(size=(count, dim)).astype(np.float32)


def plain_centres(rows: np.ndarray, count: int) -> list[int]:
    wide = rows.astype(np.float64)
    table = np.stack([np.square(wide - row).sum(axis=1) for row in wide])
    chosen = [0]
    while len(chosen) < count:
        gaps = table[:, chosen].min(axis=1)
        rest = [row for row in range(len(rows)) if row not in chosen]
        chosen.append(max(rest, key=lambda row: (gaps[row], -row)))
    return chosen


def cosine_table(rows: np.ndarray) -> np.ndarray:
    wide = rows.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    unit = wide / np.where(norms > 0, norms, 1)
    return np.maximum(unit @ unit.T, 0)


def coverage(table: np.ndarray, chosen: list[int]) -> float:
    return float(table[:, chosen].max(axis=1).sum()) if chosen else 0.0


@pytest.mark.parametrize("working", [4, 2048])
@pytest.mark.parametrize(("count", "dim"), [(1, 3), (2, 3), (40, 2), (150, 6)])
def test_k_centre_is_farthest_first(
    count: int, dim: int, working: int, monkeypatch: pytest.MonkeyPatch
):
    """Powers of two and means that are whole keep every distance exact: ties go to the first."""
    monkeypatch.setattr(diverse, "_WORKING_ROWS", working)
    rows = rows_of(count, dim, count, whole=True)
    rows = np.concatenate([rows, -rows])  # the mean is zero
    for goal in {1, 2, len(rows) // 2, len(rows)}:
        found = farthest_first(rows, Budget.rows(len(rows), goal))
        assert found.order.tolist() == plain_centres(rows, goal)


@given(st.integers(0, 10_000), st.integers(2, 60))
def test_k_centre_agrees_with_the_plain_loop_on_any_numbers(seed: int, count: int):
    rows = rows_of(count, 5, seed)
    goal = 1 + seed % count
    found = farthest_first(rows, Budget.rows(count, goal))
    assert found.order.tolist() == plain_centres(rows, goal)
    gaps = [min(np.linalg.norm(rows[row] - rows[s]) for s in found.order[:at])
            for at, row in enumerate(found.order) if at]  # fmt: skip
    assert np.allclose(found.worth[1:], gaps, rtol=1e-3)
    assert np.isinf(found.worth[0])


@pytest.mark.parametrize("seed", range(12))
def test_k_centre_is_within_twice_the_smallest_radius(seed: int):
    rows = rows_of(12, 2, seed).astype(np.float64)
    distances = np.linalg.norm(rows[:, None] - rows[None], axis=2)
    for goal in (2, 3, 4):
        best = min(distances[:, list(some)].min(axis=1).max()
                   for some in combinations(range(12), goal))  # fmt: skip
        found = farthest_first(rows.astype(np.float32), Budget.rows(12, goal))
        radius = distances[:, found.order].min(axis=1).max()
        assert best <= radius + 1e-9 <= 2 * best + 1e-6


def test_facility_location_picks_what_the_plain_greedy_picks():
    rows = rows_of(70, 4, 0)
    rows[10] = 0
    rows[[30, 31, 32]] = rows[3]
    table = cosine_table(rows)
    found, chosen = most_covering(rows, Budget.rows(70, 0)), list[int]()
    for _ in range(70):
        rest = [row for row in range(70) if row not in chosen]
        gains = {row: coverage(table, [*chosen, row]) - coverage(table, chosen) for row in rest}
        best = max(gains.values())
        # What differs by rounding alone is equal: the first.
        chosen.append(next(row for row in rest if gains[row] > best - 1e-5))
        found = most_covering(rows, Budget.rows(70, len(chosen)))
        if found.order.tolist() != chosen:
            assert gains[int(found.order[-1])] == pytest.approx(best, abs=1e-4)
            assert best < 1e-4  # only among rows that bring nothing any more
            break
    assert len(chosen) > 40
    assert found.worth[:40].sum() == pytest.approx(coverage(table, chosen[:40]), rel=1e-5)
    assert (np.diff(found.worth[:40]) <= 1e-6).all()


@pytest.mark.parametrize("seed", range(6))
def test_facility_location_is_near_the_best_of_all_subsets(seed: int):
    table = cosine_table(rows_of(12, 3, seed))
    for goal in (1, 2, 3):
        best = max(coverage(table, list(some)) for some in combinations(range(12), goal))
        found = most_covering(rows_of(12, 3, seed), Budget.rows(12, goal))
        own = coverage(table, found.order.tolist())
        assert (1 - 1 / np.e) * best <= own <= best + 1e-5


def test_with_lists_that_hold_everything_a_large_group_is_like_a_small_one(
    monkeypatch: pytest.MonkeyPatch,
):
    rows = rows_of(90, 5, 0)
    whole = most_covering(rows, Budget.rows(90, 50))
    monkeypatch.setattr(diverse, "DENSE_ROWS", 10)
    monkeypatch.setattr(diverse, "NEIGHBOURS", 90)
    lists = most_covering(rows, Budget.rows(90, 50))
    assert lists.order.tolist() == whole.order.tolist()
    assert np.allclose(lists.worth, whole.worth, atol=1e-5)
    monkeypatch.setattr(diverse, "NEIGHBOURS", 8)
    short = most_covering(rows, Budget.rows(90, 20))
    table = cosine_table(rows)
    best = coverage(table, whole.order[:20].tolist())
    random = coverage(table, np.random.default_rng(0).permutation(90)[:20].tolist())
    assert (random + best) / 2 < coverage(table, short.order.tolist()) < best


def test_large_groups_are_searched_approximately(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(diverse, "DENSE_ROWS", 10)
    monkeypatch.setattr(diverse, "EXACT_ROWS", 100)
    rows = rows_of(1500, 4, 0)
    found, again = (most_covering(rows, Budget.rows(1500, 30), seed=1) for _ in range(2))
    assert np.array_equal(found.order, again.order)
    monkeypatch.setattr(diverse, "EXACT_ROWS", 10_000)
    exact = most_covering(rows, Budget.rows(1500, 30))
    table = cosine_table(rows)
    own, best = (coverage(table, each.order.tolist()) for each in (found, exact))
    assert own > 0.95 * best


@pytest.mark.parametrize("greedy", [farthest_first, most_covering])
def test_copies_come_last_in_their_order_and_zero_vectors_are_no_trouble(greedy: Greedy):
    rows = rows_of(20, 384, 0)
    rows = np.concatenate([rows, rows[:7], np.zeros((2, 384), np.float32)])
    order = greedy(rows, Budget.rows(29, 29)).order.tolist()
    assert sorted(order) == list(range(29))
    kinds = ["zero" if row >= 27 else row % 20 for row in order]
    distinct = 21 if greedy is farthest_first else 20  # the zero vector is like nothing, not far
    assert len(set(kinds[:distinct])) == distinct


@pytest.mark.parametrize("greedy", [farthest_first, most_covering])
def test_an_order_ends_where_its_costs_pass_the_budget_and_a_longer_one_goes_on_from_it(
    greedy: Greedy,
):
    rows = rows_of(60, 3, 1)
    costs = np.random.default_rng(2).integers(0, 30, 60)
    whole = greedy(rows, Budget(costs, 10**9)).order
    assert sorted(whole.tolist()) == list(range(60))
    for most in (0, 100, 400):
        found = greedy(rows, Budget(costs, most)).order
        assert found.tolist() == whole[: len(found)].tolist()
        assert costs[found].sum() > most >= costs[found[:-1]].sum()
    assert len(greedy(rows, Budget.rows(60, 0)).order) == 0


@pytest.mark.parametrize("greedy", [farthest_first, most_covering])
def test_rows_that_are_all_alike_keep_their_order(greedy: Greedy):
    rows = np.tile(rows_of(1, 16, 0), (300, 1))
    assert greedy(rows, Budget.rows(300, 40)).order.tolist() == list(range(40))
