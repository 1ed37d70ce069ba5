"""DoReMi's weights: closed forms, known excess, and what must not matter."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from curate.errors import ConfigError, DivergedError
from mixers.doremi import DomainWeights, DoReMi, excess_sums, weighted_loss


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def after(rule: DoReMi, *excess: Tensor, start: DomainWeights | None = None) -> DomainWeights:
    """One update for each excess, a token in each domain."""
    state = start or DomainWeights.uniform(len(excess[0]))
    for each in excess:
        state = rule.update(state, each, torch.ones(len(each)), total_steps=1_000_000)
    return state


NOW = DoReMi(warm_share=0.0)
"""Without the uniform start."""


def test_a_step_is_exponential_and_then_smoothed():
    excess = vector(0.4, 0.1)
    torch.testing.assert_close(
        after(NOW, excess).weights, vector(0.574368, 0.425632), atol=1e-6, rtol=0
    )
    sharp = DoReMi(warm_share=0.0, smoothing=0.0)
    torch.testing.assert_close(
        after(sharp, excess).weights, vector(0.574443, 0.425557), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        after(NOW, excess, excess).weights, vector(0.645441, 0.354559), atol=1e-6, rtol=0
    )


def test_each_token_is_clipped_before_the_mean_is_taken():
    losses, reference = vector(0.5, 0.1, -0.4, 0.2, -0.3, -0.1), torch.zeros(6)
    sums, counts = excess_sums(losses, reference, torch.tensor([0, 0, 1, 1, 2, 2]), num_domains=3)
    torch.testing.assert_close(sums / counts, vector(0.3, 0.1, 0.0))
    found = NOW.update(DomainWeights.uniform(3), sums, counts, total_steps=10).weights
    torch.testing.assert_close(found, vector(0.390636, 0.319887, 0.289477), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("steps", "mean"), [(10, 0.734900), (100, 0.965303), (1000, 0.994053)])
def test_constant_excess_moves_the_mean_as_the_closed_form(steps: int, mean: float):
    found = after(NOW, *[vector(0.2, 0.0)] * steps)
    assert float(found.mean[0]) == pytest.approx(mean, abs=1e-6)
    if steps == 10:
        assert float(found.weights[0]) == pytest.approx(0.879155, abs=1e-6)
    if steps == 1000:
        assert float(found.weights[0]) == pytest.approx(0.997248, abs=1e-6)


def test_a_domain_counts_by_its_weight_and_not_by_its_tokens():
    domains = torch.tensor([0] * 6 + [1] * 2)
    losses = torch.where(domains == 0, 2.0, 4.0)
    counts = torch.tensor([6, 2])
    assert float(weighted_loss(losses, domains, vector(0.3, 0.7), counts)) == pytest.approx(3.4)


def test_what_must_not_matter_does_not():
    generator = torch.Generator().manual_seed(0)
    excess = [torch.rand(5, generator=generator, dtype=torch.float64) for _ in range(30)]
    found = after(NOW, *excess)
    moved = after(NOW, *[each + 3.7 for each in excess])
    torch.testing.assert_close(moved.weights, found.weights)
    order = torch.tensor([3, 0, 4, 1, 2])
    turned = after(NOW, *[each[order] for each in excess])
    torch.testing.assert_close(turned.mean, found.mean[order])
    assert float(found.weights.sum()) == pytest.approx(1)
    assert float(found.mean.sum()) == pytest.approx(1)
    assert float(found.weights.min()) >= NOW.smoothing / 5
    far = after(NOW, *[vector(900.0, 0.0, 0.0)] * 3)
    torch.testing.assert_close(far.weights.sum(), vector(1.0)[0])


def test_the_reference_has_no_part_in_the_gradient():
    theta = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    domains, counts = torch.tensor([0, 1, 1]), torch.tensor([1, 2])

    def gradient(reference: float) -> Tensor:
        losses = (theta[domains] - vector(1.0, 2.0, 3.0)).square()
        value = weighted_loss(losses - reference, domains, vector(0.4, 0.6), counts)
        (found,) = torch.autograd.grad(value, theta)
        return found

    torch.testing.assert_close(gradient(0.0), gradient(5.0))
    torch.testing.assert_close(gradient(0.0), vector(0.4 * 2 * -0.7, 0.6 * (-2.2 - 3.2)))


@pytest.mark.parametrize(
    ("rule", "steps", "mean"),
    [
        (NOW, 200, (0.149, 0.288, 0.563)),
        (NOW, 2000, (0.251, 0.315, 0.434)),
        (DoReMi(eta=5.0, smoothing=0.0, warm_share=0.0), 2000, (0.174, 0.300, 0.526)),
    ],
)
def test_domains_of_known_speed(rule: DoReMi, steps: int, mean: tuple[float, ...]):
    """Three parameters with the excess theta^2 / 2: equal decay needs weights as 1 / speed."""
    theta, speed = torch.ones(3, dtype=torch.float64), vector(4.0, 2.0, 1.0)
    state = DomainWeights.uniform(3)
    for _ in range(steps):
        state = rule.update(state, theta.square() / 2, torch.ones(3), total_steps=steps)
        theta = theta - 0.05 * state.weights * speed * theta
    torch.testing.assert_close(state.mean, vector(*mean), atol=1e-3, rtol=0)


def test_ranks_and_pieces_of_a_step_add_up():
    generator = torch.Generator().manual_seed(1)
    losses, reference = torch.rand(2, 40, generator=generator, dtype=torch.float64)
    domains = torch.randint(3, (40,), generator=generator)
    whole = excess_sums(losses, reference, domains, num_domains=3)
    pieces = [slice(0, 7), slice(7, 40)]
    parts = [excess_sums(losses[p], reference[p], domains[p], num_domains=3) for p in pieces]
    for one, two, every in zip(*parts, whole, strict=True):
        torch.testing.assert_close(one + two, every)
    weights = vector(0.2, 0.3, 0.5)
    added = sum(weighted_loss(losses[p], domains[p], weights, whole[1]) for p in pieces)
    torch.testing.assert_close(added, weighted_loss(losses, domains, weights, whole[1]))


def test_a_domain_without_a_token_keeps_its_last_excess_or_has_that_of_the_others():
    rule = DoReMi(warm_share=0.0, smoothing=0.0)
    state = rule.update(
        DomainWeights.uniform(3), vector(0.6, 0.0, 0.4), vector(2, 0, 4), total_steps=9
    )
    # 0.3, the mean 0.2, and 0.1
    wanted = vector(0.3, 0.2, 0.1).softmax(0)
    torch.testing.assert_close(state.weights, wanted)
    assert state.excess[1].isnan()
    again = rule.update(state, vector(0.0, 0.5, 0.0), vector(0, 1, 0), total_steps=9)
    wanted = (vector(0.3, 0.2, 0.1) + vector(0.3, 0.5, 0.1)).softmax(0)
    torch.testing.assert_close(again.weights, wanted)


def test_the_weights_stay_uniform_at_the_start_of_a_run():
    state = DomainWeights.uniform(2)
    for step in range(4):
        state = DoReMi(warm_share=0.02).update(
            state, vector(9.0, 0.0), torch.ones(2), total_steps=100
        )
        uniform = bool(torch.allclose(state.weights, vector(0.5, 0.5)))
        assert uniform == (step < 2)


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_the_step_of_the_weights_may_fall_over_the_run(schedule: str, steps: list[float]):
    rule = DoReMi(eta=2.0, eta_schedule=schedule, smoothing=0.0, warm_share=0.0)  # pyright: ignore[reportArgumentType]
    state = DomainWeights.uniform(2)
    for share in steps:
        before = state.weights.log()
        state = rule.update(state, vector(0.3, 0.0), torch.ones(2), total_steps=4)
        moved = (state.weights.log() - before).diff()
        assert float(moved) == pytest.approx(-0.3 * 2 * share, abs=1e-6)


def test_a_proxy_that_is_its_reference_leaves_the_weights_alone():
    losses = torch.rand(30, dtype=torch.float64)
    domains = torch.arange(30) % 4
    state = DomainWeights.uniform(4)
    for _ in range(50):
        state = NOW.update(
            state, *excess_sums(losses, losses, domains, num_domains=4), total_steps=50
        )
    torch.testing.assert_close(state.mean, torch.full((4,), 0.25, dtype=torch.float64))


def test_without_excess_the_weights_forget_by_half_in_ln_2_over_c_steps():
    start = replace(DomainWeights.uniform(2), log_weights=vector(math.log(0.9), math.log(0.1)))
    found = after(NOW, *[vector(0.0, 0.0)] * 693, start=start)
    assert float(found.weights[0]) == pytest.approx(0.7, abs=1e-3)


def test_losses_that_are_no_numbers_and_rules_that_cannot_work_are_refused():
    with pytest.raises(DivergedError, match="domain 1 is nan in step 1"):
        NOW.update(DomainWeights.uniform(2), vector(0.1, math.nan), torch.ones(2), total_steps=5)
    wrong: list[dict[str, Any]] = [{"eta": 0.0}, {"smoothing": 1.0}, {"warm_share": -0.1}]
    for options in wrong:
        with pytest.raises(ConfigError, match=next(iter(options))):
            DoReMi(**options)
