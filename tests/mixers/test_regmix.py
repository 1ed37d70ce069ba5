"""RegMix: the best mixture of the law that made the losses, its limits, and what it says."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from curate.config import parse
from curate.errors import ConfigError, InputError, MissingDependencyError
from curate.plan.mixture import DomainSize
from mixers import boosted_law
from mixers.laws import Floats, HeldOut
from mixers.mixing_law import MixingLaw
from mixers.mixture_fits import FITS, MANY_RUNS, Told, chosen, fitted
from mixers.mixture_results import Runs, read_runs, runs_table
from mixers.regmix import RegMix, proposal

DOMAINS = ("books", "code", "web")
SIZES = {
    "books": DomainSize(100, 200_000),
    "code": DomainSize(500, 300_000),
    "web": DomainSize(900, 500_000),
}
LAW = MixingLaw(
    np.array([2.0, 1.0, 2.5]),
    np.array([1.0, 1.5, 0.5]),
    np.array([[-2.0, 0.2, 0.1], [0.0, -3.0, 0.0], [0.3, 0.1, -4.0]]),
)


def runs_of(num: int, *, noise: float = 0.0, mixtures: Floats | None = None) -> Runs:
    generator = np.random.default_rng(0)
    if mixtures is None:
        mixtures = np.concatenate([np.eye(3), generator.dirichlet(np.ones(3), num - 3)])
    losses = LAW.losses(mixtures) + noise * generator.standard_normal((num, 3))
    return Runs(tuple(f"r{i}" for i in range(num)), DOMAINS, mixtures, DOMAINS, losses)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch):
    """Without the trees, which take a second."""
    monkeypatch.delitem(FITS, "boosted")


def grid(step: int = 400) -> Floats:
    one, two = np.meshgrid(np.arange(step + 1), np.arange(step + 1))
    units = np.stack([one, two, step - one - two], axis=-1).reshape(-1, 3)
    return units[(units >= 0).all(1)] / step


def best_of(points: Floats, shares: Sequence[float], penalty: float) -> Floats:
    """The lowest grid point, by the formula written out."""
    natural = np.array([0.2, 0.3, 0.5])
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = np.where(points > 0, points * np.log(points / natural), 0).sum(1)
    losses = LAW.floors + LAW.scales * np.exp(points @ LAW.slopes.T)
    return points[(losses @ np.array(shares) + penalty * apart).argmin()]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("penalty", [0.0, 0.05, 0.5])
def test_the_optimum_is_that_of_a_grid_over_the_law_that_made_the_runs(penalty: float):
    settings = RegMix(penalty=penalty, fit="log_linear")
    found = proposal(settings, runs_of(40), SIZES, 1e5)
    weights = np.array([found.weights[name] for name in DOMAINS])
    np.testing.assert_allclose(weights, best_of(grid(), [1 / 3] * 3, penalty), atol=0.004)
    assert found.report["fits"]["log_linear"]["target"]["spearman"] == pytest.approx(1)


@pytest.mark.usefixtures("quick")
def test_limits_of_epochs_hold_and_are_named():
    # Twice the tokens there are, and two and a half epochs: 0.25, 0.375 and 0.625 at most.
    found = proposal(RegMix(max_epochs=2.5, penalty=0.0), runs_of(40), SIZES, 2e6)
    points = grid()
    allowed = points[(points <= np.array([0.25, 0.375, 0.625]) + 1e-12).all(1)]
    expected = best_of(allowed, [1 / 3] * 3, 0.0)
    np.testing.assert_allclose([found.weights[name] for name in DOMAINS], expected, atol=0.004)
    at_limit = [name for name in DOMAINS if "limit of epochs" in found.rules[name]]
    assert at_limit == [
        name for name, share, cap in zip(DOMAINS, expected, [0.25, 0.375, 0.625], strict=True)
        if math.isclose(share, cap, abs_tol=1e-3)
    ]  # fmt: skip
    assert at_limit


@pytest.mark.usefixtures("quick")
def test_one_loss_as_the_target_is_followed_and_said():
    found = proposal(RegMix(target={"code": 1.0}, penalty=0.05), runs_of(40), SIZES, 1e5)
    expected = best_of(grid(), [0, 1, 0], 0.05)
    np.testing.assert_allclose([found.weights[name] for name in DOMAINS], expected, atol=0.004)
    assert any("loss of code alone" in note for note in found.notes)
    assert list(found.report["target"]) == ["code"]


@pytest.mark.usefixtures("quick")
def test_the_mixture_stays_within_the_shares_that_the_runs_had():
    near = np.array([0.2, 0.3, 0.5]) + np.random.default_rng(0).uniform(-0.05, 0.05, (40, 3))
    near /= near.sum(1, keepdims=True)
    found = proposal(RegMix(penalty=0.0), runs_of(40, mixtures=near), SIZES, 1e5)
    weights = np.array([found.weights[name] for name in DOMAINS])
    assert (weights >= near.min(0) - 1e-9).all()
    assert (weights <= near.max(0) + 1e-9).all()
    edge = [
        name
        for name, share, least, most in zip(DOMAINS, weights, near.min(0), near.max(0), strict=True)
        if min(abs(share - most), abs(share - least)) < 1e-6
    ]
    assert edge
    assert any(f"edge of what the runs tried: {', '.join(edge)};" in n for n in found.notes)


@pytest.mark.usefixtures("quick")
def test_more_than_any_run_had_is_not_proposed():
    near = np.array([0.2, 0.3, 0.5]) + np.random.default_rng(0).uniform(-0.05, 0.05, (40, 3))
    near /= near.sum(1, keepdims=True)
    settings = RegMix(penalty=0.0, target={"code": 1.0})
    found = proposal(settings, runs_of(40, mixtures=near), SIZES, 1e5)
    assert found.weights["code"] == pytest.approx(near[:, 1].max())
    assert any("edge of what the runs tried" in note for note in found.notes)


def test_trees_find_most_of_the_gain():
    pytest.importorskip("lightgbm")
    found = proposal(RegMix(fit="boosted", target={"code": 1.0}), runs_of(100), SIZES, 1e5)
    weights = np.array([found.weights[name] for name in DOMAINS])
    best = best_of(grid(), [0, 1, 0], 0.05)
    losses = LAW.losses(np.stack([weights, best, np.array([0.2, 0.3, 0.5])]))[:, 1]
    assert losses[0] - losses[1] < 0.25 * (losses[2] - losses[1])


@pytest.mark.usefixtures("quick")
def test_a_budget_beyond_all_epochs_leaves_the_runs_nothing_to_decide():
    found = proposal(RegMix(max_epochs=2), runs_of(40), SIZES, 1e7)
    assert found.weights == pytest.approx({"books": 0.2, "code": 0.3, "web": 0.5})
    assert any("the runs decide nothing" in note for note in found.notes)


@pytest.mark.usefixtures("quick")
def test_a_domain_that_only_the_runs_have_gets_nothing_and_one_only_the_data_have_is_refused():
    fewer = {name: SIZES[name] for name in ("code", "web")}
    found = proposal(RegMix(), runs_of(40), fewer, 1e5)
    assert list(found.weights) == ["code", "web"]
    assert math.fsum(found.weights.values()) == pytest.approx(1)
    assert any("books" in note and "no training tokens" in note for note in found.notes)
    with pytest.raises(ConfigError, match="say nothing of the domain 'bocks'") as caught:
        proposal(RegMix(), runs_of(40), {"bocks": SIZES["books"]}, 1e5)
    assert caught.value.fix == "did you mean books?"


@pytest.mark.usefixtures("quick")
def test_few_or_noisy_runs_are_told_of():
    few = proposal(RegMix(), runs_of(8), SIZES, 1e5)
    assert any("8 runs are few for 3 domains: 12 are a start" in note for note in few.notes)
    noisy = proposal(RegMix(), runs_of(15, noise=2.0), SIZES, 1e5)
    assert any("order of mixtures is hardly known" in note for note in noisy.notes)
    clear = proposal(RegMix(), runs_of(30), SIZES, 1e5)
    assert not any("hardly known" in note or "are few" in note for note in clear.notes)
    with pytest.raises(InputError, match="5 runs are too few for 3 domains: 6 can be"):
        proposal(RegMix(), runs_of(5), SIZES, 1e5)
    assert proposal(RegMix(), runs_of(6), SIZES, 1e5)


@pytest.mark.usefixtures("quick")
def test_an_error_says_which_loss_set_runs_aside(tmp_path: Path):
    runs = runs_of(24)
    table = runs_table(runs).with_columns(pl.lit(None, pl.Float64).alias("loss.code"))
    table.write_csv(tmp_path / "runs.csv")
    found = read_runs([tmp_path / "runs.csv"])
    with pytest.raises(InputError) as caught:
        proposal(RegMix(), found, SIZES, 1e5)
    assert "24 of 24 runs set aside: loss.code is no finite number" in caught.value.what
    assert "0 runs are too few" in caught.value.what
    assert proposal(RegMix(target={"web": 1.0}), found, SIZES, 1e5)


@pytest.mark.usefixtures("quick")
def test_a_note_says_that_the_penalty_holds_back_from_a_better_uniform_mixture():
    # Of 0.9 natural web, a heavy penalty leaves little way towards the even mixture.
    sizes = {**SIZES, "web": DomainSize(900, 10_000_000)}
    held = proposal(RegMix(penalty=5.0), runs_of(40), sizes, 1e5)
    told = held.report["foretold"]
    assert told["uniform"] < told["mixture"]
    (note,) = [note for note in held.notes if note.startswith("uniform is foretold lower")]
    assert "the penalty keeps the mixture near natural" in note
    assert f"by {told['mixture'] - told['uniform']:.4f}" in note
    free = proposal(RegMix(penalty=0.0), runs_of(40), sizes, 1e5)
    assert not any("is foretold lower" in note for note in free.notes)


@pytest.mark.usefixtures("quick")
def test_a_note_says_that_limits_hold_back_from_a_better_uniform_mixture():
    # A budget of all tokens at 1.05 epochs each: nothing but the natural mixture is allowed.
    sizes = {**SIZES, "web": DomainSize(900, 10_000_000)}
    held = proposal(RegMix(penalty=0.0, max_epochs=1.05), runs_of(40), sizes, 10_500_000)
    (note,) = [note for note in held.notes if note.startswith("uniform is foretold lower")]
    assert "outside of the limits" in note


@pytest.mark.usefixtures("quick")
def test_the_order_of_domains_and_of_runs_changes_nothing():
    runs = runs_of(30)
    first = proposal(RegMix(fit="log_linear"), runs, SIZES, 1e5).weights
    order = [2, 0, 1]
    turned = Runs(
        runs.names, tuple(DOMAINS[i] for i in order), runs.mixtures[:, order],
        tuple(DOMAINS[i] for i in order), runs.losses[:, order],
    )  # fmt: skip
    sizes = {name: SIZES[name] for name in ("web", "code", "books")}
    again = proposal(RegMix(fit="log_linear"), turned, sizes, 1e5).weights
    assert again == pytest.approx(first, abs=1e-5)


def told(target: float) -> Told:
    nothing = np.zeros(1)
    return Told(HeldOut(nothing, nothing, nothing), target, 0.0)


def test_the_usual_fit_is_left_only_for_a_clear_gain():
    close = {"linear": told(0.9), "log_linear": told(0.95), "boosted": told(0.955)}
    assert chosen(close, MANY_RUNS - 1) == "log_linear"
    assert chosen(close, MANY_RUNS) == "boosted"
    assert chosen({**close, "log_linear": told(0.97)}, MANY_RUNS) == "log_linear"
    assert chosen({**close, "linear": told(0.97)}, 20) == "linear"
    assert chosen({**close, "log_linear": told(math.nan)}, 20) == "boosted"
    assert chosen({"linear": told(0.9), "log_linear": told(0.9)}, 500) == "log_linear"


def test_all_fits_are_shown_with_their_errors():
    pytest.importorskip("lightgbm")
    runs = runs_of(30)
    found = fitted(runs.mixtures, runs.losses, np.full(3, 1 / 3))
    assert found.name == "log_linear"
    for name in ("linear", "log_linear", "boosted"):
        assert f"{name} {found.told[name].target:.3f}" in found.notes[0]
    # By hand: the law is linear within a run's fold only where its own fold is left out.
    rows = found.told["linear"].by_loss.foretold
    places = np.random.default_rng(0).permutation(30) % 5
    own = places == 2
    full = np.column_stack([np.ones(30), runs.mixtures])
    solved = np.linalg.lstsq(full[~own], runs.losses[~own])[0]
    np.testing.assert_allclose(rows[own], full[own] @ solved, atol=1e-10)


def test_without_lightgbm_the_others_go_on_unless_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
):
    def missing() -> None:
        raise MissingDependencyError("not there", fix="install it")

    monkeypatch.setattr(boosted_law, "lightgbm", missing)
    found = proposal(RegMix(), runs_of(30), SIZES, 1e5)
    assert any("boosted was not tried" in note for note in found.notes)
    with pytest.raises(MissingDependencyError):
        proposal(RegMix(fit="boosted"), runs_of(30), SIZES, 1e5)


@pytest.mark.usefixtures("quick")
def test_results_in_files_are_enough(tmp_path: Path):
    runs = runs_of(30)
    table = pl.DataFrame({"run": runs.names})
    ratios = table.with_columns(**{name: runs.mixtures[:, at] for at, name in enumerate(DOMAINS)})
    metrics = table.with_columns(
        **{f"{name}_bpb": runs.losses[:, at] for at, name in enumerate(DOMAINS)}
    )
    ratios.write_csv(tmp_path / "ratios.csv")
    metrics.write_csv(tmp_path / "metrics.csv")
    files = [str(tmp_path / name) for name in ("ratios.csv", "metrics.csv")]
    mixer = parse(RegMix, {"results": files, "target": {"code_bpb": 1, "web_bpb": 2}})
    found = proposal(mixer, read_runs([Path(path) for path in mixer.results]), SIZES, 1e5)
    expected = best_of(grid(), [0, 1 / 3, 2 / 3], 0.05)
    np.testing.assert_allclose([found.weights[n] for n in DOMAINS], expected, atol=0.004)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_epochs": 0}, "max_epochs is 0"),
        ({"penalty": -1}, "penalty is -1"),
        ({"target": {"a": -1}}, "below 0"),
        ({"results": ["a", "b", "c"]}, "names 3 files"),
        ({"runs": 3}, "too few for any fit"),
        ({"fit": "cubic"}, "fit"),
    ],
)
def test_wrong_settings_are_refused(values: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        parse(RegMix, values, where="mix")
