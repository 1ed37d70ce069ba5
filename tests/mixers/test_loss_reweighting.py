"""Loss reweighting in the proxy's loop: against hand-made weights, plain runs and other splits."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from alignment_case import ModelStep, in_two_ranks, language_model, losses_of, piece, share
from proxy_case import make_optimiser, make_task, open_data, write_domains
from torch import Tensor, nn

from curate.config import parse, plain
from curate.errors import ConfigError
from mixers.loss_reweighting import TokenKind, TokenRule, WeightsByLoss
from mixers.plain import PlainRule, ReweightedRule
from mixers.proxy import Files, ProxyResult, run_proxy
from mixers.proxy_settings import Proxy
from mixers.rules import Piece, Rule

SIZES = {"count": 48, "noise": 48, "repeat": 24}
SETTINGS = Proxy(steps=12, sequences=12, lr=1e-2, warmup=0.1, held_out=4, resume_every_seconds=0.0)
UNIFORM = torch.full((3,), 1 / 3, dtype=torch.float64)
QUARTERS = torch.full((4,), 0.25, dtype=torch.float64)
KINDS: tuple[TokenKind, ...] = ("tldr", "focal", "talr")

MakeRule = Callable[[], Rule]


def examples(**options: object) -> MakeRule:
    settings = parse(WeightsByLoss, {"uniform_share": 0.0, **options}).examples
    return lambda: ReweightedRule(UNIFORM, settings)


def tokens(kind: TokenKind) -> MakeRule:
    return lambda: TokenRule(UNIFORM, kind)


def looped(
    folder: Path,
    make_rule: MakeRule,
    settings: Proxy = SETTINGS,
    *,
    die_after: int | None = None,
    dropout: float = 0.1,
) -> tuple[ProxyResult, Rule]:
    folder.mkdir(exist_ok=True)
    data = open_data([write_domains(folder / "data.safetensors", SIZES)])
    rule = make_rule()

    def told(step: int, weights: Tensor) -> None:
        if step == die_after:
            raise KeyboardInterrupt

    files = Files(folder=folder, fingerprint="f")
    optimiser = make_optimiser(settings, dropout=dropout)
    return run_proxy(optimiser, make_task(), data, rule, settings, files, told=told), rule


def trajectory(folder: Path) -> pl.DataFrame:
    return pl.read_parquet(folder / "trajectory.parquet")


def four_pieces() -> list[Piece]:
    """Three sequences of each of four domains, of unequal length."""
    return [piece(domain, 3, seed=domain) for domain in range(4)]


def joined(pieces: list[Piece]) -> list[Piece]:
    """The same as one piece."""
    ids = torch.cat([each.batch["ids"] for each in pieces])
    domains = torch.cat([each.domains for each in pieces])
    return [Piece({"ids": ids}, domains, torch.cat([each.counts for each in pieces]))]


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def by_hand(losses: np.ndarray, strategy: str, r: float) -> np.ndarray:
    """The paper's weights in a few lines of numpy."""
    low, high = losses.min(), losses.max()
    h = (2 * losses - high - low) / (high - low)
    worth = {
        "linupper": np.minimum(h + 1, 1),
        "quadratic": 1 - h**2,
        "extremes": np.abs(h),
    }[strategy]
    powers = np.exp(worth / r)
    return powers / powers.sum()


# The page's oracles, in the loop.


@pytest.mark.parametrize("strategy", ["linupper", "quadratic", "extremes"])
def test_at_a_huge_temperature_a_run_has_the_losses_of_a_plain_one(strategy: str, tmp_path: Path):
    def unweighted() -> Rule:
        return PlainRule(UNIFORM[None], torch.ones(1), total_steps=SETTINGS.steps)

    looped(tmp_path / "plain", unweighted)
    looped(tmp_path / "weighted", examples(strategy=strategy, temperature=1e6))
    one, two = (trajectory(tmp_path / name)["loss"].to_numpy() for name in ("plain", "weighted"))
    np.testing.assert_allclose(one, two, rtol=1e-6)
    looped(tmp_path / "other", examples(strategy=strategy))
    assert np.abs(trajectory(tmp_path / "other")["loss"].to_numpy() - one).max() > 1e-4


@pytest.mark.parametrize("pieces", ["whole", "split"])
@pytest.mark.parametrize("strategy", ["linupper", "quadratic", "extremes"])
def test_the_gradient_is_that_of_the_losses_with_frozen_weights(strategy: str, pieces: str):
    given = joined(four_pieces()) if pieces == "whole" else four_pieces()
    model = language_model()
    settings = WeightsByLoss(strategy=strategy, temperature=0.4, uniform_share=0.0).examples  # pyright: ignore[reportArgumentType]
    rule = ReweightedRule(QUARTERS, settings)
    seen = rule.step(ModelStep(model, given))
    found = gradients(model)
    model.zero_grad()
    means: list[Tensor] = []
    for each in four_pieces():
        for ids, count in zip(each.batch["ids"], each.counts, strict=True):
            means.append(losses_of(model, ids[None], count[None]).mean())
    weights = by_hand(np.array([mean.item() for mean in means]), strategy, 0.4)
    sum(weight * mean for weight, mean in zip(weights.tolist(), means, strict=True)).backward()  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    for one, two in zip(found, gradients(model), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
    factors = [12 * weights[3 * k : 3 * k + 3].mean() for k in range(4)]
    assert seen.values["factor"].tolist() == pytest.approx(factors)
    assert float(seen.values["largest"][0]) == pytest.approx(12 * weights.max())
    assert float(seen.values["effective_share"][0]) == pytest.approx(1 / (weights**2).sum() / 12)


def token_weight(kind: TokenKind, p: float, tau: float) -> float:
    return {
        "tldr": math.cos(math.pi * p) + 1,
        "focal": (1 - p) ** 2,
        "talr": max(p ** (1 / tau), 0.01),
    }[kind]


@pytest.mark.parametrize("pieces", ["whole", "split"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_tokens_is_that_with_frozen_weights(kind: TokenKind, pieces: str):
    given = joined(four_pieces()) if pieces == "whole" else four_pieces()
    model = language_model()
    seen = TokenRule(QUARTERS, kind).step(ModelStep(model, given))
    found = gradients(model)
    model.zero_grad()
    each: list[Tensor] = []
    domains: list[int] = []
    for number, own in enumerate(four_pieces()):
        for ids, count in zip(own.batch["ids"], own.counts, strict=True):
            each.append(losses_of(model, ids[None], count[None]))
            domains += [number] * int(count)
    tau = float(np.median([losses.mean().item() for losses in each]))
    flat = torch.cat(each)
    weights = np.array([token_weight(kind, math.exp(-loss), tau) for loss in flat.tolist()])
    ((torch.from_numpy(weights) * flat).sum() / len(flat)).backward()
    for one, two in zip(found, gradients(model), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
    places = np.array(domains)
    factors = [weights[places == k].mean() / weights.mean() for k in range(4)]
    assert seen.values["factor"].tolist() == pytest.approx(factors)
    assert float(seen.values["largest"][0]) == pytest.approx(weights.max() / weights.mean())
    effective = weights.sum() ** 2 / (weights**2).sum() / len(weights)
    assert float(seen.values["effective_share"][0]) == pytest.approx(effective)
    sums = [float(flat.detach()[places == k].sum()) for k in range(4)]
    assert seen.loss_sums.tolist() == pytest.approx(sums)


def test_tldr_and_talr_pull_in_opposite_directions(tmp_path: Path):
    """Noise is what the model finds unlikely."""
    settings = replace(SETTINGS, steps=60, resume_every_seconds=60.0)
    found = {kind: looped(tmp_path / kind, tokens(kind), settings)[0].mixture for kind in KINDS}
    assert found["tldr"]["noise"] > 1 / 3
    assert found["focal"]["noise"] > 1 / 3
    assert found["talr"]["noise"] < 1 / 3


# The mixture.


def test_the_mixture_is_the_shares_times_the_mean_weights(tmp_path: Path):
    shares = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    settings = WeightsByLoss(uniform_share=0.25).examples
    result, _ = looped(tmp_path, lambda: ReweightedRule(shares, settings))
    table = trajectory(tmp_path)
    means = table.group_by("domain", maintain_order=True).agg(pl.col("factor").mean())
    expected = means["factor"].to_numpy() * shares.numpy()
    assert list(result.mixture.values()) == pytest.approx(expected / expected.sum())
    assert table.filter(pl.col("step") <= 3)["factor"].to_list() == pytest.approx([1.0] * 9)
    assert table.filter(pl.col("step") > 3)["factor"].std() > 0.05  # pyright: ignore[reportOperatorIssue]


def test_noise_gains_under_linupper_and_extremes_and_less_under_quadratic(tmp_path: Path):
    settings = replace(SETTINGS, steps=60, sequences=32, resume_every_seconds=60.0)
    found = {
        name: looped(tmp_path / name, examples(strategy=name), settings)[0].mixture["noise"]
        for name in ("linupper", "quadratic", "extremes")
    }
    assert found["linupper"] > 0.4
    assert found["extremes"] > 0.36
    assert found["quadratic"] < found["extremes"] - 0.02


def test_within_domains_the_mixture_is_the_shares(tmp_path: Path):
    result, _ = looped(tmp_path, examples(within_domain=True))
    assert list(result.mixture.values()) == pytest.approx([1 / 3] * 3)
    assert trajectory(tmp_path)["effective_share"].max() < 0.999  # pyright: ignore[reportOptionalOperand, reportOperatorIssue]


def test_a_domain_that_a_step_lacks_counts_as_of_weight_one():
    rule = TokenRule(QUARTERS, "tldr")
    seen = rule.step(ModelStep(language_model(), four_pieces()[:3]))
    assert seen.values["factor"][3].isnan()
    assert float(seen.weights[3]) == 0.25
    assert float(rule.mixture()[3]) == pytest.approx(0.25 / float(seen.weights.sum()))


# Kills, pieces and ranks.


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_dies_twice_ends_in_the_same_bits(kind: TokenKind, tmp_path: Path):
    whole, rule = looped(tmp_path / "whole", tokens(kind))
    for step in (4, 9):
        with pytest.raises(KeyboardInterrupt):
            looped(tmp_path / "killed", tokens(kind), die_after=step)
    again, rule_again = looped(tmp_path / "killed", tokens(kind))
    assert again == whole
    for key, value in rule.state().items():
        assert torch.equal(rule_again.state()[key], value), key
    assert trajectory(tmp_path / "whole").equals(trajectory(tmp_path / "killed"))


def _two(rank: int, folder: Path) -> None:
    found: dict[str, list[Tensor]] = {}
    for kind in KINDS:
        model, rule = language_model(), TokenRule(QUARTERS, kind)
        seen = rule.step(ModelStep(model, share(four_pieces(), rank, 2), num_ranks=2))
        summed = gradients(model)
        for gradient in summed:
            torch.distributed.all_reduce(gradient)
        found[kind] = [*summed, rule.mixture(), *seen.values.values()]
    torch.save(found, folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(tmp_path: Path):
    first, second = in_two_ranks(_two, tmp_path)
    for kind in KINDS:
        model, rule = language_model(), TokenRule(QUARTERS, kind)
        seen = rule.step(ModelStep(model, four_pieces()))
        alone = [*gradients(model), rule.mixture(), *seen.values.values()]
        for one, two, whole in zip(first[kind], second[kind], alone, strict=True):
            assert torch.equal(one, two)
            torch.testing.assert_close(one, whole, rtol=1e-9, atol=1e-12)


# Settings.


def test_options_of_examples_are_those_of_the_hook():
    mixer = WeightsByLoss(strategy="extremes", temperature=0.4, robust=True, warm_temperature=100.0)
    own = mixer.examples
    assert (own.strategy, own.temperature, own.robust, own.warm_temperature) == (
        "extremes", 0.4, True, 100.0,
    )  # fmt: skip
    assert WeightsByLoss().examples.warm_temperature == math.inf
    assert parse(WeightsByLoss, plain(mixer)) == mixer


def test_token_weights_beside_options_of_examples_are_refused():
    assert WeightsByLoss(token="tldr", shares="uniform").token == "tldr"
    with pytest.raises(ConfigError, match=r"token is tldr.*beside it"):
        WeightsByLoss(token="tldr", temperature=0.4)


def test_wrong_options_are_refused():
    with pytest.raises(ConfigError, match="temperature is -1"):
        parse(WeightsByLoss, {"temperature": -1}, where="mix")
    with pytest.raises(ConfigError, match="seeds are"):
        WeightsByLoss(seeds=(0, 0))
    with pytest.raises(ConfigError, match=r"mix\.strategy"):
        parse(WeightsByLoss, {"strategy": "lin"}, where="mix")
