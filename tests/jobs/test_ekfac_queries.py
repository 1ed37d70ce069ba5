"""Influence with EK-FAC through a run folder: dense oracles, sub-tasks, sharing, kills, workers."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from killed import curate_command, found, is_killed, run_to_end
from tiny_models import save_language_model
from torch.nn import functional

from curate.config import to_yaml
from curate.errors import ConfigError, CurateError
from curate.models.mlp import MLP
from jobs import ekfac_queries_work, ekfac_scores_work, ekfac_work, influence_work
from jobs.cluster import Cluster, InlineExecutor, Pool, open_pool
from jobs.index import index_run
from jobs.own_passes import own_passes
from jobs.score import plan_score, score_run
from jobs.score_check import check_scores
from jobs.settings import Settings, parse_settings
from scorers.catalog import build_scorer

INLINE = Pool(InlineExecutor(), 1)
OPTIONS: dict[str, Any] = {
    "metric": "ekfac", "fit_examples": 1000, "fit_tasks": 2, "groups": 2, "top": 5,
}  # fmt: skip
RUN = "influence/ekfac"


def save_mlp(folder: Path, *, hidden: tuple[int, ...] = (8,), draw: int = 1) -> str:
    torch.manual_seed(draw)
    MLP(num_features=4, num_classes=3, hidden=hidden).save_pretrained(folder)
    (folder / "checkpoint.json").write_text('{"seed": 0, "step": 1}')
    return str(folder)


def frame_of(count: int, draw: int) -> pl.DataFrame:
    numbers = np.random.default_rng(draw).normal(size=(count, 4)).astype(np.float32)
    labels = [(i * 7) % 3 for i in range(count)]
    return pl.DataFrame({"x": numbers, "label": labels, "kind": ["ab"[i % 2] for i in labels]})


def values_of(world: Path, options: dict[str, Any], **more: Any) -> dict[str, Any]:
    own = {"features": "x", "label": "label"}
    return {
        "run": str(world / "run"),
        "sources": {"rows": {"path": str(world / "rows.parquet"), **own}},
        "target": {"path": str(world / "target.parquet"), **own},
        "task": {"kind": "tabular-classification", "num_classes": 3},
        "model": {"device": "cpu"},
        "checkpoints": {"paths": [str(world / "model")]},
        "index": {"partition_rows": 20, "held_out": 0.1},
        "score": {"scorers": [{"influence": {**OPTIONS, **options}}], "batch_tokens": 64},
        **more,
    }


def settings_of(world: Path, options: dict[str, Any], **more: Any) -> Settings:
    settings = parse_settings(values_of(world, options, **more))
    index_run(settings, pool=INLINE)
    return settings


@pytest.fixture
def world(tmp_path: Path) -> Path:
    frame_of(60, 0).write_parquet(tmp_path / "rows.parquet")
    frame_of(9, 1).write_parquet(tmp_path / "target.parquet")
    save_mlp(tmp_path / "model")
    return tmp_path


def scored(settings: Settings) -> pl.DataFrame:
    score_run(settings, pool=INLINE)
    return table(settings, "scores/influence")


def table(settings: Settings, folder: str) -> pl.DataFrame:
    paths = sorted((Path(settings.run) / folder).glob("part-*.parquet"))
    return pl.concat([pl.read_parquet(path) for path in paths]).sort("source", "file", "row")


def files(run: Path) -> dict[str, bytes]:
    return {
        path.relative_to(run).as_posix(): path.read_bytes()
        for folder in ("quantities", "scores", "ekfac", "influence")
        for path in sorted((run / folder).rglob("*"))
        if path.is_file() and ".done" not in path.parts
    }


def gradients(folder: Path, frame: pl.DataFrame) -> dict[str, torch.Tensor]:
    """Layer -> (N, O * I) by autograd, one example at a time; the bias is the last column."""
    model = MLP.from_pretrained(folder).double()
    found: dict[str, list[torch.Tensor]] = {}
    for numbers, label in zip(frame["x"].to_numpy(), frame["label"], strict=True):
        model.zero_grad()
        logits = model(torch.tensor(numbers, dtype=torch.float64)[None])
        functional.cross_entropy(logits, torch.tensor([label])).backward()
        own = dict(model.named_parameters())
        for name in {key.rpartition(".")[0] for key in own}:
            weight, bias = own[f"{name}.weight"].grad, own[f"{name}.bias"].grad
            assert weight is not None
            assert bias is not None
            found.setdefault(name, []).append(torch.cat([weight, bias[:, None]], 1).flatten())
    return {name: torch.stack(own) for name, own in found.items()}


def by_files(world: Path) -> np.ndarray:
    """(60, 9) g_q^T H^-1 g_i with the curvature that lies in the run, as dense matrices."""
    curvatures: dict[str, Any] = {}
    for group in range(2):
        curvatures |= ekfac_work.load_curvature(world / "run/ekfac/model", group)
    pool = gradients(world / "model", frame_of(60, 0))
    target = gradients(world / "model", frame_of(9, 1))
    total = np.zeros((60, 9))
    for name, one in curvatures.items():
        turn = torch.kron(one.left, one.right).double()
        inverse = turn @ torch.diag(one.damped.double().flatten().reciprocal()) @ turn.T
        total += (pool[name] @ inverse @ target[name].T).numpy()
    return total


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_it_is_the_product_with_the_dense_inverse_of_what_was_fitted(world: Path, reduction: str):
    found = scored(settings_of(world, {"reduction": reduction}))
    wanted = by_files(world).mean(1)
    np.testing.assert_allclose(found["influence"], wanted, rtol=2e-4, atol=2e-5)
    assert found["influence_loss"].min() > 0  # pyright: ignore[reportOperatorIssue]


def test_a_softmax_layer_has_the_influence_under_its_exact_fisher_matrix(tmp_path: Path):
    """With equal logits S is the same for all inputs: the Fisher matrix is S (x) A, so is EK-FAC's.

    Every input has every class once, so that the labels of the data set, as expectation over the
    classes, give the exact matrix.
    """
    inputs = np.repeat(np.eye(4, dtype=np.float32), 3, axis=0)
    frame = pl.DataFrame({"x": inputs, "label": [0, 1, 2] * 4})
    frame.write_parquet(tmp_path / "rows.parquet")
    frame[[0, 4, 11]].write_parquet(tmp_path / "target.parquet")
    model = MLP(num_features=4, num_classes=3, hidden=())
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    model.save_pretrained(tmp_path / "model")
    settings = settings_of(
        tmp_path, {"labels": "dataset", "groups": 1},
        index={"partition_rows": 5, "held_out": 0.0},
    )  # fmt: skip
    score_run(settings, pool=INLINE)
    share = np.full(3, 1 / 3)
    outer = np.diag(share) - np.outer(share, share)
    rows = np.hstack([inputs, np.ones((12, 1))])
    fisher = np.mean([np.kron(outer, np.outer(row, row)) for row in rows], 0)
    damping = 0.1 * fisher.trace() / len(fisher)
    errors = np.eye(3)[frame["label"].to_numpy()]
    grads = np.stack([np.kron(share - e, row) for e, row in zip(errors, rows, strict=True)])
    solved = np.linalg.solve(fisher + damping * np.eye(len(fisher)), grads[[0, 4, 11]].mean(0))
    folder = "scores/influence"
    np.testing.assert_allclose(
        table(settings, folder)["influence"], grads @ solved, rtol=1e-4, atol=1e-6
    )


def test_sub_tasks_have_their_means_and_the_lists_their_ends(world: Path):
    settings = settings_of(world, {"tasks": "kind", "aggregate": "max", "matrix": True})
    found = scored(settings)
    dense = by_files(world)
    kinds = np.array(frame_of(9, 1)["kind"].to_list())
    means = np.stack([dense[:, kinds == kind].mean(1) for kind in "ab"], 1)
    np.testing.assert_allclose(found["influence"], means.max(1), rtol=2e-4, atol=2e-5)
    run = world / "run"
    matrix = table(settings, f"{RUN}/matrix").select(pl.col("^target-.*$")).to_numpy()
    np.testing.assert_allclose(matrix, dense, rtol=1e-3, atol=1e-4)
    top = pl.read_parquet(run / RUN / "top.parquet")
    train = table(settings, "examples").filter(split="train")["row"].to_list()
    for number, kind in enumerate("ab"):
        for sign in (1, -1):
            wanted = sorted(train, key=lambda row: -sign * means[row, number])[:5]
            own = top.filter(task=kind, sign=sign).sort("rank")
            assert own["row"].to_list() == wanted
            np.testing.assert_allclose(own["score"], means[wanted, number], rtol=1e-3, atol=1e-4)


def test_a_low_rank_is_recorded_and_warned_of(world: Path, caplog: pytest.LogCaptureFixture):
    settings = settings_of(world, {"rank": 1})
    found = scored(settings)
    for group in range(2):
        path = world / "run" / RUN / "queries/.done" / f"model-{group:03d}.safetensors.json"
        assert 0 < json.loads(path.read_text())["kept"] < 1
    both = np.corrcoef(found["influence"].to_numpy(), by_files(world).mean(1))[0, 1]
    assert both > 0.5
    caplog.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ekfac_queries_work, "FEW_KEPT", 1.0)
        scored(settings_of(world, {"rank": 1}, run=str(world / "other")))
    assert "raise influence.rank" in caplog.text


def test_a_fit_of_self_influence_is_taken_and_not_made_again(world: Path):
    alike = {name: OPTIONS[name] for name in ("metric", "fit_examples", "fit_tasks", "groups")}
    both = {"scorers": [{"self_influence": alike}, {"influence": OPTIONS}], "batch_tokens": 64}
    alone = {"scorers": [{"self_influence": alike}], "batch_tokens": 64}
    settings = settings_of(world, {}, score=alone)
    score_run(settings, pool=INLINE)
    before = {p: p.stat().st_mtime_ns for p in (world / "run/ekfac").rglob("*.safetensors")}
    settings = settings_of(world, {}, score=both)
    score_run(settings, pool=INLINE)
    assert before == {p: p.stat().st_mtime_ns for p in (world / "run/ekfac").rglob("*.safetensors")}
    assert plan_score(settings).done == plan_score(settings).total


def test_two_fits_of_one_checkpoint_are_refused(world: Path):
    other = {"metric": "ekfac", "fit_examples": 30, "fit_tasks": 2, "groups": 2}
    both = {"scorers": [{"self_influence": other}, {"influence": OPTIONS}]}
    with pytest.raises(ConfigError, match="fit_examples is 1000 in the one and 30 in the other"):
        check_scores(settings_of(world, {}, score=both))


def test_once_scored_the_fit_and_the_queries_may_be_removed(world: Path):
    settings = settings_of(world, {})
    score_run(settings, pool=INLINE)
    for folder in ("ekfac", f"{RUN}/queries", f"{RUN}/scores"):
        shutil.rmtree(world / "run" / folder)
    assert plan_score(settings).done == plan_score(settings).total
    scorer = build_scorer("influence", OPTIONS)
    names = [phase.name for phase in own_passes(settings, "influence", scorer).phases]
    assert names == ["influence: scores", "influence: lists"]


PHASES = [
    (ekfac_queries_work, "queries_work"),
    (ekfac_scores_work, "raw_work"),
    (ekfac_scores_work, "table_work"),
    (influence_work, "top_work"),
    (ekfac_scores_work, "matrix_work"),
]


@pytest.mark.parametrize(("module", "name"), PHASES)
def test_stopped_in_any_phase_it_goes_on_and_writes_the_same_bytes(
    world: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
):
    whole = settings_of(world, {"matrix": True}, run=str(world / "whole"))
    score_run(whole, pool=INLINE)
    settings = settings_of(world, {"matrix": True})
    original, calls = getattr(module, name), [0]

    def stops(payload: dict[str, Any]) -> Any:
        calls[0] += 1
        if calls[0] == 2 or name == "top_work":
            raise CurateError("the power went", fix="run it again")
        return original(payload)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, stops)
        with pytest.raises(CurateError, match="the power went"):
            score_run(settings, pool=INLINE)
    assert 0 < plan_score(settings).done < plan_score(settings).total
    score_run(settings, pool=INLINE)
    assert files(world / "run") == files(world / "whole")


def test_a_list_that_was_removed_is_made_again(world: Path):
    settings = settings_of(world, {})
    score_run(settings, pool=INLINE)
    before = files(world / "run")
    for path in (world / "run" / RUN).rglob("*.parquet"):
        path.unlink()
    score_run(settings, pool=INLINE)
    assert files(world / "run") == before


def test_embeddings_are_refused(world: Path):
    settings = settings_of(world, {"embedding": True})
    with pytest.raises(ConfigError, match="no curvature of an embedding"):
        check_scores(settings)


def test_texts_partitions_and_batches_do_not_matter(tmp_path: Path):
    words = ["the", "cat", "in", "a", "hat", "then", "sat", "there", "until", "dawn"]
    texts = [" ".join(words[(i * k) % 10] for k in range(1, 2 + i % 11)) for i in range(20)]
    pl.DataFrame({"text": [*texts, None]}).write_parquet(tmp_path / "rows.parquet")
    pl.DataFrame({"text": [*texts[3:8], "x " * 200]}).write_parquet(tmp_path / "target.parquet")
    save_language_model(tmp_path / "lm")
    found: list[pl.DataFrame] = []
    for number, (size, budget) in enumerate([(50, 4096), (7, 1)]):
        settings = settings_of(
            tmp_path,
            {},
            run=str(tmp_path / f"run-{number}"),
            sources={"rows": {"path": str(tmp_path / "rows.parquet"), "text": "text"}},
            target={"path": str(tmp_path / "target.parquet"), "text": "text"},
            task={"kind": "causal-lm", "max_tokens": 64},
            checkpoints={"paths": [str(tmp_path / "lm")]},
            index={"partition_rows": size, "held_out": 0.0, "max_bad_rows": 0.5},
            score={"scorers": [{"influence": OPTIONS}], "batch_tokens": budget},
        )
        found.append(scored(settings))
    first, second = (one["influence"].to_numpy() for one in found)
    np.testing.assert_allclose(second, first, rtol=5e-3, atol=1e-3 * np.abs(first).max())
    assert (found[0]["num_scored"] >= 1).all()


@pytest.mark.slow
def test_two_workers_write_the_same_bytes(world: Path):
    inline = settings_of(world, {"matrix": True}, run=str(world / "inline"))
    score_run(inline, pool=INLINE)
    settings = settings_of(world, {"matrix": True})
    with open_pool(Cluster(kind="local", workers=2)) as pool:
        score_run(settings, pool=pool)
    assert files(world / "run") == files(world / "inline")


@pytest.mark.slow
def test_killed_from_the_command_line_it_goes_on_and_writes_the_same_bytes(world: Path):
    def command(run: str) -> list[str]:
        config = world / f"{run}.yaml"
        values = values_of(world, {"matrix": True}, run=str(world / run))
        config.write_text(to_yaml(values))
        return curate_command("score", config)

    run_to_end(command("whole"))
    folder = world / "run"
    for here in ("queries/*", "scores/*/*", "top/*", "matrix/*"):
        pattern = f"{RUN}/{here}"
        assert is_killed(command("run"), lambda pattern=pattern: found(folder, pattern) > 0)
    run_to_end(command("run"))
    assert files(folder) == files(world / "whole")
