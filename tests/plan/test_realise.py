"""Quotas against a water level found by bisection, and the arithmetic of copies and phases."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.errors import CurateError
from curate.plan.groups import Group
from curate.plan.mixture import Mixture, Phase
from curate.plan.realise import Supply, demand, share_out, water_fill, whole_numbers
from curate.plan.settings import Keep

weight = st.just(0.0) | st.floats(1e-3, 1)
weights = st.lists(weight, min_size=1, max_size=6)


def supply(domain: str, rows: int, tokens: int, value: str = "", eligible: float = 1.0) -> Supply:
    return Supply(Group(domain, value), rows, tokens, int(rows * eligible), int(tokens * eligible))


def mixture(*phases: tuple[float, dict[str, float]]) -> Mixture:
    return Mixture("by hand", tuple(Phase(share, given) for share, given in phases), {})


@given(weights, st.data())
def test_one_phase_of_water_filling_is_one_level(shares: list[float], data: st.DataObject):
    """With limits, quota = min(limit, level * weight), and the level spends the budget."""
    limits = data.draw(st.lists(st.floats(0, 50), min_size=len(shares), max_size=len(shares)))
    budget = data.draw(st.floats(0, 100))
    found = water_fill(np.array([shares]), np.array([budget]), np.array(limits))[0]
    most = sum(limit for limit, share in zip(limits, shares, strict=True) if share > 0)
    if most <= budget:
        expected = [limit if share > 0 else 0 for limit, share in zip(limits, shares, strict=True)]
    else:
        low, high = 0.0, 1e6  # more than any limit over the smallest weight
        for _ in range(200):
            level = (low + high) / 2
            poured = sum(min(lim, level * share) for lim, share in zip(limits, shares, strict=True))
            low, high = (level, high) if poured < budget else (low, level)
        expected = [min(lim, high * share) for lim, share in zip(limits, shares, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(
    st.integers(1, 3).flatmap(
        lambda phases: st.lists(
            st.lists(weight, min_size=phases, max_size=phases), min_size=1, max_size=5
        )
    ),
    st.data(),
)
def test_water_filling_with_phases_keeps_budgets_and_limits(
    columns: list[list[float]], data: st.DataObject
):
    table = np.array(columns).T
    domains, phases = table.shape[1], table.shape[0]
    limits = np.array(data.draw(st.lists(st.floats(0, 9), min_size=domains, max_size=domains)))
    budgets = np.array(data.draw(st.lists(st.floats(0, 9), min_size=phases, max_size=phases)))
    found = water_fill(table, budgets, limits)
    assert (found >= 0).all()
    assert (found[table == 0] == 0).all()
    assert (found.sum(axis=0) <= limits + 1e-9).all()
    assert (found.sum(axis=1) <= budgets + 1e-9).all()
    for phase in range(phases):
        if found[phase].sum() < budgets[phase] - 1e-6:
            wanted = table[phase] > 0
            assert found.sum(axis=0)[wanted] == pytest.approx(limits[wanted], abs=1e-6)


@given(weights, st.integers(0, 1000), st.data())
def test_whole_numbers_meet_the_total_exactly_or_all_limits(
    shares: list[float], total: int, data: st.DataObject
):
    limits = data.draw(st.lists(st.integers(0, 500), min_size=len(shares), max_size=len(shares)))
    found = share_out(np.array(shares), total, np.array(limits))
    possible = sum(limit for limit, share in zip(limits, shares, strict=True) if share > 0)
    assert found.sum() == min(total, possible)
    assert (found <= np.array(limits)).all()


def test_largest_remainders_go_first_and_ties_to_the_first():
    """Hamilton's method on its textbook example: 10 seats for 4.7, 2.9, 2.4."""
    limits = np.array([100, 100, 100])
    assert whole_numbers(np.array([4.7, 2.9, 2.4]), 10, limits).tolist() == [5, 3, 2]
    assert whole_numbers(np.array([2.5, 2.5, 5.0]), 10, limits).tolist() == [3, 2, 5]


def test_without_a_mixture_groups_keep_the_same_share_and_the_sum_is_exact():
    supplies = [supply("a", 7, 70), supply("b", 7, 70), supply("c", 7, 70)]
    found = demand(supplies, Keep(share=0.5), mixture=None, most_copies=1)
    assert found.unit == "rows"
    assert found.asked == round(0.5 * 21) == sum(steps[0] for steps in found.steps)
    assert [steps[0] for steps in found.steps] == [4, 3, 3]


def test_what_one_group_cannot_give_the_others_give():
    supplies = [supply("a", 100, 100), supply("b", 100, 100, eligible=0.2)]
    found = demand(supplies, Keep(examples=100), mixture=None, most_copies=1)
    assert found.steps == ((80,), (20,))
    assert found.shares == (0.5, 0.5)


def test_more_than_there_is_leaves_a_shortfall():
    found = demand([supply("a", 10, 55)], Keep(examples=30), mixture=None, most_copies=1)
    assert (found.asked, found.placed) == (30, 10)
    again = demand([supply("a", 10, 55)], Keep(tokens=200), mixture=None, most_copies=3)
    assert (again.asked, again.placed) == (200, 165)


def test_a_mixture_gives_each_domain_its_share_of_the_tokens():
    supplies = [supply("a", 100, 1000), supply("b", 10, 1000)]
    found = demand(
        supplies,
        Keep(tokens=1000.0),
        mixture=mixture((1.0, {"a": 0.25, "b": 0.75})),
        most_copies=4,
    )
    assert found.unit == "tokens"
    assert found.steps == ((250,), (750,))


def test_rows_of_a_mixture_follow_weight_over_mean_length():
    """Equal tokens of examples of 10 and of 100 tokens: ten times as many of the short ones."""
    supplies = [supply("a", 100, 1000), supply("b", 100, 10_000)]
    found = demand(
        supplies,
        Keep(examples=110),
        mixture=mixture((1.0, {"a": 0.5, "b": 0.5})),
        most_copies=1,
    )
    assert found.steps == ((100,), (10,))


def test_a_domain_at_its_limit_of_repeats_passes_its_surplus_on():
    supplies = [supply("a", 10, 100), supply("b", 500, 5000), supply("c", 500, 5000)]
    found = demand(
        supplies,
        Keep(tokens=3000.0),
        mixture=mixture((1.0, {"a": 0.5, "b": 0.1, "c": 0.4})),
        most_copies=4,
    )
    # a: 1,500 asked, 400 possible; the other 1,100 go 1 : 4 to b and c.
    assert found.steps == ((400,), (520,), (2080,))
    assert found.placed == found.asked == 3000


def test_a_domain_at_its_limit_keeps_its_proportions_between_phases():
    supplies = [supply("small", 10, 100), supply("large", 10_000, 100_000)]
    plan = mixture(
        (0.5, {"small": 0.6, "large": 0.4}),
        (0.5, {"small": 0.2, "large": 0.8}),
    )
    found = demand(supplies, Keep(tokens=2000.0), mixture=plan, most_copies=4)
    # 600 then 200 are asked of 400 possible: 300 then 100.
    assert found.steps == ((300, 400), (700, 1600))


def test_labels_within_a_domain_share_its_quota_by_their_size():
    supplies = [
        supply("a", 30, 300, "0"),
        supply("a", 10, 100, "1"),
        supply("b", 40, 400, "0"),
    ]
    found = demand(
        supplies,
        Keep(tokens=100.0),
        mixture=mixture((1.0, {"a": 0.8, "b": 0.2})),
        most_copies=1,
    )
    assert found.steps == ((60,), (20,), (20,))


def test_a_domain_without_weight_gets_nothing_and_an_unknown_one_is_refused():
    supplies = [supply("a", 30, 300), supply("b", 10, 100)]
    found = demand(
        supplies, Keep(tokens=100.0), mixture=mixture((1.0, {"a": 1, "b": 0})), most_copies=1
    )
    assert found.steps == ((100,), (0,))
    with pytest.raises(CurateError, match="no weight for the domain b"):
        demand(supplies, Keep(tokens=100.0), mixture=mixture((1.0, {"a": 1})), most_copies=1)


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 40)), min_size=1, max_size=5),
    st.floats(0.01, 3),
    st.floats(1, 4),
    st.data(),
)
def test_boundaries_rise_within_the_limits_and_the_last_is_exact(
    sizes: list[tuple[int, int]], epochs: float, most: float, data: st.DataObject
):
    supplies = [supply(f"d{i}", n, n * mean) for i, (n, mean) in enumerate(sizes)]
    raw = [data.draw(st.lists(st.floats(0.01, 1), min_size=len(sizes), max_size=len(sizes)))] * 2
    raw[1] = raw[1][::-1]
    phases = [
        (0.5, {f"d{i}": value / sum(values) for i, value in enumerate(values)}) for values in raw
    ]
    rows = sum(n for n, _ in sizes)
    asked = max(1, int(epochs * rows))
    found = demand(supplies, Keep(examples=asked), mixture=mixture(*phases), most_copies=most)
    possible = sum(int(n * most) for n, _ in sizes)
    assert found.placed == min(asked, possible)
    for (n, _), steps in zip(sizes, found.steps, strict=True):
        assert 0 <= steps[0] <= steps[1] <= int(n * most)


def test_equal_remainders_go_to_the_first_name_whatever_comes_first():
    supplies = [supply("b", 3, 30), supply("a", 3, 30), supply("c", 3, 30)]
    wanted = demand(supplies, Keep(examples=4), mixture=None, most_copies=1.0)
    assert wanted.steps == ((1,), (2,), (1,))
