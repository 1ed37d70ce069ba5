"""DoGE: the numbers of a single step, a toy whose best mixture is known, and the proxy's loop."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import polars as pl
import pytest
import torch
from alignment_case import ModelStep, in_two_ranks, language_model, piece
from proxy_case import make_optimiser, make_task, open_data, write_domains
from torch import Tensor, nn
from toy_bilevel import BEST, CENTRES, TARGET, Toy, Trained, train

from curate.errors import ConfigError, DivergedError
from mixers.doge import DoGE, DoGERule, DomainWeights, normalised, update
from mixers.proxy import Files, ProxyResult, run_proxy
from mixers.proxy_settings import Proxy
from mixers.rules import Piece, Tokens

RAW = DoGE(form="raw", mu=1.0, skip_share=0.0, target_sequences=1)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def toy_run(
    settings: DoGE, *, steps: int, lr: float = 0.1, toy: Toy | None = None
) -> tuple[DoGERule, Trained]:
    rule = DoGERule(settings, len((toy or Toy()).centres), peak_lr=lr)
    return rule, train(rule, steps=steps, lr=lr, toy=toy)


@pytest.mark.parametrize(
    ("size", "wanted"), [(1.0, (0.36279, 0.48971, 0.14750)), (0.05, (0.33657, 0.34166, 0.32176))]
)
def test_one_step_has_the_numbers_of_the_derivation(size: float, wanted: tuple[float, ...]):
    rule, trained = toy_run(replace(RAW, mu=0.1 / size), steps=1)
    alignment = trained.seen[0].values["alignment"]
    torch.testing.assert_close(alignment, vector(0.2, 0.5, -0.7))
    torch.testing.assert_close(rule.mixture(), vector(*wanted), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("mu", "far"), [(0.1, 1e-3), (0.5, 1e-3), (1.0, 1e-3), (5.0, 5e-3)])
def test_the_only_fixed_point_is_found_for_every_mu(mu: float, far: float):
    """The gradients are written down here; the rule itself runs the same toy below."""
    theta, state = torch.zeros(2, dtype=torch.float64), DomainWeights.uniform(3)
    for _ in range(5000):
        state = update(state, (theta - CENTRES) @ (theta - TARGET), step_size=0.1 / mu)
        theta = theta - 0.1 * (theta - state.weights @ CENTRES)
    torch.testing.assert_close(state.weights, BEST, atol=1e-5, rtol=0)
    torch.testing.assert_close(state.mean, BEST, atol=far, rtol=0)


@pytest.mark.parametrize("lag", [True, False])
def test_the_rule_in_a_loop_ends_at_the_best_mixture(lag: bool):
    rule, trained = toy_run(replace(RAW, lag=lag), steps=1500)
    torch.testing.assert_close(trained.weights[-1], BEST, atol=1e-3, rtol=0)
    torch.testing.assert_close(rule.mixture(), BEST, atol=5e-3, rtol=0)
    torch.testing.assert_close(trained.theta, TARGET, atol=1e-3, rtol=0)


def test_the_normalised_form_has_the_best_mixture_as_its_mean():
    """Its last step wanders: near the target the direction stays, however short the gradient."""
    rule, _ = toy_run(DoGE(kappa=0.1, skip_share=0.0, target_sequences=1), steps=2000)
    torch.testing.assert_close(rule.mixture(), BEST, atol=5e-3, rtol=0)


def test_with_noise_the_mean_is_still_right():
    toy = Toy(noise=0.3, target_noise=0.3, sequences=12)
    rule, _ = toy_run(replace(RAW, target_sequences=4), steps=1500, toy=toy)
    torch.testing.assert_close(rule.mixture(), BEST, atol=0.03, rtol=0)


def test_domains_that_are_all_the_target_stay_equal():
    """With the product with itself left out they would not: W would be (-1, -1, -2)."""
    toy = Toy(centres=CENTRES + vector(3.0, -1.0))
    _, trained = toy_run(replace(RAW, mode="universal"), steps=800, toy=toy)
    torch.testing.assert_close(trained.theta, toy.centres.mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(trained.weights[-1], torch.full((3,), 1 / 3).double(),
                               atol=1e-6, rtol=0)  # fmt: skip
    torch.testing.assert_close(
        trained.seen[-1].values["alignment"], torch.zeros(3).double(), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("seed", range(2))
def test_the_related_domain_wins_over_an_unrelated_one_and_noise(seed: int):
    unit = torch.eye(20, dtype=torch.float64)
    toy = Toy(
        centres=torch.stack([unit[0], unit[1], 0 * unit[0]]),
        target=unit[0],
        noise=vector(0.05, 0.05, 1.0),
        sequences=24,
        seed=seed,
    )
    rule, trained = toy_run(replace(RAW, mu=2.0, target_sequences=8), steps=4000, toy=toy)
    assert float(trained.weights[-1, 0]) >= 0.995
    assert float((trained.theta - unit[0]).square().sum()) / 2 < 5e-4
    assert int(rule.mixture().argmax()) == 0


def test_scales_and_orders_do_not_matter_to_the_normalised_form():
    def first(scale: float, order: Sequence[int], form: str) -> tuple[Tensor, Tensor]:
        class Scaled(ModelStep):
            def tokens(self, piece: Piece, model: nn.Module | None = None) -> Tokens:
                found = super().tokens(piece, model)
                return found._replace(losses=scale * found.losses)

            def target(self, purpose: str, count: int) -> list[Piece]:
                return [piece(0, count, seed=9)]

        rows = [piece(0, 4, seed=1), piece(0, 3, seed=2), piece(0, 5, seed=3)]
        batch = [
            rows[old]._replace(domains=torch.full_like(rows[old].domains, new))
            for new, old in enumerate(order)
        ]
        settings = DoGE(form=form, mu=1.0, skip_share=0.0, target_sequences=3)  # pyright: ignore[reportArgumentType]
        rule = DoGERule(settings, 3, peak_lr=0.1)
        seen = rule.step(Scaled(language_model(), batch, num_domains=3))
        return seen.values["alignment"], seen.weights

    turn = [2, 0, 1]
    near = partial(torch.testing.assert_close, rtol=1e-5, atol=0)  # the model's norms are float32
    raw, _ = first(1.0, [0, 1, 2], "raw")
    near(first(3.0, [0, 1, 2], "raw")[0], 9 * raw)
    near(first(1.0, turn, "raw")[0], raw[turn])
    plain = first(1.0, [0, 1, 2], "normalised")
    turned = tuple(each[turn] for each in plain)
    near(first(3.0, [0, 1, 2], "normalised"), plain)
    near(first(1.0, turn, "normalised"), turned)


def test_the_step_goes_down_the_weighted_gradient():
    """Against the loss written out; before the update where it lags, else after."""
    for lag in (True, False):
        model = language_model()
        batch = [piece(0, 4, seed=1), piece(1, 2, seed=2), piece(3, 6, seed=3)]
        rule = DoGERule(replace(RAW, lag=lag), 4, peak_lr=0.1)
        before = rule.mixture()

        class Aimed(ModelStep):
            def target(self, purpose: str, count: int) -> list[Piece]:
                return [piece(0, 5, seed=8)]

        step = Aimed(model, batch)
        seen = rule.step(step)
        assert float((seen.weights - before).abs().max()) > 1e-3
        weights = before if lag else seen.weights
        loss = sum(
            weights[int(each.domains[0])] * step.tokens(each).losses.mean() for each in batch
        )
        wanted = torch.autograd.grad(torch.as_tensor(loss), step.parameters)
        for parameter, grad in zip(step.parameters, wanted, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, grad)


def test_without_a_target_every_domain_counts_alike_however_many_tokens_it_has():
    model = language_model()
    batch = [piece(0, 4, seed=1), piece(1, 2, seed=2)]
    other = [piece(0, 6, seed=4), piece(1, 1, seed=5)]

    class Drawn(ModelStep):
        def more(self, purpose: str, each: int | Tensor) -> list[Piece]:
            return other

    step = Drawn(model, batch, num_domains=2)
    rule = DoGERule(replace(RAW, mode="universal"), 2, peak_lr=0.1)
    found = rule.step(step).values["alignment"]

    def gradient(given: Piece) -> Tensor:
        loss = step.tokens(given).losses.mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, step.parameters)])

    both = gradient(other[0]) + gradient(other[1])
    wanted = torch.stack([gradient(each) @ both for each in batch])
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_forward_mode_goes_the_same_way():
    ways = [replace(RAW, lag=False), replace(RAW, lag=False, how="forward")]
    found = [toy_run(each, steps=20)[1].weights for each in ways]
    torch.testing.assert_close(found[0], found[1])


def test_adam_takes_the_direction_in_which_its_step_goes():
    """g = (1, 0) and (0, .1), g_tgt = (.5, .05), v = (1, .01): products .5, .005; then .5, .05."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    slopes = {0: vector(1.0, 0.0), 1: vector(0.0, 0.1), 2: vector(0.5, 0.05)}

    class Given(ModelStep):
        def tokens(self, piece: Piece, model: nn.Module | None = None) -> Tokens:
            slope = slopes[int(piece.batch["slope"][0])]
            return Tokens((self.parameters[0] * slope).sum()[None], torch.zeros(1).long(),
                          piece.domains)  # fmt: skip

        def second_moments(self) -> list[Tensor]:
            return [vector(1.0, 0.01)]

        def target(self, purpose: str, count: int) -> list[Piece]:
            return [of(2, 0)]

    def of(slope: int, domain: int) -> Piece:
        return Piece({"slope": torch.tensor([slope])}, torch.tensor([domain]), torch.tensor([1]))

    for precondition, wanted in ((None, (0.5, 0.005)), ("adam", (0.5, 0.05))):
        rule = DoGERule(replace(RAW, precondition=precondition), 2, peak_lr=0.1)
        seen = rule.step(Given(Two(), [of(0, 0), of(1, 1)], num_domains=2))
        torch.testing.assert_close(seen.values["alignment"], vector(*wanted), rtol=1e-6, atol=0)


def test_an_absent_domain_keeps_its_weight():
    state = DomainWeights(vector(0.5, 0.2, 0.3).log(), torch.zeros(3).double(), 0)
    found = update(state, vector(1.0, torch.nan, 0.5), step_size=2.0, smoothing=0.1).weights
    assert float(found[1]) == pytest.approx(0.2)
    assert float(found.sum()) == pytest.approx(1.0)
    wanted = 0.8 * (0.9 * (vector(0.5, 0.3).log() + vector(2.0, 1.0)).softmax(0) + 0.05)
    torch.testing.assert_close(found[[0, 2]], wanted)
    nothing = update(state, torch.full((3,), torch.nan).double(), step_size=2.0)
    torch.testing.assert_close(nothing.weights, state.weights)


def test_far_alignments_do_not_leave_the_numbers_there_are():
    state = DomainWeights.uniform(3)
    for _ in range(3):
        state = update(state, vector(900.0, 0.0, -900.0), step_size=10.0)
    state = update(state, vector(-30_000.0, 0.0, 0.0), step_size=1.0)
    assert bool(state.log_weights.isfinite().all())
    torch.testing.assert_close(state.weights.sum(), vector(1.0)[0])


def test_lengths_of_zero_are_no_division_by_zero():
    zeros = torch.zeros(2, dtype=torch.float64)
    assert normalised(zeros, zeros, 0.0).tolist() == [0.0, 0.0]
    found = normalised(vector(0.0, 0.5), vector(0.0, 1.0), 1.0)
    torch.testing.assert_close(found, vector(0.0, 1.0))


def test_the_step_follows_the_learning_rate():
    """A quarter of the rate, a quarter of the way, in both forms; unless it is not coupled."""
    for form, at_peak in (("raw", 0.1), ("normalised", 0.2)):
        settings = DoGE(form=form, mu=1.0)  # pyright: ignore[reportArgumentType]
        assert settings.step_size(0.1, 0.1) == pytest.approx(at_peak)
        assert settings.step_size(0.025, 0.1) == pytest.approx(at_peak / 4)
        assert replace(settings, coupled=False).step_size(0.025, 0.1) == pytest.approx(at_peak)
    assert DoGE(form="raw").step_size(0.01, 0.1) == pytest.approx(0.2)
    assert DoGE(form="raw", mode="universal").step_size(0.01, 0.1) == pytest.approx(1.0)


def test_the_weights_stay_uniform_at_the_start_and_nothing_is_measured():
    rule, trained = toy_run(replace(RAW, skip_share=0.3), steps=10)
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(trained.weights[2], uniform)
    assert trained.seen[2].values["alignment"].isnan().all()
    assert float((trained.weights[3] - uniform).abs().max()) > 1e-3
    torch.testing.assert_close(rule.mixture(), trained.weights.mean(0))


def test_settings_that_cannot_work_are_refused():
    for options in ({"kappa": 0.0}, {"mu": -1.0}, {"skip_share": 1.0}, {"target_sequences": 0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            DoGE(**options)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="forward"):
        DoGE(how="forward")


def test_losses_that_are_no_numbers_name_the_domain():
    toy = Toy(centres=torch.tensor([[1.0, 0.0], [torch.nan, 1.0], [-1.0, -1.0]]).double())
    for settings in (RAW, replace(RAW, skip_share=0.5)):
        with pytest.raises(DivergedError, match="domain 1 is not finite in step 1"):
            toy_run(settings, steps=4, toy=toy)


SETTINGS = Proxy(steps=12, sequences=12, lr=1e-2, warmup=0.1, held_out=4, resume_every_seconds=0.0)
SIZES = {"count": 48, "noise": 48, "repeat": 24}


def looped(
    folder: Path,
    doge: DoGE,
    settings: Proxy = SETTINGS,
    *,
    die_after: int | None = None,
    dropout: float = 0.1,
) -> tuple[ProxyResult, DoGERule]:
    """In the proxy's loop; the target counts too."""
    folder.mkdir(exist_ok=True)
    target = open_data([write_domains(folder / "target.safetensors", {"count-2": 32}, seed=1)])
    data = open_data([write_domains(folder / "data.safetensors", SIZES)])
    rule = DoGERule(doge, 3, peak_lr=settings.lr)

    def told(step: int, weights: Tensor) -> None:
        if step == die_after:
            raise KeyboardInterrupt

    files = Files(folder=folder, fingerprint="f")
    data = data._replace(target=target.sequences)
    optimiser = make_optimiser(settings, dropout=dropout)
    return run_proxy(optimiser, make_task(), data, rule, settings, files, told=told), rule


LOOPED: dict[str, DoGE] = {
    "target": DoGE(skip_share=0.1, kappa=1.0),
    "universal": DoGE(skip_share=0.1, mode="universal", form="raw", mu=0.1, lag=False),
    "forward": DoGE(skip_share=0.1, form="raw", mu=0.1, lag=False, how="forward"),
    "adam": DoGE(skip_share=0.0, kappa=1.0, precondition="adam"),
}


@pytest.mark.parametrize("name", LOOPED)
def test_a_run_that_dies_twice_ends_in_the_same_bits(name: str, tmp_path: Path):
    whole, rule = looped(tmp_path / "whole", LOOPED[name])
    for step in (4, 9):
        with pytest.raises(KeyboardInterrupt):
            looped(tmp_path / "killed", LOOPED[name], die_after=step)
    again, rule_again = looped(tmp_path / "killed", LOOPED[name])
    assert again == whole
    assert max(whole.mixture.values()) > 0.335
    for key, value in rule.state().items():
        assert torch.equal(rule_again.state()[key], value), key
    tables = [pl.read_parquet(tmp_path / each / "trajectory.parquet")
              for each in ("whole", "killed")]  # fmt: skip
    assert tables[0].equals(tables[1])
    assert "alignment" in tables[0].columns


def test_pieces_give_the_weights_of_the_whole_step(tmp_path: Path):
    pieces = replace(SETTINGS, piece_tokens=2 * 16)
    whole, _ = looped(tmp_path / "whole", LOOPED["target"], dropout=0)
    split, _ = looped(tmp_path / "split", LOOPED["target"], pieces, dropout=0)
    assert split.mixture == pytest.approx(whole.mixture, rel=1e-4)
    assert split.held_out == pytest.approx(whole.held_out, rel=1e-3)


def test_the_domain_like_the_target_comes_first_and_noise_last(tmp_path: Path):
    settings = replace(SETTINGS, steps=60, sequences=24)
    result, _ = looped(tmp_path, DoGE(kappa=0.5), settings, dropout=0)
    mixture = result.mixture
    assert max(mixture, key=lambda name: mixture[name]) == "count"
    assert mixture["count"] > 0.5


def _two(rank: int, folder: Path) -> None:
    found: dict[str, dict[str, float]] = {}
    for name in ("target", "forward"):
        (folder / str(rank)).mkdir(exist_ok=True)
        found[name] = looped(folder / str(rank) / name, LOOPED[name], dropout=0)[0].mixture
    torch.save(found, folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_ranks_find_the_mixture_of_one(tmp_path: Path):
    first, second = in_two_ranks(_two, tmp_path)
    assert first == second
    for name, mixture in first.items():
        alone, _ = looped(tmp_path / name, LOOPED[name], dropout=0)
        assert mixture == pytest.approx(alone.mixture, rel=1e-4)
