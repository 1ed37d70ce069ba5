"""Loss-based reweighting against figures worked out by hand and plain loops."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # pyright: ignore[reportUnusedImport]  # see jobs.proxy_ranks
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from curate.errors import ConfigError, DivergedError
from mixers.loss_weights import (
    LossReweighting,
    Strategy,
    example_weights,
    rank_loss,
    step_bounds,
    strategy_values,
    summary,
)
from mixers.loss_window import empty_window, remember, window_bounds
from mixers.offline_weights import offline_weights

STRATEGIES: list[Strategy] = ["linupper", "quadratic", "extremes"]
FOUR = torch.tensor([1.0, 2, 3, 5], dtype=torch.float64)
H = torch.tensor([-1, -0.5, 0, 1], dtype=torch.float64)

TABLE: dict[Strategy, tuple[list[float], list[float], list[float], float]] = {
    "linupper": (
        [0, 0.5, 1, 1],
        [0.12368, 0.20392, 0.33620, 0.33620],
        [0.03466, 0.12096, 0.42219, 0.42219],
        3.22112,
    ),
    "quadratic": (
        [0, 0.75, 1, 0],
        [0.14630, 0.30972, 0.39768, 0.14630],
        [0.04830, 0.31497, 0.58843, 0.04830],
        2.69028,
    ),
    "extremes": (
        [1, 0.5, 0, 1],
        [0.33620, 0.20392, 0.12368, 0.33620],
        [0.42219, 0.12096, 0.03466, 0.42219],
        2.79608,
    ),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_four_losses_get_the_weights_worked_out_by_hand(strategy: Strategy):
    values, at_one, at_low, loss = TABLE[strategy]
    assert strategy_values(H, strategy).tolist() == values
    found = example_weights(FOUR, strategy=strategy)
    assert found.tolist() == pytest.approx(at_one, abs=6e-6)
    assert float((found * FOUR).sum()) == pytest.approx(loss, abs=6e-6)
    found = example_weights(FOUR, strategy=strategy, temperature=0.4)
    assert found.tolist() == pytest.approx(at_low, abs=6e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_high_temperature_is_the_plain_mean(strategy: Strategy):
    close = example_weights(FOUR, strategy=strategy, temperature=100)
    assert abs(float((close * FOUR).sum()) - 2.75) < 0.006
    closer = example_weights(FOUR, strategy=strategy, temperature=1e6)
    assert float((closer * FOUR).sum()) == pytest.approx(2.75, abs=1e-6)
    off = example_weights(FOUR, strategy=strategy, temperature=math.inf)
    assert off.tolist() == [0.25] * 4


def test_the_largest_ratio_of_two_weights_is_that_of_the_page():
    for temperature, ratio in ((1.0, 2.72), (0.4, 12.2)):
        found = example_weights(FOUR, temperature=temperature)
        assert float(found.max() / found.min()) == pytest.approx(ratio, abs=0.02)


@given(
    losses=st.lists(st.floats(0, 20), min_size=2, max_size=12),
    scale=st.floats(0.1, 10),
    shift=st.floats(-5, 5),
    strategy=st.sampled_from(STRATEGIES),
    order=st.randoms(use_true_random=False),
)
def test_weights_sum_to_one_and_know_neither_scale_nor_order(
    losses: list[float], scale: float, shift: float, strategy: Strategy, order: Any
):
    values = torch.tensor(losses, dtype=torch.float64)
    if 0 < float(values.max() - values.min()) < 2e-3:
        return  # scaled, they may fall on either side of "equal"
    found = example_weights(values, strategy=strategy)
    assert float(found.sum()) == pytest.approx(1)
    assert bool((found >= 0).all())
    moved = example_weights(scale * values + shift, strategy=strategy)
    torch.testing.assert_close(moved, found, rtol=1e-6, atol=1e-9)
    places = list(range(len(losses)))
    order.shuffle(places)
    torch.testing.assert_close(example_weights(values[places], strategy=strategy), found[places])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_losses_within_a_ten_thousandth_of_each_other_weigh_the_same(strategy: Strategy):
    close = torch.tensor([2, 2 + 1e-7, 2 + 9e-5], dtype=torch.float64)
    assert example_weights(close, strategy=strategy).tolist() == pytest.approx([1 / 3] * 3)
    apart = torch.tensor([2, 2 + 1.1e-4], dtype=torch.float64)
    if strategy == "linupper":
        assert example_weights(apart).tolist() == pytest.approx(
            [1 / (1 + math.e), math.e / (1 + math.e)]
        )


def test_a_low_temperature_neither_overflows_nor_divides_zero_by_zero():
    both_ends = torch.tensor([1.0, 4.0])  # Quadratic: f is 0 for both
    assert example_weights(both_ends, strategy="quadratic", temperature=1e-4).tolist() == [0.5, 0.5]
    assert example_weights(FOUR, temperature=1e-4).tolist() == [0, 0, 0.5, 0.5]


def test_weights_carry_no_gradient():
    """The gradient of the weighted loss is that of the sum with the weights held fixed."""
    losses = FOUR.clone().requires_grad_()
    rank_loss(losses, example_weights(losses)).backward()
    assert losses.grad is not None
    assert losses.grad.tolist() == pytest.approx(TABLE["linupper"][1], abs=6e-6)


def test_one_outlier_flattens_the_others_unless_the_range_is_robust():
    losses = torch.tensor([2, 2.1, 2.2, 2.3, 20], dtype=torch.float64)
    found = example_weights(losses)
    assert float(found[-1]) == pytest.approx(0.401, abs=5e-4)
    assert found[:-1].min() == pytest.approx(0.147, abs=5e-4)
    assert found[:-1].max() == pytest.approx(0.152, abs=5e-4)
    window = empty_window()
    for step in range(20):
        usual = torch.linspace(2, 2.3, 31, dtype=torch.float64)
        window = remember(window, usual, step=step, num_steps=50)
    window = remember(window, losses, step=20, num_steps=50)
    robust = example_weights(losses, bounds=window_bounds(window))
    # LinUpper is flat above the middle of the range, 2.15: the outlier weighs as 2.2 and 2.3 do.
    assert robust[-1] == pytest.approx(float(robust[2])) == pytest.approx(float(robust[3]))
    assert float(robust[-1]) < 0.27


def test_the_window_forgets_whole_steps_and_knows_domains():
    window = empty_window()
    for step in range(5):
        values = torch.tensor([step, 10.0 * step])
        window = remember(window, values, step=step, num_steps=3, domains=torch.tensor([0, 1]))
    assert window.losses.tolist() == [2, 20, 3, 30, 4, 40]
    low, high = window_bounds(window, num_domains=3)
    # Percentiles 2 and 98 of three values lie 4 % of the way from the ends to the middle.
    assert low.tolist() == pytest.approx([2.04, 20.4, math.inf])
    assert high.tolist() == pytest.approx([3.96, 39.6, -math.inf])


def test_within_domains_every_domain_keeps_a_mean_weight_of_one():
    easy = torch.tensor([1, 1.1, 1.2, 1.5])
    hard = torch.tensor([5, 5.5, 7])
    losses = torch.cat([easy, hard, torch.tensor([3.0])])
    domains = torch.tensor([0, 0, 0, 0, 2, 2, 2, 1])
    found = example_weights(losses, domains=domains, num_domains=4)
    torch.testing.assert_close(found[:4], example_weights(easy) * 4 / 8)
    torch.testing.assert_close(found[4:7], example_weights(hard) * 3 / 8)
    assert float(found[7]) == pytest.approx(1 / 8)
    seen = summary(losses, found, domains=domains, num_domains=4).domain_weights
    assert seen[:3].tolist() == pytest.approx([1, 1, 1])
    assert math.isnan(float(seen[3]))
    mixed = summary(losses, example_weights(losses), domains=domains, num_domains=3)
    assert float(mixed.domain_weights[2]) > 1 > float(mixed.domain_weights[0])


def test_the_summary_counts_as_a_plain_loop_does():
    found = example_weights(FOUR, strategy="quadratic", temperature=0.4)
    seen = summary(FOUR, found)
    assert seen.mean_loss == 2.75
    assert seen.largest == pytest.approx(2.35, abs=5e-3)  # beyond the 2 that the theory allows
    assert seen.effective_size == pytest.approx(1 / sum(w * w for w in found.tolist()))


def test_a_loss_that_is_not_finite_is_named():
    with pytest.raises(DivergedError, match=r"examples \[1\] of this rank"):
        example_weights(torch.tensor([1, math.nan, 2]))
    with pytest.raises(DivergedError, match=r"examples \[0, 2\]"):
        step_bounds(torch.tensor([math.inf, 1, -math.inf]))


def test_half_precision_is_raised():
    found = example_weights(FOUR.bfloat16())
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(TABLE["linupper"][1], abs=6e-6)


def test_the_temperature_drops_in_one_step_after_the_uniform_phase():
    settings = LossReweighting(temperature=0.4)
    temperatures = [settings.temperature_at(step, 20_000) for step in (0, 999, 1000, 19_999)]
    assert temperatures == [math.inf, math.inf, 0.4, 0.4]
    warm = LossReweighting(uniform_share=0.1, warm_temperature=100)
    assert [warm.temperature_at(step, 20) for step in (1, 2)] == [100, 1]
    assert LossReweighting(uniform_share=0).temperature_at(0, 20) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"delta": -1},
        {"strategy": "upper"},
        {"uniform_share": 1.5},
        {"window_steps": 0},
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any]):
    with pytest.raises(ConfigError, match=next(iter(options))):
        LossReweighting(**options)


def test_the_offline_approximation_ranks_within_domains_and_keeps_their_mean():
    losses = torch.tensor([1, 2, 3, 5, 100, 300, 200, 7.0, 7.0])
    domains = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2])
    found = offline_weights(losses, domains=domains)
    first = [math.exp(min(h + 1, 1)) for h in (-1, -1 / 3, 1 / 3, 1)]
    assert found[:4].tolist() == pytest.approx([4 * w / sum(first) for w in first])
    second = [math.exp(min(h + 1, 1)) for h in (-1, 1, 0)]
    assert found[4:7].tolist() == pytest.approx([3 * w / sum(second) for w in second])
    assert found[7:].tolist() == [1, 1]
    tied = offline_weights(torch.tensor([1.0, 1, 2, 2]), strategy="extremes")
    assert tied.tolist() == pytest.approx([1] * 4)
    assert offline_weights(torch.tensor([3.0])).tolist() == [1]


def _two_ranks(rank: int, folder: str) -> None:
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    mine = FOUR[2 * rank : 2 * rank + 2].clone().requires_grad_()
    loss = rank_loss(mine, example_weights(mine), num_ranks=2)
    loss.backward()
    assert mine.grad is not None
    uneven = FOUR[:1] if rank == 0 else FOUR[1:]
    kinds = torch.tensor([0]) if rank == 0 else torch.tensor([0, 1, 1])
    weights = example_weights(uneven, domains=kinds, num_domains=2)
    window = remember(empty_window(), uneven, step=0, num_steps=2, domains=kinds)
    seen = summary(uneven, weights, domains=kinds, num_domains=2)
    try:
        example_weights(torch.tensor([1.0, math.nan if rank else 2.0]))
        told = ""
    except DivergedError as error:
        told = error.what
    found = {
        "loss": float(loss),
        "grad": mine.grad.tolist(),
        "weights": weights.tolist(),
        "window": window.losses.tolist(),
        "effective": seen.effective_size,
        "mean": seen.mean_loss,
        "domains": seen.domain_weights.tolist(),
        "told": told,
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_two_ranks_find_what_one_process_finds(tmp_path: Path):
    """Figures of the page: ranks that hold (1, 2) and (3, 5), LinUpper at temperature 1."""
    spawn(_two_ranks, args=(str(tmp_path),), nprocs=2)
    first, second = (json.loads(Path(tmp_path, f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["loss"] == pytest.approx(1.063028, abs=1e-6)
    assert second["loss"] == pytest.approx(5.379218, abs=1e-6)
    assert (first["loss"] + second["loss"]) / 2 == pytest.approx(3.221123, abs=1e-6)
    # The mean over ranks of 2 w_i is w_i: the gradient of the single process.
    grads = [g / 2 for g in first["grad"] + second["grad"]]
    assert grads == pytest.approx(TABLE["linupper"][1], abs=6e-6)
    alone: Tensor = example_weights(FOUR, domains=torch.tensor([0, 0, 1, 1]), num_domains=2)
    assert first["weights"] + second["weights"] == pytest.approx(alone.tolist())
    for each in (first, second):
        assert each["window"] == [1, 2, 3, 5]
        assert each["mean"] == 2.75
        assert each["domains"] == pytest.approx([1, 1])
        assert each["effective"] == pytest.approx(1 / float(alone.square().sum()))
    assert "on another rank" in first["told"]
    assert "examples [1] of this rank" in second["told"]
