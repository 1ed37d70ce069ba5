"""DGA's weights: closed forms, toys with a known optimum, caps, bases, and what must not matter."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from toy_bilevel import BEST, CENTRES, TARGET, Toy, train

from curate.errors import ConfigError, DivergedError, InputError
from mixers.basis import make_basis
from mixers.dga import DGA, update
from mixers.dga_rule import DGARule
from mixers.dga_schedule import first_mix, next_mix, stretches
from mixers.share_limits import capped, epoch_caps

NAMES = ("a", "b", "c")


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def stepped(weights: Tensor, alignment: Tensor, **options: float) -> Tensor:
    return update(weights.log(), alignment, **{"kappa": 0.5, **options}).exp()


def rule(**options: Any) -> DGARule:
    """In the form in which the quadratic toy has its known answers: plain products."""
    given: dict[str, Any] = {"form": "raw", "clip_norm": 0.0, "warm_share": 0.0, **options}
    return DGARule(DGA(**given), NAMES, torch.full((3,), 100))


def test_a_step_is_a_softmax_of_alignments():
    found = stepped(vector(0.5, 0.5), vector(0.6, 0.2))
    torch.testing.assert_close(found, vector(0.549834, 0.450166), atol=1e-6, rtol=0)


def test_an_average_of_the_weights_is_a_smaller_step():
    start, alignment = vector(0.5, 0.5), vector(0.6, 0.2)
    averaged = stepped(start, alignment, kappa=0.5, beta=0.1)
    smaller = stepped(start, alignment, kappa=0.05)
    assert float(averaged[0]) == pytest.approx(0.50498, abs=5e-6)
    assert float(smaller[0]) == pytest.approx(0.50500, abs=5e-6)


def test_measured_at_every_step_it_is_the_step_of_doge():
    found = stepped(torch.full((3,), 1 / 3).double(), vector(0.2, 0.5, -0.7), kappa=1.0)
    torch.testing.assert_close(found, vector(0.36279, 0.48971, 0.14750), atol=1e-5, rtol=0)
    # The same products, from theta = 0 in the loop.
    made = rule(every=1, kappa=1.0)
    seen = train(made, steps=1).seen[0]
    torch.testing.assert_close(seen.values["alignment"], vector(0.2, 0.5, -0.7))
    torch.testing.assert_close(made.shares(), found)


def alone(
    centres: Tensor,
    target: Tensor,
    *,
    steps: int,
    every: int,
    noise: Tensor | float = 0.0,
    target_noise: float = 0.0,
    seed: int = 0,
    **options: float,
) -> Tensor:
    """(U, K) weights of a loop of its own: descent in expectation, gradients with noise."""
    source = torch.Generator().manual_seed(seed)
    theta = torch.zeros(centres.shape[1], dtype=torch.float64)
    weights = torch.full((len(centres),), 1 / len(centres), dtype=torch.float64).log()
    scale = torch.as_tensor(noise, dtype=torch.float64).expand(len(centres))[:, None]
    told: list[Tensor] = []

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=source, dtype=torch.float64)

    for number in range(steps):
        if number % every == 0:
            gradients = theta - centres + scale * drawn(*centres.shape)
            towards = theta - target + target_noise * drawn(len(target))
            weights = update(weights, gradients @ towards, **options)
            told.append(weights.exp())
        steps_of = theta - centres + scale * drawn(*centres.shape)
        theta = theta - 0.1 * (weights.exp() @ steps_of)
    return torch.stack(told)


@pytest.mark.parametrize(
    ("steps", "options", "mean"),
    [
        (2000, {"every": 1, "kappa": 0.1}, (0.301, 0.599, 0.100)),
        (5000, {"every": 10, "kappa": 0.5}, (0.301, 0.599, 0.101)),
        (5000, {"every": 10, "kappa": 0.5, "beta": 0.1}, (0.306, 0.581, 0.113)),
    ],
)
def test_the_quadratic_toy_ends_at_its_optimum(
    steps: int, options: dict[str, Any], mean: tuple[float, ...]
):
    found = alone(CENTRES, TARGET, steps=steps, **options)
    torch.testing.assert_close(found.mean(0), vector(*mean), atol=6e-4, rtol=0)
    torch.testing.assert_close(found[-1], BEST, atol=1e-5, rtol=0)


def test_with_noise_the_last_weights_wander_and_the_mean_does_not():
    options: dict[str, Any] = {"steps": 2000, "every": 1, "kappa": 0.1}
    found = [
        alone(CENTRES, TARGET, noise=0.3, target_noise=0.3, seed=seed, **options)
        for seed in range(3)
    ]
    for each in found:
        torch.testing.assert_close(each.mean(0), BEST, atol=0.012, rtol=0)
    assert max(float((each[-1] - BEST).abs().max()) for each in found) > 0.05


@pytest.mark.parametrize(
    ("kappa", "beta", "first"),
    [(0.1, 1.0, 0.975), (0.5, 1.0, 0.996), (0.02, 1.0, 0.873), (0.5, 0.1, 0.949)],
)
def test_of_related_unrelated_and_noise_the_related_domain_is_left(
    kappa: float, beta: float, first: float
):
    centres = torch.zeros(3, 20, dtype=torch.float64)
    centres[0, 0], centres[1, 1] = 1.0, 1.0
    root = math.sqrt(8)
    found = alone(
        centres,
        centres[0],
        steps=4000,
        every=10,
        noise=vector(0.05, 0.05, 1.0) / root,
        target_noise=0.05 / root,
        kappa=kappa,
        beta=beta,
    )
    assert float(found[-1, 0]) == pytest.approx(first, abs=6e-3)


def test_in_the_loop_the_mean_is_the_optimum():
    made = rule(every=10, kappa=0.5)
    found = train(made, steps=1500, toy=Toy(sequences=100, noise=0.1))
    torch.testing.assert_close(made.mixture(), BEST, atol=0.01, rtol=0)
    torch.testing.assert_close(found.theta, TARGET, atol=0.02, rtol=0)


@given(
    st.lists(st.tuples(st.floats(1e-3, 1), st.floats(0, 1)), min_size=1, max_size=9),
)
def test_caps_hold_and_the_others_keep_their_ratios(pairs: list[tuple[float, float]]):
    shares = vector(*[pair[0] for pair in pairs])
    shares = shares / shares.sum()
    caps = vector(*[pair[1] for pair in pairs])
    found = capped(shares, caps)
    assert float(found.sum()) == pytest.approx(1)
    if float(caps.sum()) > 1 + 1e-6:
        assert bool((found <= caps + 1e-9).all())
        free = found < caps - 1e-9
        ratios = found[free] / shares[free]
        assert not len(ratios) or float(ratios.max()) == pytest.approx(float(ratios.min()))
        assert not len(ratios) or bool((found[~free] / shares[~free] <= ratios[0] + 1e-9).all())
    elif float(caps.sum()) > 0:
        torch.testing.assert_close(found, caps / caps.sum())


def test_a_cap_ends_the_last_epoch_with_the_run():
    caps = epoch_caps(vector(10, 100), vector(15, 15), left=50, max_epochs=2)
    torch.testing.assert_close(caps, vector(0.1, 3.7))
    torch.testing.assert_close(capped(vector(0.9, 0.1), caps), vector(0.1, 0.9))
    assert epoch_caps(vector(10), vector(30), left=5, max_epochs=2).tolist() == [0]


def test_a_limited_domain_is_not_read_more_often_and_the_rest_is_still_ranked():
    """Best would be 0.6 of the second domain, of which 100 points are there for 3000 draws."""
    settings = DGA(form="raw", clip_norm=0, warm_share=0, every=1, max_epochs=4)
    made = DGARule(settings, NAMES, vector(10_000, 100, 10_000))
    train(made, steps=100, toy=Toy(sequences=30))
    read = made.state()["read"]
    assert 380 <= float(read[1]) <= 402
    assert float(read[0]) > 2 * float(read[2])


def test_a_domain_that_was_not_measured_keeps_its_weight():
    start = vector(0.5, 0.3, 0.2)
    found = stepped(start, vector(0.9, math.nan, -0.3))
    assert float(found[1]) == pytest.approx(0.3)
    pair = vector(0.5 * math.exp(0.45), 0.2 * math.exp(-0.15))
    torch.testing.assert_close(found[[0, 2]], 0.7 * pair / pair.sum())
    torch.testing.assert_close(stepped(start, torch.full((3,), math.nan)), start)


def test_a_gradient_of_zero_says_nothing():
    settings, present = DGA(), torch.tensor([True, True, False])
    found = settings.alignment(
        vector(2, 0, math.nan), vector(4, 0, math.nan), 1.0, present=present, names=NAMES
    )
    assert found[0] == 0.5
    assert found[1:].isnan().all()
    none = settings.alignment(vector(0, 0, 0), vector(1, 1, 1), 0.0, present=present, names=NAMES)
    assert none.isnan().all()


def test_the_raw_form_clips_both_gradients():
    present = torch.ones(2, dtype=torch.bool)
    given: dict[str, Any] = {"present": present, "names": ("a", "b")}
    products, norms = vector(6.0, 0.3), vector(4.0, 0.5)
    clipped = DGA(form="raw").alignment(products, norms, 3.0, **given)
    torch.testing.assert_close(clipped, vector(6 / 12, 0.3 / 3))
    plain = DGA(form="raw", clip_norm=0).alignment(products, norms, 3.0, **given)
    torch.testing.assert_close(plain, products)
    cosine = DGA().alignment(products, norms, 3.0, **given)
    torch.testing.assert_close(cosine, vector(0.5, 0.2))


def test_what_diverged_is_told_by_name():
    present = torch.tensor([True, True, False])
    with pytest.raises(DivergedError, match="gradient of b is not"):
        DGA().alignment(
            vector(1, math.nan, 0), vector(1, math.nan, 0), 1.0, present=present, names=NAMES
        )
    with pytest.raises(DivergedError, match="gradient of the target"):
        DGA().alignment(vector(1, 1, 1), vector(1, 1, 1), math.nan, present=present, names=NAMES)


@given(st.integers(0, 1000), st.floats(0.01, 5), st.floats(0.01, 1))
def test_what_must_not_matter_does_not(seed: int, kappa: float, beta: float):
    source = torch.Generator().manual_seed(seed)
    weights = torch.rand(5, generator=source, dtype=torch.float64) + 0.01
    weights = weights / weights.sum()
    alignment = torch.randn(5, generator=source, dtype=torch.float64)
    found = stepped(weights, alignment, kappa=kappa, beta=beta)
    assert float(found.sum()) == pytest.approx(1)
    order = torch.randperm(5, generator=source)
    turned = stepped(weights[order], alignment[order], kappa=kappa, beta=beta)
    torch.testing.assert_close(turned, found[order])
    moved = stepped(weights, alignment + 3, kappa=kappa, beta=beta)
    torch.testing.assert_close(moved, found)
    assert float(stepped(vector(1.0), alignment[:1], kappa=kappa)[0]) == pytest.approx(1)


def test_nothing_is_lost_for_good():
    weights = vector(1.0, 0.0)
    for _ in range(60):
        weights = stepped(weights, vector(-0.5, 0.5))
    assert float(weights[1]) > 0.9
    many = stepped(torch.full((10_000,), 1e-4).double(), torch.zeros(10_000))
    torch.testing.assert_close(many, torch.full((10_000,), 1e-4).double())
    far = stepped(vector(0.5, 0.5), vector(0, 5000.0))
    assert bool(far.isfinite().all())


def test_weights_start_where_the_settings_say():
    start = DGA(start={"b": 30, "a": 10}).start_weights(NAMES)
    uniform = 0.1 / 3
    torch.testing.assert_close(start, vector(0.225 + uniform, 0.675 + uniform, uniform))
    torch.testing.assert_close(DGA().start_weights(NAMES), torch.full((3,), 1 / 3).double())
    with pytest.raises(ConfigError, match="start gives a share to 'd'"):
        DGA(start={"d": 1.0}).start_weights(NAMES)
    with pytest.raises(ConfigError, match="no share above 0"):
        DGA(start={"a": 0.0}).start_weights(NAMES)


def test_the_warm_up_and_the_steps_between_measure_nothing():
    settings = DGA(every=10, warm_share=0.05)
    due = [done for done in range(100) if settings.is_due(done, 400)]
    assert due == [20, 30, 40, 50, 60, 70, 80, 90]
    made = rule(every=7, warm_share=0.1, kappa=0.3)
    found = train(made, steps=40)
    changes = [n for n in range(1, 40) if not torch.equal(found.weights[n], found.weights[n - 1])]
    # Measured before the update of step 8 (seven are done), drawn from step 9 on.
    assert changes == [8, 15, 22, 29, 36]
    measured = [
        n for n, seen in enumerate(found.seen) if not seen.values["alignment"].isnan().any()
    ]
    assert measured == [7, 14, 21, 28, 35]


def test_the_gradient_of_a_step_is_that_of_the_plain_loss():
    made = rule(every=1)
    toy = Toy(sequences=30, noise=0.2)
    found = train(made, steps=2, toy=toy)
    shares = found.weights
    assert float(found.seen[1].counts.sum()) == 30
    # theta_1 = lr * mean of the points of the first batch; told again by hand.
    counts = found.seen[0].counts / 30
    torch.testing.assert_close(counts, shares[0], atol=0.05, rtol=0)


class Stopped:
    """A rule that is replaced by a fresh one with its state before a step."""

    def __init__(self, stop: int, **options: Any) -> None:
        self.options, self.stop, self.inner = options, stop, rule(**options)
        self.columns, self.by_domain = DGARule.columns, DGARule.by_domain

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def step(self, step: Any) -> Any:
        if step.number == self.stop:
            saved = {name: tensor.clone() for name, tensor in self.inner.state().items()}
            self.inner = rule(**self.options)
            self.inner.load(saved)
        return self.inner.step(step)


@pytest.mark.parametrize("stop", [3, 10, 21])
def test_a_run_taken_up_again_has_the_same_weights_to_the_last_bit(stop: int):
    options: dict[str, Any] = {"every": 3, "kappa": 0.3, "max_epochs": 2.0}
    toy = Toy(sequences=12, noise=0.1, random=True)
    whole = rule(**options)
    stopped: Any = Stopped(stop, **options)
    one, two = train(whole, steps=30, toy=toy), train(stopped, steps=30, toy=toy)
    assert torch.equal(one.theta, two.theta)
    assert torch.equal(one.weights, two.weights)
    for name, tensor in whole.state().items():
        assert torch.equal(stopped.state()[name], tensor), name


def test_identical_domains_keep_equal_weights_on_average():
    centres = CENTRES[:1].expand(3, -1).clone()
    made = rule(every=1, kappa=0.05, sequences=4)
    train(made, steps=600, toy=Toy(centres=centres, target=CENTRES[0], noise=0.1, sequences=12))
    torch.testing.assert_close(made.mixture(), torch.full((3,), 1 / 3).double(), atol=0.05, rtol=0)


def test_the_identity_as_a_basis_is_no_basis():
    identity = {name: {name: 1.0} for name in NAMES}
    plain, based = rule(every=2, kappa=0.3), rule(every=2, kappa=0.3, basis=identity)
    one = train(plain, steps=50, toy=Toy(sequences=30))
    two = train(based, steps=50, toy=Toy(sequences=30))
    torch.testing.assert_close(two.weights, one.weights)
    assert based.weights.keys() == plain.weights.keys()


def test_shares_on_a_basis_stay_in_its_hull():
    basis = {"code": {"a": 3.0, "b": 1.0}, "prose": {"b": 1.0, "c": 1.0}}
    made = rule(every=2, kappa=0.3, basis=basis)
    found = train(made, steps=60, toy=Toy(sequences=30))
    rows = torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.5, 0.5]], dtype=torch.float64)
    for shares in found.weights[[0, 20, 59]]:
        weights = torch.linalg.lstsq(rows.T, shares).solution
        torch.testing.assert_close(weights @ rows, shares)
        assert bool((weights >= 0).all())
        assert float(weights.sum()) == pytest.approx(1)
    assert not torch.equal(found.weights[0], found.weights[59])
    # Each distribution is measured by its own gradient: by hand at theta = 0.
    gradients = -(rows @ CENTRES)
    wanted = (0.3 * gradients @ -TARGET).softmax(0) @ rows
    torch.testing.assert_close(found.weights[1], wanted, atol=2e-2, rtol=0)


def test_a_basis_is_read_from_a_file_and_checked(tmp_path: Path):
    path = tmp_path / "basis.json"
    path.write_text(json.dumps({"one": {"a": 2, "b": 2}, "two": {"c": 1}}))
    basis = make_basis(NAMES, str(path))
    assert basis.names == ("one", "two")
    torch.testing.assert_close(basis.rows, torch.tensor([[0.5, 0.5, 0], [0, 0, 1]]).double())
    caps = basis.caps(vector(0.1, 0.9, 0.4))
    torch.testing.assert_close(caps, vector(0.6, 0.4))
    with pytest.raises(ConfigError, match=r"basis\.one gives a share to 'x'"):
        make_basis(NAMES, {"one": {"x": 1.0}})
    with pytest.raises(ConfigError, match="4 distributions over 3"):
        make_basis(NAMES, {str(n): {"a": 1.0} for n in range(4)})
    with pytest.raises(ConfigError, match="no distribution"):
        make_basis(NAMES, {})
    path.write_text("one: [1, 2]")
    with pytest.raises(InputError, match="one of the basis"):
        make_basis(NAMES, str(path))
    with pytest.raises(InputError, match="cannot be read"):
        make_basis(NAMES, str(tmp_path / "none.yaml"))


def test_a_thousand_domains_work_and_their_cost_is_told(caplog: pytest.LogCaptureFixture):
    names = [f"d{n:04}" for n in range(1000)]
    settings = DGA(every=1, warm_share=0, sequences=1)
    made = DGARule(settings, names, torch.full((1000,), 10))
    source = torch.Generator().manual_seed(0)
    centres = torch.randn(1000, 2, generator=source, dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        train(made, steps=2, toy=Toy(centres=centres, sequences=64))
    assert "sequences are measured for each one trained on" in caplog.text
    assert float(made.mixture().sum()) == pytest.approx(1)
    best = (centres @ TARGET / centres.norm(dim=1)).argmax()
    assert int(made.state()["schedule"][0].argmax()) == int(best)


def test_the_schedule_is_told_in_few_stretches_of_the_same_mean():
    source = torch.Generator().manual_seed(0)
    rows = torch.rand(20, 3, generator=source, dtype=torch.float64)
    rows = rows / rows.sum(1, keepdim=True)
    by_step = torch.cat([rows[:1].expand(20, -1), rows[1:].repeat_interleave(20, 0)])
    steps = torch.arange(1, 401)
    for most in (50, 20, 7, 1):
        found = stretches(steps, by_step, most=most)
        assert len(found) == min(most, 20)
        assert math.fsum(share for share, _ in found) == pytest.approx(1)
        mean = torch.stack([share * row for share, row in found]).sum(0)
        torch.testing.assert_close(mean, by_step.mean(0))
    torch.testing.assert_close(stretches(steps, by_step)[1][1], rows[1])
    torch.testing.assert_close(stretches(steps, by_step, most=10)[3][1], rows[6:8].mean(0))
    # Rows of unequal length: one to step 20, one to 50, one to 100.
    found = stretches(torch.tensor([20, 50, 100]), rows[:3])
    assert [share for share, _ in found] == pytest.approx([0.2, 0.3, 0.5])
    halves = stretches(torch.tensor([20, 50, 100]), rows[:3], most=2)
    torch.testing.assert_close(halves[0][1], 0.4 * rows[0] + 0.6 * rows[1])


def test_the_mean_is_over_the_measurements_alone():
    basis, settings = make_basis(NAMES, None), DGA()
    mix = first_mix(settings, basis)
    torch.testing.assert_close(mix.mean, torch.full((3,), 1 / 3).double())
    for begins in (3, 6):
        mix = next_mix(settings, basis, mix, vector(1, 0, 0), begins=begins, caps=None)
    one = (vector(0.5, 0, 0)).softmax(0)
    torch.testing.assert_close(mix.mean, (one + vector(1.0, 0, 0).softmax(0)) / 2)
    assert mix.steps.tolist() == [3, 6]


@pytest.mark.parametrize(
    "options",
    [
        {"seeds": ()},
        {"phases": 0},
        {"every": 0},
        {"kappa": 0.0},
        {"beta": 0.0},
        {"floor": 1.0},
        {"warm_share": 1.0},
        {"max_epochs": 0.0},
        {"clip_norm": -1.0},
        {"start_uniform": 2.0},
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, Any]):
    with pytest.raises(ConfigError, match=next(iter(options))):
        DGA(**options)
