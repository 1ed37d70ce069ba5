"""Cooldown against figures worked out by hand."""

import pytest

from curate.errors import ConfigError
from curate.plan.mixture import DomainSize
from mixers.cooldown import Cooldown, latest_switch

SIZES = {
    name: DomainSize(num, num)
    for name, num in {"large": 10**6, "middle": 10**4, "small": 10**2}.items()
}


def test_half_hot_half_cold_gives_the_mean_exposure_of_both():
    found = Cooldown().mixture(SIZES, budget_tokens=2e6)
    hot, cold = found.phases
    assert list(hot.weights.values()) == pytest.approx([0.642427, 0.255755, 0.101818], abs=1e-6)
    assert list(cold.weights.values()) == pytest.approx([0.990001, 0.0099, 0.000099], abs=1e-6)
    assert (hot.share, cold.share) == (0.5, 0.5)
    mean = found.mean()
    assert list(mean.values()) == pytest.approx([0.816214, 0.132827, 0.050958], abs=1e-6)
    epochs = [mean[name] * 2e6 / SIZES[name].num_tokens for name in SIZES]
    assert epochs == pytest.approx([1.63, 26.6, 1019], rel=2e-3)


def test_domains_used_too_often_before_the_switch_are_named_with_a_switch_that_helps():
    found = Cooldown(max_epochs=4).mixture(SIZES, budget_tokens=2e6)
    assert len(found.notes) == 1
    # 0.101818 of half of 2 million draws from 100: 1,018 epochs; from 10,000: 25.6.
    assert "small (1.02e+03), middle (25.6)" in found.notes[0]
    assert "switch at 0.00196" in found.notes[0]


def test_the_offered_switch_is_the_latest_that_keeps_the_limit():
    hot = Cooldown().mixture(SIZES, budget_tokens=2e6).phases[0].weights
    switch = latest_switch(hot, SIZES, budget_tokens=2e6, max_epochs=4)
    worst = max(hot[name] * switch * 2e6 / SIZES[name].num_tokens for name in SIZES)
    assert worst == pytest.approx(4)
    assert Cooldown(switch=switch * 0.999).mixture(SIZES, budget_tokens=2e6).notes == ()
    assert latest_switch(hot, SIZES, budget_tokens=1, max_epochs=4) == 1


def test_why_says_both_phases():
    why = Cooldown().mixture(SIZES, budget_tokens=2e6).why["small"]
    assert "temperature 5 then 1" in why
    assert "10.2 % then 0.0099 % of the budget" in why


@pytest.mark.parametrize("switch", [0, 1, 1.5, float("nan")])
def test_a_switch_outside_the_run_is_refused(switch: float):
    with pytest.raises(ConfigError, match="switch is"):
        Cooldown(switch=switch)


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ConfigError, match="tau_cold 0"):
        Cooldown(tau_cold=0)
