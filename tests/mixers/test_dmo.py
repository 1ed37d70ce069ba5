"""DMO: the published constants' optimum by other means, what five runs can say, and the limits."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from curate.config import parse
from curate.errors import ConfigError, InputError
from curate.plan.mixture import DomainSize
from mixers.dmo import DMO, AtBudget, TransferLaw, design, fit
from mixers.dmo_proposal import proposal
from mixers.law_optimum import smooth_optimum, wanted
from mixers.laws import Floats
from mixers.mixture_results import Amounts, amounts_table, read_amounts

LAW = TransferLaw(
    scales=np.array([8.0, 6.0, 10.0]),
    loans=np.array([0.6, 0.3, 0.9]),
    growths=np.array([0.7, 0.8, 0.6]),
    decays=np.array([0.25, 0.20, 0.30]),
    floors=np.array([0.9, 1.1, 0.7]),
)
DOMAINS = ("chat", "code", "maths")
SIZES = {name: DomainSize(1000, 10**9) for name in DOMAINS}


def loss_of(domain: int, own: float, others: float) -> float:
    """The formula, one number at a time."""
    lent = LAW.loans[domain] * others ** LAW.growths[domain]
    return float(LAW.scales[domain] * (own + lent) ** -LAW.decays[domain] + LAW.floors[domain])


def losses_of(tokens: Floats) -> Floats:
    return np.array(
        [[loss_of(i, float(row[i]), float(row.sum() - row[i])) for i in range(3)] for row in tokens]
    )


def runs_of(start: float = 2e5, *, noise: float = 0.0) -> Amounts:
    tokens = design(3, start)
    losses = losses_of(tokens)
    losses = losses + noise * np.random.default_rng(0).standard_normal(losses.shape)
    return Amounts(tuple(map(str, range(len(tokens)))), DOMAINS, tokens, losses)


PUBLISHED = [
    (5e6, (0.3375, 0.3945, 0.2681)),
    (2e7, (0.3341, 0.4149, 0.2510)),
    (2e8, (0.3270, 0.4486, 0.2244)),
]


@pytest.mark.parametrize(("budget", "expected"), PUBLISHED)
def test_the_optimum_moves_with_the_budget_as_listed(budget: float, expected: tuple[float, ...]):
    found = smooth_optimum(AtBudget(LAW, budget), wanted(3, 3))
    np.testing.assert_allclose(found, expected, atol=6e-5)


def test_the_optimum_is_that_of_a_grid():
    budget, step = 2e7, 250
    one, two = np.meshgrid(np.arange(1, step), np.arange(1, step))
    units = np.stack([one, two, step - one - two], axis=-1).reshape(-1, 3)
    points = units[units[:, 2] > 0] / step
    found = smooth_optimum(AtBudget(LAW, budget), wanted(3, 3))
    totals = losses_of(points * budget).sum(1)
    np.testing.assert_allclose(found, points[totals.argmin()], atol=0.004)


def test_slopes_are_those_of_finite_differences():
    law, mixture, tiny = AtBudget(LAW, 2e7), np.array([0.3, 0.5, 0.2]), 1e-6
    for domain in range(3):
        up, down = (
            loss_of(domain, share * 2e7, (1 - share) * 2e7)
            for share in (mixture[domain] + tiny, mixture[domain] - tiny)
        )
        slope = law.gradients(mixture)[domain]
        assert slope[domain] == pytest.approx((up - down) / (2 * tiny), rel=1e-5)
        assert np.count_nonzero(slope) == 1


def test_the_design_varies_one_domain_after_the_other():
    found = design(2, 600)
    assert found.tolist() == [
        [600, 600],
        [200, 600], [300, 600], [1200, 600], [1800, 600],
        [600, 200], [600, 300], [600, 1200], [600, 1800],
    ]  # fmt: skip


def test_all_runs_together_tell_what_is_lent_and_how_it_grows():
    runs = runs_of()
    found = fit(runs.tokens, runs.losses)
    np.testing.assert_allclose(found.losses(runs.tokens), runs.losses, atol=1e-8)
    np.testing.assert_allclose(found.growths, LAW.growths, atol=1e-3)
    np.testing.assert_allclose(found.decays, LAW.decays, atol=1e-3)
    for budget, expected in PUBLISHED:
        best = smooth_optimum(AtBudget(found, budget), wanted(3, 3))
        np.testing.assert_allclose(best, expected, atol=1e-3)


def test_runs_of_one_domain_alone_tell_what_is_lent_as_one_number():
    """With the others at one amount, k and alpha are one constant; that one is right."""
    own = 2e5 * np.array([1, 1 / 3, 1 / 2, 2, 3])
    tokens = np.column_stack([own, np.full(5, 4e5)])
    losses = np.column_stack([[loss_of(0, each, 4e5) for each in own], np.full(5, 2.0)])
    found = fit(tokens, losses)
    assert found.growths[0] == 0
    assert found.loans[0] == pytest.approx(0.6 * 4e5**0.7, rel=1e-2)
    assert found.decays[0] == pytest.approx(0.25, rel=1e-2)


def test_the_mixture_for_a_budget_its_limits_and_what_is_said():
    found = proposal(DMO(), runs_of(), SIZES, 2e7)
    np.testing.assert_allclose(
        [found.weights[name] for name in DOMAINS], PUBLISHED[1][1], atol=1e-3
    )
    assert any("times the largest run" in note for note in found.notes)
    small = {**SIZES, "code": DomainSize(10, 10**6)}
    held = proposal(DMO(), runs_of(), small, 2e7)
    assert held.weights["code"] == pytest.approx(0.2)
    assert held.rules == {"chat": "the optimum of the transfer law",
                          "code": "the limit of epochs",
                          "maths": "the optimum of the transfer law"}  # fmt: skip
    near = proposal(DMO(penalty=100.0), runs_of(), small, 1e5)
    np.testing.assert_allclose(near.weights["code"], 1e6 / (2e9 + 1e6), atol=1e-3)
    alone = proposal(DMO(target={"maths": 1.0}), runs_of(), SIZES, 1e6)
    assert alone.weights["maths"] > 0.99
    full = proposal(DMO(), runs_of(), {n: DomainSize(1, 10) for n in DOMAINS}, 1e6)
    assert any("decide nothing" in note for note in full.notes)


def test_noise_is_told_of():
    runs = runs_of(noise=0.01)
    found = proposal(DMO(), runs, SIZES, 1e6)
    errors = [each["error"] for each in found.report["held_out"].values()]
    assert 0.002 < np.mean(errors) < 0.05


def test_a_law_that_its_runs_do_not_determine_is_named():
    runs = runs_of()
    losses = runs.losses.copy()
    losses[:, 1] = 2 + np.exp(-runs.tokens[:, 1] / 1e5)  # falls faster than any power
    found = proposal(DMO(), replace(runs, losses=losses), SIZES, 1e6)
    assert any("do not determine the law of code:" in note for note in found.notes)
    clear = proposal(DMO(), runs, SIZES, 1e6)
    assert not any("do not determine" in note for note in clear.notes)


def test_results_from_a_file(tmp_path: Path):
    runs = runs_of()
    amounts_table(runs).write_csv(tmp_path / "runs.csv")
    again = read_amounts(tmp_path / "runs.csv")
    assert (again.names, again.domains) == (runs.names, runs.domains)
    np.testing.assert_allclose(again.tokens, runs.tokens)
    np.testing.assert_allclose(again.losses, runs.losses)
    table = pl.read_csv(tmp_path / "runs.csv")
    lost = pl.when(pl.col("run") == 3).then(None).otherwise(pl.col("loss.code")).alias("loss.code")
    table.with_columns(lost).write_csv(tmp_path / "lost.csv")
    fewer = read_amounts(tmp_path / "lost.csv")
    assert "3" not in fewer.names
    assert fewer.notes == (
        f"1 of {len(runs.names)} runs set aside (3): loss.code is no finite number",
    )
    table.drop("loss.code").write_csv(tmp_path / "bad.csv")
    with pytest.raises(InputError, match=r"no column loss\.code"):
        read_amounts(tmp_path / "bad.csv")
    table.drop(pl.selectors.starts_with("tokens.")).write_csv(tmp_path / "none.csv")
    with pytest.raises(InputError, match=r"no column tokens\.DOMAIN"):
        read_amounts(tmp_path / "none.csv")


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match="4 runs are too few"):
        fit(np.ones((4, 2)), np.ones((4, 2)))
    with pytest.raises(InputError, match="no finite number"):
        fit(np.full((9, 2), np.nan), np.ones((9, 2)))
    with pytest.raises(ConfigError, match="'cod'") as caught:
        proposal(DMO(target={"cod": 1.0}), runs_of(), SIZES, 1e6)
    assert "did you mean code" in caught.value.fix
    with pytest.raises(ConfigError, match="nothing of the domain 'cats'"):
        proposal(DMO(), runs_of(), {"cats": SIZES["chat"]}, 1e6)
    with pytest.raises(ConfigError, match="penalty is -1"):
        parse(DMO, {"penalty": -1}, where="mix")
    with pytest.raises(ConfigError, match="max_epochs is 0"):
        parse(DMO, {"max_epochs": 0}, where="mix")
