"""GIO against hand-worked divergences, brute force and the published shapes."""

import math
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curate.errors import ConfigError
from curate.plan.settings import Keep
from scorers.gio import GIO
from scorers.gio_divergence import divergence, log_distances, log_radii, mean_divergence, phi
from scorers.gio_explode import capped_sizes, ordered, owners, shares, step_weights, whole_steps
from scorers.gio_gradient import Descent, descend
from scorers.gio_search import Selection, Stop, select

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


@pytest.mark.parametrize("estimator", ["knn", "avg"])
def test_another_k_changes_the_divergence_by_a_constant_and_no_choice(estimator: Any):
    target, pool, start = normal(0, 0, 30), normal(1, 0.5, 50), normal(2, 3, 4)
    plain = partial(select, target, pool, start, estimator=estimator)
    by_descent = partial(
        descend, target, pool, start, estimator=estimator, stop=Stop(), descent=Descent()
    )
    for search in (plain, by_descent):
        one, two = search(k=1), search(k=9)
        assert [s.candidate for s in one.steps] == [s.candidate for s in two.steps]
        apart = [a.divergence - b.divergence for a, b in zip(one.steps, two.steps, strict=True)]
        assert apart == pytest.approx([one.start - two.start] * len(apart), abs=1e-9)
        assert apart
        assert abs(apart[0]) > 0.01


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


def demo() -> tuple[Tensor, Tensor, Tensor]:
    """The authors' demonstration: two samples of one normal law, and an even start."""

    def drawn(seed: int) -> np.ndarray:
        return np.random.RandomState(seed).multivariate_normal([3, 4], np.eye(2) / 2, 100)

    start = np.random.RandomState(0).uniform(0, 8, (100, 2))
    return points(drawn(1)), points(drawn(5)), points(start)


def test_the_authors_demonstration_by_looking_at_every_candidate():
    target, pool, start = demo()
    found = select(target, pool, start, estimator="avg")
    assert found.start == pytest.approx(2.4640, abs=1e-4)
    assert len(found.steps) == 96
    assert found.steps[-1].divergence == pytest.approx(1.4119, abs=1e-4)


@pytest.mark.parametrize("first", ["mean", "previous", "jump"])
def test_the_authors_demonstration_by_descent(first: Any):
    """Which point comes next depends on the last digits; what is chosen in the end hardly does."""
    target, pool, start = demo()
    found = descend(target, pool, start, stop=Stop(patience=5), descent=Descent(first=first))
    assert found.start == pytest.approx(2.4640, abs=1e-4)
    assert 94 <= len(found.steps) <= 99
    assert found.steps[-1].divergence == pytest.approx(1.4119, abs=0.01)


def test_a_short_descent_follows_the_gradient():
    """Of the corners' phi at (3, 3): (0.400641, 0.400641), and the scale makes it |v_0| long."""
    target, start = points(CORNERS), points([[5.0, 5.0]])
    options = Descent(iterations=1, lr=1.0, scale=2.0)
    pool = points([[0.5, 0.5], [3.0, 3.0], [3.0 - 0.801282 / 2, 3.0 - 0.801282 / 2]])
    v = points([3.0, 3.0])
    from scorers.gio_gradient import _State  # pyright: ignore[reportPrivateUsage]

    state = _State(target, start, log_radii(target, 1), 1, "avg")
    torch.testing.assert_close(2 * state.gradient(v), points([0.400641] * 2), atol=1e-6, rtol=0)
    # At the mean of the corners the gradient vanishes: the descent stays, whatever the scale.
    found = descend(target, pool, start, k=1, descent=options, stop=Stop(max_steps=1))
    assert [step.candidate for step in found.steps] == [0]


@pytest.mark.parametrize("estimator", ["avg", "knn"])
def test_the_gradient_is_that_of_the_divergence(estimator: Any):
    from scorers.gio_gradient import _State  # pyright: ignore[reportPrivateUsage]

    target, start, v = normal(0, 0, 12, 3), normal(1, 2, 4, 3), points([0.3, -0.2, 0.1])
    state = _State(target, start, log_radii(target, 2), 2, estimator)
    value = average if estimator == "avg" else knn
    for axis in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[axis] = 1e-6
        ahead, behind = (
            value(target, torch.cat([start, (v + sign * step)[None]]), 2) for sign in (1, -1)
        )
        assert float(state.gradient(v)[axis]) == pytest.approx((ahead - behind) / 2e-6, abs=1e-6)


def test_the_lazy_search_in_float32_takes_the_best_of_a_large_pool():
    """Bounds from a matrix product must not hide a candidate, near the target or far from it."""
    draw = torch.Generator().manual_seed(0)
    target = torch.randn(300, 16, generator=draw) * 0.1 + 1
    pool = torch.randn(4000, 16, generator=draw) * 0.3 + 1
    pool[::50] = target[:80] + 1e-4 * torch.randn(80, 16, generator=draw)
    start = torch.randn(1, 16, generator=draw) + 3
    found = select(target, pool, start, stop=Stop(max_steps=120))
    plain = select(target.double(), pool.double(), start.double(), stop=Stop(max_steps=120))
    nearest = log_distances(target.double(), start.double()).amin(1)
    for step in found.steps:
        gains = (nearest - log_distances(pool.double(), target.double())).clamp_min(0).mean(1)
        assert float(gains.max() - gains[step.candidate]) < 1e-5
        own = log_distances(pool[step.candidate].double()[None], target.double())[0]
        nearest = torch.minimum(nearest, own)
    assert found.steps[-1].divergence == pytest.approx(plain.steps[-1].divergence, abs=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("options", [{}, {"estimator": "avg"}, {"own_k": 2}])
def test_a_gpu_takes_the_steps_of_the_cpu(options: dict[str, Any]):
    target, pool, start = normal(0, 0, 50, 6), normal(1, 0.3, 400, 6), normal(2, 3, 4, 6)
    own = torch.full((400,), -1)
    own[:5] = torch.arange(5)
    here = select(target, pool, start, own=own, **options)
    there = select(*(rows.cuda() for rows in (target, pool, start)), own=own.cuda(), **options)
    assert [s.candidate for s in there.steps] == [s.candidate for s in here.steps]
    assert there.start == pytest.approx(here.start, abs=1e-9)


@pytest.mark.parametrize("offset", [0.0, 1.0, 300.0])
def test_first_bounds_in_float32_are_never_below_the_gains(offset: float):
    """Far from the origin |x|^2 - 2xy + |y|^2 loses all digits: bounds grow, and stay bounds."""
    from scorers.gio_search import _first_bounds  # pyright: ignore[reportPrivateUsage]

    draw = torch.Generator().manual_seed(1)
    target = torch.randn(40, 24, generator=draw) * 0.2 + offset
    pool = torch.cat(
        [target + size * torch.randn(40, 24, generator=draw) for size in (0, 1e-5, 1e-4, 1e-2, 1)]
    )
    start = log_distances(target, target[:1] + 2).amin(1)
    bounds = _first_bounds(target, pool, start)
    exact = log_distances(pool.double(), target.double())
    gains = (start.double() - exact).clamp_min(0).mean(1)
    assert float((bounds - gains).min()) >= 0
    if offset < 2:  # and near the truth where the points are not
        assert float((bounds - gains)[160:].max()) < 1e-3


def test_a_target_that_is_the_pool_is_its_own_neighbour_only_where_copies_count():
    target = normal(0, 0, 60)
    start, own = points([[9.0, 9.0]]), torch.arange(60)
    counted = select(target, target, start)
    assert counted.steps[-1].divergence < -15  # a distance of zero for everything
    apart = select(target, target, start, own=own, stop=Stop(patience=60))
    assert abs(apart.steps[-1].divergence) < 2
    nearest = log_distances(target, target)
    nearest[own, own] = torch.inf
    everything = divergence(log_radii(target, 1), nearest.amin(1), d=2, k=1, own_k=1, m=59)
    assert everything == pytest.approx(0, abs=1e-9)
    averaged = select(target, target, start, own=own, estimator="avg", stop=Stop(patience=60))
    assert averaged.steps[-1].divergence > -1


def test_shares_follow_the_target_not_the_pool():
    target = torch.cat([normal(0, 0, 30), normal(1, 20, 10)])
    pool = torch.cat([normal(2, 0, 1), normal(3, 20, 50)])
    found: Selection = select(target, pool, points([[50.0, 50.0]]), stop=Stop(max_steps=2), k=3)
    added = pool[[step.candidate for step in found.steps]]
    *_, last = owners(target, added)
    left = shares(last, 2)[[step.candidate == 0 for step in found.steps]]
    assert left.tolist() == pytest.approx([0.75])


def test_owners_are_those_of_a_full_comparison_after_every_step():
    target, added = normal(0, 0, 25), normal(1, 0, 9)
    for number, owner in enumerate(owners(target, added), 1):
        far = np.linalg.norm(target.numpy()[:, None] - added.numpy()[None, :number], axis=2)
        assert owner.tolist() == far.argmin(1).tolist()


def test_a_copy_does_not_own_the_target_point_that_it_copies():
    target, added = points([[0.0, 0.0], [1.0, 0.0]]), points([[0.0, 0.0], [0.3, 0.0]])
    assert [owner.tolist() for owner in owners(target, added)] == [[0, 0], [0, 1]]
    own = torch.tensor([0, -1])
    assert [owner.tolist() for owner in owners(target, added, own)] == [[0, 0], [1, 1]]


def test_a_cluster_gives_at_most_a_multiple_of_its_share():
    sizes, share = np.array([1000, 10, 5, 7]), np.array([0.5, 0.3, 0.2, 0.0])
    assert capped_sizes(sizes, share, None).tolist() == sizes.tolist()
    assert capped_sizes(sizes, share, 1.0).tolist() == [16, 10, 5, 0]
    # 45 = 1.5 * 0.5 * 60, and one to spare for rounding up.
    assert capped_sizes(sizes, share, 1.5).tolist() == [48, 10, 5, 0]
    assert capped_sizes(sizes, share, 5.0).tolist() == [1000, 10, 5, 0]


@given(st.integers(0, 10_000), st.floats(1, 8))
def test_capped_sizes_keep_their_limit_and_are_never_all_zero(seed: int, most: float):
    draw = np.random.default_rng(seed)
    sizes, share = draw.integers(1, 50, 8), draw.dirichlet(np.full(8, 0.3))
    taken = capped_sizes(sizes, share, most)
    assert taken.sum() > 0
    assert (taken <= sizes).all()
    assert (taken <= most * share * taken.sum() + 1 + 1e-6).all()


def test_steps_end_where_their_examples_reach_the_budget():
    target = torch.cat([normal(0, 0, 20), normal(1, 20, 20)])
    added, sizes = points([[0.0, 0.0], [20.0, 20.0], [1.0, 1.0]]), np.array([8, 4, 3])
    assert whole_steps(owners(target, added), sizes, most=None, budget=9)[0] == 2
    assert whole_steps(owners(target, added), sizes, most=None, budget=12)[0] == 2
    assert whole_steps(owners(target, added), sizes, most=None, budget=None)[0] == 3
    number, share, taken = whole_steps(owners(target, added), sizes, most=1.0, budget=10)
    assert number == 3  # of the first cluster's 8 only 5 count beside the second's 4
    assert taken.sum() < 15
    assert share.sum() == pytest.approx(1)


def test_examples_come_step_by_step_and_the_nearest_first():
    steps = np.array([1, 0, -1, 0, 1, 0], dtype=np.int32)
    distances = np.array([0.5, 0.3, 0.0, 0.1, 0.2, 0.3], dtype=np.float32)
    assert ordered(steps, distances, [3, 2]).tolist() == [3, 1, 5, 4, 0]
    assert ordered(steps, distances, [2, 1]).tolist() == [3, 1, 4]
    assert ordered(np.full(4, -1, dtype=np.int32), distances[:4], []).tolist() == []


def test_weights_give_every_step_its_share_of_the_target():
    weights = step_weights(np.array([0.5, 0.5, 0.0]), np.array([30, 10, 20]), most=None)
    assert weights.tolist() == [1.0, 3.0, 0.0]
    assert weights @ np.array([30, 10, 20]) == 60
    assert step_weights(np.array([0.9, 0.1]), np.array([1, 99]), most=5.0).tolist()[0] == 5.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": 0}, "clusters is 0"),
        ({"max_share": 0.5}, "max_share is 0.5"),
        ({"own_k": 2, "estimator": "avg"}, "own_k belongs"),
        ({"own_k": 2}, "selection of one point"),
        ({"descent": Descent(lr=0.0)}, "descent needs"),
        ({"budget": Keep(share=3)}, "budget.share is 3"),
        ({"budget": Keep(token_share=1.5)}, "budget.token_share is 1.5"),
        ({"budget": Keep(share=float("nan"))}, "budget.share is nan"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        GIO(**options)
