"""GIO against hand-worked divergences, brute force and the published shapes."""

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scorers.gio import (
    Selection,
    Stop,
    divergence,
    log_distances,
    log_radii,
    mean_divergence,
    phi,
    select,
)

CORNERS = [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]


def points(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(seed: int, mean: float, num: int, d: int = 2) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return mean + torch.randn(num, d, generator=draw, dtype=torch.float64)


def knn(target: Tensor, chosen: Tensor, k: int, own_k: int = 1) -> float:
    nearest = log_distances(target, chosen).kthvalue(own_k, dim=1).values
    return divergence(
        log_radii(target, k), nearest, d=target.shape[1], k=k, own_k=own_k, m=len(chosen)
    )


def average(target: Tensor, chosen: Tensor, k: int) -> float:
    mean = float(phi(target, chosen).mean())
    return mean_divergence(log_radii(target, k), mean, d=target.shape[1], k=k, m=len(chosen))


def by_hand(target: np.ndarray, chosen: np.ndarray, k: int, own_k: int) -> float:
    """The estimator as its formula stands, one distance at a time."""
    n, d = target.shape
    total = 0.0
    for i in range(n):
        own = sorted(math.dist(target[i], target[j]) for j in range(n) if j != i)
        other = sorted(math.dist(target[i], point) for point in chosen)
        total += math.log(other[own_k - 1]) - math.log(own[k - 1])
    return d / n * total + math.log(k * len(chosen) / (own_k * (n - 1)))


def greedy_by_hand(target: np.ndarray, pool: np.ndarray, start: np.ndarray, k: int) -> list[int]:
    """Try every candidate in every step; stop where the best one does not help."""
    chosen, order = start, list[int]()
    before = by_hand(target, chosen, k, 1)
    while len(order) < len(pool):
        free = [j for j in range(len(pool)) if j not in order]
        after = [by_hand(target, np.vstack([chosen, pool[j]]), k, 1) for j in free]
        best = int(np.argmin(np.round(after, 10)))
        if after[best] >= before:
            break
        before = after[best]
        order.append(free[best])
        chosen = np.vstack([chosen, pool[free[best]]])
    return order


def test_distances_and_divergences_of_three_points_on_a_line():
    target, chosen = points([[0.0], [1.0], [3.0]]), points([[0.5], [4.0]])
    torch.testing.assert_close(log_radii(target, 1).exp(), points([1.0, 1.0, 2.0]))
    assert average(target, chosen, 1) == pytest.approx(-0.241805, abs=1e-6)
    assert knn(target, chosen, 1) == pytest.approx(-0.693147, abs=1e-6)


@pytest.mark.parametrize(
    ("added", "avg", "near"),
    [
        ([], 1.426316, 1.426316),
        ([[0.5, 0.5]], 0.163852, -1.098612),
        ([[0.0, 0.1]], -0.016151, -1.458619),
        ([[2.0, 2.0]], 1.259358, 1.092401),
    ],
)
def test_the_corners_of_a_square(added: list[list[float]], avg: float, near: float):
    chosen = points([[3.0, 3.0], *added])
    assert average(points(CORNERS), chosen, 1) == pytest.approx(avg, abs=1e-6)
    assert knn(points(CORNERS), chosen, 1) == pytest.approx(near, abs=1e-6)


def test_the_average_over_all_orders_has_a_closed_form():
    target, chosen = normal(0, 0, 9, 3), normal(1, 1, 6, 3)
    mean = np.mean([by_hand(target.numpy(), chosen.numpy(), 2, m) for m in range(1, 7)])
    # Each term has its own l under the logarithm, which is what the closed form adds up.
    assert average(target, chosen, 2) == pytest.approx(float(mean), abs=1e-6)


def grids() -> tuple[Tensor, Tensor, Tensor]:
    square = points(list(product((-1.0, 0.0, 1.0), repeat=2)))
    near = torch.cat([square, square + points([0.25, 0.25]), square + points([-0.25, 0.25])])
    target = torch.cat([near, square + points([10.0, 0.0])])
    shifts = ([0.1, 0.0], [10.1, 0.0], [5.0, 8.0])
    pool = torch.cat([square + points(shift) for shift in shifts])
    return target, pool, points([[-5.0, -5.0], [15.0, -5.0], [-5.0, 13.0], [15.0, 13.0]])


@pytest.mark.parametrize(
    ("options", "order", "start", "end"),
    [
        ({"own_k": 1}, "AB" + 8 * "A" + 8 * "B", 3.4212, -2.1516),
        ({"estimator": "avg"}, 9 * "A", 3.8605, 1.5412),
        ({"own_k": 3}, 7 * "A", 3.9200, 0.6986),
    ],
)
def test_only_the_nearest_neighbour_covers_the_whole_target(
    options: dict[str, Any], order: str, start: float, end: float
):
    target, pool, begin = grids()
    found = select(target, pool, begin, k=3, **options)
    assert "".join("ABC"[step.candidate // 9] for step in found.steps) == order
    assert found.start == pytest.approx(start, abs=1e-4)
    assert found.steps[-1].divergence == pytest.approx(end, abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"estimator": "avg"}, {"own_k": 5}])
def test_a_pool_far_away_gives_nothing(options: dict[str, Any]):
    draw = np.random.default_rng(0)
    target = points(draw.normal((3, 4), 0.5**0.5, (100, 2)))
    pool = points(draw.normal((300, 400), 0.5**0.5, (100, 2)))
    start = points(draw.uniform(0, 8, (20, 2)))
    assert select(target, pool, start, **options).steps == ()


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_the_lazy_search_is_the_plain_one(seed: int):
    draw = np.random.default_rng(seed)
    target, pool, start = (draw.integers(-4, 5, (size, 2)) * 0.7 for size in (8, 9, 2))
    target = target + draw.normal(0, 1e-3, target.shape)
    found = select(points(target), points(pool), points(start), k=2)
    floored = greedy_by_hand(target, pool, start, 2)
    got = [step.candidate for step in found.steps]
    assert got == floored
    whole = points(np.vstack([start, pool[got]]))
    if got:
        assert found.steps[-1].divergence == pytest.approx(knn(points(target), whole, 2), abs=1e-9)


@pytest.mark.parametrize("options", [{}, {"estimator": "avg"}])
def test_motion_and_scale_of_the_whole_space_change_nothing(options: dict[str, Any]):
    target, pool, start = normal(0, 0, 20), normal(1, 0.5, 30), normal(2, 3, 4)
    angle = torch.tensor(0.7, dtype=torch.float64)
    turn = torch.stack(
        [torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])]
    )
    moved = [3 * (each @ turn) + 5 for each in (target, pool, start)]
    one, two = select(target, pool, start, **options), select(*moved, **options)
    assert [s.candidate for s in one.steps] == [s.candidate for s in two.steps]
    assert one.start == pytest.approx(two.start, abs=1e-9)


def test_a_budget_counts_sizes_and_patience_takes_its_steps_back():
    target, pool, start = normal(0, 0, 40), normal(1, 0, 60), normal(2, 4, 3)
    free = select(target, pool, start)
    assert free.why == "increase"
    sizes = torch.full((60,), 10.0)
    some = select(target, pool, start, sizes=sizes, stop=Stop(budget=45))
    assert (len(some.steps), some.why) == (5, "budget")
    assert some.steps == free.steps[:5]
    patient = select(target, pool, start, stop=Stop(patience=3))
    assert patient.steps[: len(free.steps)] == free.steps
    assert patient.steps[-1].divergence == min(step.divergence for step in patient.steps)


def test_shares_follow_the_target_not_the_pool():
    target = torch.cat([normal(0, 0, 30), normal(1, 20, 10)])
    pool = torch.cat([normal(2, 0, 1), normal(3, 20, 50)])
    found: Selection = select(target, pool, points([[50.0, 50.0]]), stop=Stop(max_steps=2), k=3)
    left = sum(
        share for step, share in zip(found.steps, found.shares, strict=True) if step.candidate == 0
    )
    assert left == pytest.approx(0.75)
