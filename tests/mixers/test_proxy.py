"""The proxy's loop: its batches, its steps, and what a kill leaves."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from proxy_case import make_model, make_optimiser, make_task, open_data, write_domains
from torch import Tensor
from torch.nn import functional

from curate.errors import DivergedError
from curate.models.sequences import Sequences
from mixers.doremi import DoReMi, DoReMiRule
from mixers.loss_weights import LossReweighting
from mixers.plain import PlainRule, ReweightedRule
from mixers.proxy import Files, ProxyResult, run_proxy
from mixers.proxy_draws import Draw, stratified_counts
from mixers.proxy_settings import Proxy
from mixers.proxy_step import Data
from mixers.rules import Rule

SIZES = {"count": 48, "noise": 48, "repeat": 24}
SETTINGS = Proxy(steps=12, sequences=12, lr=1e-2, warmup=0.1, held_out=4, resume_every_seconds=0.0)
UNIFORM = torch.full((1, 3), 1 / 3, dtype=torch.float64)


def plain(shares: Tensor = UNIFORM) -> PlainRule:
    return PlainRule(shares, torch.ones(1), total_steps=SETTINGS.steps)


def reweighted() -> ReweightedRule:
    return ReweightedRule(UNIFORM[0], LossReweighting(robust=True, uniform_share=0.2))


def doremi() -> DoReMiRule:
    return DoReMiRule(DoReMi(warm_share=0.1), 3)


def with_reference(data: Data) -> Data:
    """Losses that differ from sequence to sequence, of 15 tokens each."""

    def losses(numbers: np.ndarray) -> np.ndarray:
        return np.repeat(2 + (numbers % 7) / 7, 15).astype(np.float32)

    return data._replace(reference=losses)


RULES: dict[str, Callable[[], Rule]] = {"plain": plain, "reweighted": reweighted, "doremi": doremi}


def run(
    folder: Path,
    make_rule: Callable[[], Rule],
    settings: Proxy = SETTINGS,
    *,
    sizes: dict[str, int] = SIZES,
    die_after: int | None = None,
    dropout: float = 0.1,
) -> tuple[ProxyResult, Rule, torch.nn.Module]:
    folder.mkdir(exist_ok=True)
    data = with_reference(open_data([write_domains(folder / "data.safetensors", sizes)]))
    rule = make_rule()
    optimiser = make_optimiser(settings, dropout=dropout)

    def told(step: int, weights: Tensor) -> None:
        if step == die_after:
            raise KeyboardInterrupt

    files = Files(folder=folder, fingerprint="f")
    result = run_proxy(optimiser, make_task(), data, rule, settings, files, told=told)
    return result, rule, optimiser.model


@pytest.mark.parametrize("name", RULES)
def test_a_run_that_dies_twice_ends_in_the_same_bits(name: str, tmp_path: Path):
    whole, rule, model = run(tmp_path / "whole", RULES[name])
    for step in (4, 9):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed", RULES[name], die_after=step)
    again, rule_again, model_again = run(tmp_path / "killed", RULES[name])
    assert again == whole
    for key, value in rule.state().items():
        assert torch.equal(rule_again.state()[key], value), key
    for one, two in zip(model.parameters(), model_again.parameters(), strict=True):
        assert torch.equal(one, two)
    tables = [
        pl.read_parquet(tmp_path / each / "trajectory.parquet") for each in ("whole", "killed")
    ]
    assert tables[0].equals(tables[1])
    held_out = [
        pl.read_parquet(tmp_path / each / "held_out.parquet") for each in ("whole", "killed")
    ]
    assert held_out[0].equals(held_out[1])


def test_a_state_of_other_settings_is_not_resumed(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, plain, die_after=5)
    data = open_data([tmp_path / "data.safetensors"])
    steps: list[int] = []
    run_proxy(
        make_optimiser(SETTINGS),
        make_task(),
        data,
        plain(),
        SETTINGS,
        Files(folder=tmp_path, fingerprint="another"),
        told=lambda step, _: steps.append(step),
    )
    assert steps == list(range(1, 13))


@pytest.mark.parametrize("name", RULES)
def test_pieces_give_the_weights_and_the_model_of_the_whole_step(name: str, tmp_path: Path):
    whole, _, model = run(tmp_path / "whole", RULES[name], dropout=0)
    pieces = replace(SETTINGS, piece_tokens=5 * 16)
    split, _, split_model = run(tmp_path / "split", RULES[name], pieces, dropout=0)
    assert split.mixture == pytest.approx(whole.mixture, rel=1e-5)
    assert split.held_out == pytest.approx(whole.held_out, rel=1e-4)
    for one, two in zip(model.parameters(), split_model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_a_plain_run_is_adamw_on_the_mean_loss_of_its_batches(tmp_path: Path):
    """The same batches by a loop of a few lines that shares no code with ours."""
    data = open_data([write_domains(tmp_path / "data.safetensors", SIZES)])
    settings = Proxy(steps=6, sequences=12, lr=1e-2, warmup=0.0, schedule="constant", held_out=0)
    optimiser = make_optimiser(settings)
    rule = PlainRule(torch.tensor([[0.5, 0.25, 0.25]]), torch.ones(1), total_steps=6)
    files = Files(folder=tmp_path, fingerprint="f")
    run_proxy(optimiser, make_task(), data, rule, settings, files)

    model = make_model().train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2)
    draw = Draw(data.sequences.domains, data.sequences.sizes, seed=0, purpose="batch")
    for _ in range(6):
        domains, places = draw.take(np.array([6, 3, 3]))
        taken = data.sequences.take(domains, places)
        ids = torch.from_numpy(taken.encoded.arrays["tokens"].reshape(12, 16)).long()
        logits = model(input_ids=ids).logits[:, :-1]
        loss = functional.cross_entropy(logits.reshape(-1, 32), ids[:, 1:].reshape(-1))
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
    for one, two in zip(model.parameters(), optimiser.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_phases_change_the_shares_at_their_step(tmp_path: Path):
    two = torch.tensor([[1.0, 0, 0], [0, 0.5, 0.5]])

    def rule() -> PlainRule:
        return PlainRule(two, torch.tensor([0.25, 1.0]), total_steps=12)

    result, _, _ = run(tmp_path, rule)
    assert result.num_tokens == {"count": 3 * 12 * 15, "noise": 9 * 6 * 15, "repeat": 9 * 6 * 15}
    assert result.mixture == pytest.approx({"count": 0.25, "noise": 0.375, "repeat": 0.375})


def test_the_trajectory_has_the_losses_and_weights_of_every_step(tmp_path: Path):
    result, _, _ = run(tmp_path, doremi)
    table = pl.read_parquet(tmp_path / "trajectory.parquet")
    assert table.columns == ["step", "domain", "weight", "loss", "num_tokens", "excess"]
    assert table["step"].unique().sort().to_list() == list(range(1, 13))
    means = table.group_by("domain").agg(pl.col("weight").mean()).rows()
    assert dict(means) == pytest.approx(result.mixture)
    assert table["num_tokens"].sum() == 12 * 12 * 15
    first = table.filter(pl.col("step") == 1)
    assert first["loss"].to_list() == pytest.approx([np.log(32)] * 3, rel=0.05)
    assert dict(first.select("domain", "weight").rows()) == pytest.approx(
        dict.fromkeys(SIZES, 1 / 3)
    )


def test_the_excess_is_that_over_the_cached_losses(tmp_path: Path):
    run(tmp_path, doremi)
    table = pl.read_parquet(tmp_path / "trajectory.parquet").filter(pl.col("step") == 1)
    data = open_data([tmp_path / "data.safetensors"])
    draw = Draw(data.sequences.domains, data.sequences.sizes, seed=0, purpose="batch")
    domains, places = draw.take(np.array([4, 4, 4]))
    numbers = data.sequences.take(domains, places).numbers
    reference = 2 + (numbers % 7) / 7
    # All of them lie below the losses of an untrained model, so that nothing is clipped.
    expected = [table["loss"][k] - reference[domains == k].mean() for k in range(3)]
    assert table["excess"].to_list() == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_is_no_number_names_the_domain_and_keeps_the_trajectory(tmp_path: Path):
    settings = Proxy(steps=12, sequences=12, lr=1e-2)
    data = open_data([write_domains(tmp_path / "data.safetensors", SIZES)])
    optimiser = make_optimiser(settings)

    def told(step: int, weights: Tensor) -> None:
        if step == 5:
            with torch.no_grad():
                next(optimiser.model.parameters()).fill_(torch.nan)

    files = Files(folder=tmp_path, fingerprint="f")
    with pytest.raises(DivergedError, match="domain count at step 6") as diverged:
        run_proxy(optimiser, make_task(), data, plain(), settings, files, told=told)
    assert str(files.trajectory) in diverged.value.fix
    assert pl.read_parquet(files.trajectory)["step"].max() == 5


def test_a_domain_of_one_sequence_is_gone_through_again(tmp_path: Path):
    result, _, _ = run(tmp_path, plain, sizes={"count": 48, "noise": 1, "repeat": 24})
    assert result.epochs["noise"] == 48
    assert "noise" not in result.held_out
    assert set(result.held_out) == {"count", "repeat"}


def test_names_decide_and_not_their_order(tmp_path: Path):
    """The store lists domains by name; here they are asked for the other way round."""
    settings = Proxy(steps=8, sequences=12, lr=1e-2)
    found: list[ProxyResult] = []
    for names in (["count", "noise", "repeat"], ["repeat", "noise", "count"]):
        data = open_data([write_domains(tmp_path / "data.safetensors", SIZES)])
        ordered = Sequences.open(
            [tmp_path / "data.safetensors"], parts=("reference", "proxy"), domains=names
        )
        data = with_reference(data._replace(sequences=ordered, held_out=None))
        files = Files(folder=tmp_path / names[0], fingerprint="f")
        rule = DoReMiRule(DoReMi(warm_share=0.0), 3)
        found.append(run_proxy(make_optimiser(settings), make_task(), data, rule, settings, files))
    assert found[0].mixture == pytest.approx(found[1].mixture, rel=1e-4)


@pytest.mark.parametrize("size", [7, 12, 64, 2])
def test_counts_of_a_batch_have_the_shares_as_their_means(size: int):
    shares = np.array([0.5, 0.05, 0.0, 0.25, 0.2])
    counts = np.array([stratified_counts(shares, size, seed) for seed in range(4000)])
    assert (counts.sum(1) == size).all()
    assert (np.abs(counts - shares * size) < 1).all()
    np.testing.assert_allclose(counts.mean(0), shares * size, atol=0.04)


def test_equal_shares_of_a_multiple_are_kept_exactly():
    for num in (2, 3, 7, 13, 22):
        for seed in range(200):
            counts = stratified_counts(np.full(num, 1 / num), 4 * num, seed)
            assert counts.tolist() == [4] * num


def test_every_sequence_comes_once_in_each_epoch():
    draw = Draw(("a", "b"), np.array([10, 3]), seed=3, purpose="batch")
    taken = [draw.take(np.array([4, 1])) for _ in range(15)]
    places = np.concatenate([p for _, p in taken])
    domains = np.concatenate([d for d, _ in taken])
    of_a, of_b = places[domains == 0], places[domains == 1]
    for epoch in range(6):
        assert sorted(of_a[10 * epoch : 10 * epoch + 10]) == list(range(10))
    for epoch in range(5):
        assert sorted(of_b[3 * epoch : 3 * epoch + 3]) == [0, 1, 2]
    assert draw.epochs.tolist() == [6, 5]
