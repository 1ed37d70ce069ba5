"""Self-influence through a run folder: the definition, EK-FAC's phases, what is redone, kills."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from killed import curate_command, found, is_killed, run_to_end
from tiny_models import save_language_model
from torch.nn import functional

from curate.errors import CurateError
from curate.models.mlp import MLP
from jobs import ekfac_work, self_influence_work
from jobs.cluster import Cluster, InlineExecutor, Pool, open_pool
from jobs.index import index_run
from jobs.own_passes import own_passes
from jobs.score import plan_score, score_run
from jobs.settings import Settings, parse_settings
from jobs.train import train_run
from scorers.catalog import build_scorer

INLINE = Pool(InlineExecutor(), 1)
ROOT = Path(__file__).parents[2]
EKFAC = {"metric": "ekfac", "fit_examples": 1000, "fit_tasks": 2, "groups": 2}
WORDS = ["the", "cat", "in", "a", "hat", "then", "sat", "there", "until", "dawn"]


def save_mlp(folder: Path, *, draw: int, seed: int = 0, lr: float | None = None) -> str:
    torch.manual_seed(draw)
    MLP(num_features=4, num_classes=3, hidden=(8,)).save_pretrained(folder)
    more = "" if lr is None else f', "lr": {lr}'
    (folder / "checkpoint.json").write_text(f'{{"seed": {seed}, "step": {draw}{more}}}')
    return str(folder)


def rows(count: int = 60) -> pl.DataFrame:
    numbers = np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32)
    return pl.DataFrame({"x": numbers, "label": [i % 3 for i in range(count)]})


def values_of(world: Path, options: Any, paths: list[str], **more: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "run": str(world / "run"),
        "sources": {
            "rows": {"path": str(world / "rows.parquet"), "features": "x", "label": "label"}
        },
        "task": {"kind": "tabular-classification", "num_classes": 3},
        "model": {"device": "cpu"},
        "checkpoints": {"paths": paths},
        "index": {"partition_rows": 20, "held_out": 0.0},
        "score": {"scorers": [{"self_influence": options}], "batch_tokens": 64},
    }
    return {**values, **more}


@pytest.fixture
def world(tmp_path: Path) -> Path:
    rows().write_parquet(tmp_path / "rows.parquet")
    save_mlp(tmp_path / "step-1", draw=1, lr=0.4)
    save_mlp(tmp_path / "step-2", draw=2, lr=0.2)
    return tmp_path


def paths_of(world: Path) -> list[str]:
    return [str(path) for path in sorted(world.glob("step-*"))]


def settings_of(world: Path, options: Any, **more: Any) -> Settings:
    settings = parse_settings(values_of(world, options, paths_of(world), **more))
    index_run(settings, pool=INLINE)
    return settings


def scored(settings: Settings) -> pl.DataFrame:
    score_run(settings, pool=INLINE)
    return table(settings, "scores/self_influence")


def table(settings: Settings, folder: str) -> pl.DataFrame:
    paths = sorted((Path(settings.run) / folder).glob("*.parquet"))
    return pl.concat([pl.read_parquet(path) for path in paths]).sort("source", "file", "row")


def files(run: Path) -> dict[str, bytes]:
    return {
        path.relative_to(run).as_posix(): path.read_bytes()
        for folder in ("quantities", "scores", "ekfac", "self-influence")
        for path in sorted((run / folder).rglob("*"))
        if path.is_file() and ".done" not in path.parts
    }


def gradients(folder: Path, frame: pl.DataFrame) -> list[dict[str, torch.Tensor]]:
    model = MLP.from_pretrained(folder).double()
    found: list[dict[str, torch.Tensor]] = []
    pairs = zip(frame["x"].to_numpy(), frame["label"], strict=True)
    for numbers, label in pairs:
        model.zero_grad()
        logits = model(torch.tensor(numbers, dtype=torch.float64)[None])
        functional.cross_entropy(logits, torch.tensor([label])).backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append(grads)
    return found


def test_identity_adds_up_the_checkpoints_by_their_learning_rates(world: Path):
    found = scored(settings_of(world, {}))
    squares = [
        [float(sum(g.square().sum() for g in one.values())) for one in gradients(world / s, rows())]
        for s in ("step-1", "step-2")
    ]
    wanted = 0.4 * np.array(squares[0]) + 0.3 * np.array(squares[1])
    np.testing.assert_allclose(found["self_influence"], wanted, rtol=1e-5)
    rest = np.log(wanted) - np.log(wanted).mean()
    np.testing.assert_allclose(found["self_influence_residual"], rest, atol=1e-5)
    assert (found["self_influence_loss"] > 0).all()


def test_ekfac_is_the_product_with_the_damped_inverse_that_lies_in_the_run(world: Path):
    settings = settings_of(world, EKFAC)
    found = scored(settings)
    curvatures: dict[str, Any] = {}
    for group in range(2):
        curvatures |= ekfac_work.load_curvature(world / "run/ekfac/step-2", group)
    assert set(curvatures) == {"layers.0", "layers.2"}
    wanted = np.zeros(60)
    for name, one in curvatures.items():
        matrix = torch.kron(one.left, one.right).double()
        for i, grads in enumerate(gradients(world / "step-2", rows())):
            both = torch.cat([grads[f"{name}.weight"], grads[f"{name}.bias"][:, None]], 1)
            within = matrix.T @ both.flatten()
            wanted[i] += float((within.square() / one.damped.double().flatten()).sum())
    np.testing.assert_allclose(found["self_influence"], wanted, rtol=1e-4)
    # The exact Fisher matrix of a softmax, in the same axes, and its damping.
    (name,) = ["layers.2"]
    one = curvatures[name]
    model = MLP.from_pretrained(world / "step-2").double()
    given = torch.tensor(rows()["x"].to_numpy()).double()
    hidden = torch.relu(model.layers[0](given))
    inner = torch.cat([hidden, torch.ones(60, 1).double()], 1).detach()
    share = model(given).softmax(1).detach()
    outer = torch.diag_embed(share) - share[:, :, None] * share[:, None, :]
    right = (inner @ one.right.double()).square()  # (60, I)
    left = torch.einsum("oa,boc,ca->ba", one.left.double(), outer, one.left.double())
    exact = torch.einsum("bo,bi->oi", left, right) / 60
    exact = exact + 0.1 * exact.mean()
    assert float((one.damped - exact).norm() / exact.norm()) < 0.35  # one draw for each label
    assert float(one.damped.mean() / exact.mean()) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("options", [{}, EKFAC])
def test_texts_partitions_and_batches_do_not_matter(tmp_path: Path, options: dict[str, Any]):
    texts = [" ".join(WORDS[(i * k) % 10] for k in range(1, 2 + i % 11)) for i in range(20)]
    pl.DataFrame({"text": [*texts, None]}).write_parquet(tmp_path / "rows.parquet")
    path = str(save_language_model(tmp_path / "lm"))
    more: dict[str, Any] = {
        "sources": {"rows": {"path": str(tmp_path / "rows.parquet"), "text": "text"}},
        "task": {"kind": "causal-lm", "max_tokens": 64},
    }
    found: list[pl.DataFrame] = []
    for number, (size, budget) in enumerate([(50, 4096), (7, 1)]):
        own = {
            "run": str(tmp_path / f"run-{number}"),
            "index": {"partition_rows": size, "held_out": 0.0, "max_bad_rows": 0.5},
            "score": {"scorers": [{"self_influence": options}], "batch_tokens": budget},
        }
        settings = parse_settings(values_of(tmp_path, options, [path], **more, **own))
        index_run(settings, pool=INLINE)
        found.append(scored(settings))
    for name in ("self_influence", "self_influence_residual", "self_influence_loss"):
        np.testing.assert_allclose(found[1][name], found[0][name], rtol=2e-3, atol=2e-4)
    assert (found[0]["num_scored"] >= 1).all()


def test_the_sum_is_the_mean_times_the_squared_length(tmp_path: Path):
    texts = [" ".join(WORDS[(i * k) % 10] for k in range(1, 2 + i % 11)) for i in range(12)]
    pl.DataFrame({"text": texts}).write_parquet(tmp_path / "rows.parquet")
    path = str(save_language_model(tmp_path / "lm"))
    more = {
        "sources": {"rows": {"path": str(tmp_path / "rows.parquet"), "text": "text"}},
        "task": {"kind": "causal-lm", "max_tokens": 64},
    }
    found: dict[str, pl.DataFrame] = {}
    for reduction in ("mean", "sum"):
        options = {"reduction": reduction}
        settings = parse_settings(values_of(tmp_path, options, [path], **more))
        index_run(settings, pool=INLINE)
        found[reduction] = scored(settings)
    counts = found["sum"]["num_scored"].to_numpy().astype(np.float64)
    wanted = found["mean"]["self_influence"].to_numpy() * counts**2
    np.testing.assert_allclose(found["sum"]["self_influence"], wanted, rtol=1e-5)
    np.testing.assert_allclose(
        found["sum"]["self_influence_residual"], found["mean"]["self_influence_residual"], atol=1e-4
    )


PHASES = [
    (ekfac_work, "factors_work"),
    (ekfac_work, "bases_work"),
    (ekfac_work, "eigenvalues_work"),
    (ekfac_work, "curvature_work"),
    (self_influence_work, "raw_work"),
    (self_influence_work, "line_work"),
    (self_influence_work, "table_work"),
]


@pytest.mark.parametrize(("module", "name"), PHASES)
def test_stopped_in_any_phase_it_goes_on_and_writes_the_same_bytes(
    world: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
):
    whole = settings_of(world, EKFAC, run=str(world / "whole"))
    score_run(whole, pool=INLINE)
    settings = settings_of(world, EKFAC)
    original, calls = getattr(module, name), [0]

    def stops(payload: dict[str, Any]) -> Any:
        calls[0] += 1
        if calls[0] == 2 or name == "line_work":
            raise CurateError("the power went", fix="run it again")
        return original(payload)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, stops)
        with pytest.raises(CurateError, match="the power went"):
            score_run(settings, pool=INLINE)
    left = plan_score(settings)
    assert left.done > 0 or name == "factors_work"
    assert left.done < left.total
    score_run(settings, pool=INLINE)
    assert files(world / "run") == files(world / "whole")


def test_what_was_fitted_may_be_removed_and_a_changed_damping_redoes_the_end_alone(world: Path):
    settings = settings_of(world, EKFAC)
    score_run(settings, pool=INLINE)
    assert plan_score(settings).done == plan_score(settings).total
    more = settings_of(world, {**EKFAC, "damping": 0.5})
    scorer = build_scorer("self_influence", {**EKFAC, "damping": 0.5})
    due = {
        phase.name.split(": ")[1].split(" of ")[0]: sum(not t.is_done() for t in phase.tasks)
        for phase in own_passes(more, "self_influence", scorer).phases
    }
    assert due == {
        "factors": 0, "bases": 0, "eigenvalues": 0, "curvature": 2,
        "measuring": 3, "lengths": 1, "tables": 3,
    }  # fmt: skip
    for path in (world / "run/ekfac").rglob("*.safetensors"):
        if not path.name.startswith("curvature"):
            path.unlink()
    assert plan_score(settings).done == plan_score(settings).total


def test_more_groups_than_layers_are_refused_with_their_number(world: Path):
    with pytest.raises(CurateError, match="has 2 layers to divide"):
        scored(settings_of(world, {**EKFAC, "groups": 3}))


@pytest.mark.slow
def test_wrong_labels_have_the_highest_values(tmp_path: Path):
    draw = np.random.default_rng(0)
    labels = np.arange(400) % 2
    numbers = draw.normal(size=(400, 4)) + 2.5 * labels[:, None] * np.array([1, 1, 0, 0])
    wrong = draw.random(400) < 0.05
    frame = pl.DataFrame(
        {"x": numbers.astype(np.float32), "label": np.where(wrong, 1 - labels, labels)}
    )
    frame.write_parquet(tmp_path / "rows.parquet")
    train = {"epochs": 8, "seeds": [0], "lr": 0.05, "batch_tokens": 20, "save_every_epochs": 4}
    for name, options in {"identity": {}, "ekfac": {"metric": "ekfac"}}.items():
        values = values_of(tmp_path, options, [], run=str(tmp_path / name))
        values |= {
            "task": {"kind": "tabular-classification", "num_classes": 2},
            "model": {"device": "cpu", "config": {"model_type": "mlp", "hidden": []}},
            "checkpoints": {"train": train},
        }
        settings = parse_settings(values)
        index_run(settings, pool=INLINE)
        train_run(settings, pool=INLINE)
        found = scored(settings)["self_influence"].to_numpy()
        above = (found[wrong][:, None] > found[~wrong][None]).mean()
        assert above > 0.95, name


@pytest.mark.slow
def test_two_workers_write_the_same_bytes(world: Path):
    inline = settings_of(world, EKFAC, run=str(world / "inline"))
    score_run(inline, pool=INLINE)
    settings = settings_of(world, EKFAC)
    with open_pool(Cluster(kind="local", workers=2)) as pool:
        score_run(settings, pool=pool)
    assert files(world / "run") == files(world / "inline")


def command(world: Path, run: str) -> list[str]:
    """`curate score` as a user types it."""
    values = values_of(world, EKFAC, paths_of(world), run=str(world / run))
    values["index"] = {"partition_rows": 20, "held_out": 0.0}
    config = world / f"{run}.yaml"
    config.write_text(yaml.safe_dump(values))
    return curate_command("score", config, "--json")


@pytest.mark.slow
def test_killed_from_the_command_line_it_goes_on_and_writes_the_same_bytes(world: Path):
    run_to_end(command(world, "whole"))
    folder = world / "run"
    for pattern in ("factors-*", "bases-*", "eigenvalues-*", "curvature-*"):
        here = f"ekfac/*/{pattern}"
        assert is_killed(command(world, "run"), lambda here=here: found(folder, here) > 0)
    run_to_end(command(world, "run"))
    assert files(folder) == files(world / "whole")
