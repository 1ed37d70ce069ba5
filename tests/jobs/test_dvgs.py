"""`dvgs` from settings to columns: what it measures, what it refuses, what it keeps."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from gradient_loop import gradient_loop
from killed import curate_command, found, is_killed, run_to_end
from safetensors.torch import load_file
from scipy.stats import rankdata
from tiny_models import save_classifier, save_language_model
from torch import nn
from torch.nn import functional

import curate
from curate.config import parse, plain, to_yaml
from curate.data.layout import RunFolder
from curate.errors import ConfigError, CurateError, InputError, TooManyBadError
from curate.models.mlp import MLP
from jobs.cluster import InlineExecutor, Pool
from jobs.dvgs import passes, slug_of
from jobs.index import index_run
from jobs.score import plan_score, score_run
from jobs.settings import Settings, parse_settings
from scorers.dvgs import DVGS

INLINE = Pool(InlineExecutor(), 1)
TABLES = {"features": "x", "label": "label"}


def frame(count: int, seed: int) -> pl.DataFrame:
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(count, 4)).astype(np.float32)
    return pl.DataFrame({"x": features, "label": (features[:, 0] > 0).astype(np.int64)})


@pytest.fixture(autouse=True)
def inputs(tmp_path: Path) -> None:
    """A pool of 50 rows, a target of 40, and a small network."""
    frame(50, 0).write_parquet(tmp_path / "pool.parquet")
    frame(40, 1).write_parquet(tmp_path / "target.parquet")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        MLP(num_features=4, num_classes=2, hidden=(6,)).save_pretrained(tmp_path / "mlp")


def settings_of(root: Path, run: str = "run", *, more: Any = None, **options: Any) -> Settings:
    values: dict[str, Any] = {
        "run": str(root / run),
        "sources": {"pool": {"path": str(root / "pool.parquet"), **TABLES}},
        "target": {"path": str(root / "target.parquet"), **TABLES},
        "task": {"kind": "tabular-classification", "num_classes": 2},
        "model": {"name": str(root / "mlp"), "device": "cpu"},
        "index": {"held_out": 0.0, "partition_rows": 20},
        "score": {"scorers": [{"dvgs": {"epochs": 3, "lr": 0.05, "batch_size": 20, **options}}]},
        **(more or {}),
    }
    return parse_settings(values)


def scored(settings: Settings) -> pl.DataFrame:
    index_run(settings, pool=INLINE)
    score_run(settings, pool=INLINE)
    return curate.open(settings.run).scores.sort("source", "file", "row").collect()


def tables_of(settings: Settings, seed: int = 0) -> dict[str, bytes]:
    run = RunFolder(Path(settings.run))
    paths = [run.quantities(part, slug_of(seed)).path for part in run.partitions()]
    return {path.name: path.read_bytes() for path in paths}


def by_hand(root: Path, *, epochs: int, lr: float) -> dict[str, list[np.ndarray]]:
    """Similarities (N,) at each step of a training on the whole target, in float64."""
    model = MLP.from_pretrained(root / "mlp").double().eval()
    pool, target = (pl.read_parquet(root / f"{name}.parquet") for name in ("pool", "target"))

    def losses(model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch["x"]), batch["label"], reduction="none")

    def batch_of(table: pl.DataFrame) -> dict[str, torch.Tensor]:
        return {"x": table["x"].to_torch().double(), "label": table["label"].to_torch()}

    adam = torch.optim.Adam(model.parameters(), lr=lr)
    found: dict[str, list[np.ndarray]] = {"cosine": [], "dot": [], "projection": [], "distance": []}
    for _ in range(epochs):
        each = gradient_loop(model, losses, batch_of(pool))
        g = torch.cat([value.flatten(1) for value in each.values()], 1)
        own = gradient_loop(model, losses, batch_of(target))
        t = torch.cat([value.mean(0).flatten() for value in own.values()])
        found["cosine"].append(functional.cosine_similarity(g, t[None]).numpy())
        found["dot"].append((g @ t).numpy())
        found["projection"].append((g @ t / t.norm()).numpy())
        found["distance"].append(-(g - t).norm(dim=1).numpy())
        adam.zero_grad()
        losses(model, batch_of(target)).mean().backward()
        adam.step()
    with torch.no_grad():
        found["target_loss"] = [losses(model, batch_of(pool)).numpy()]
    return found


def test_the_columns_are_those_of_a_plain_loop_in_float64(tmp_path: Path):
    """A loop that shares neither training nor gradients: the whole target is one batch."""
    found = scored(settings_of(tmp_path, epochs=6, batch_size=40))
    for name, steps in by_hand(tmp_path, epochs=6, lr=0.05).items():
        np.testing.assert_allclose(found[f"dvgs_{name}"], np.mean(steps, 0), atol=2e-5)
    assert found["dvgs"].equals(found["dvgs_cosine"].alias("dvgs"))
    assert "num_scored" not in found.columns


def test_ranks_are_taken_in_the_whole_pool_at_each_step(tmp_path: Path):
    options: dict[str, Any] = {"epochs": 4, "batch_size": 40, "similarity": "dot"}
    found = scored(settings_of(tmp_path, aggregate="rank", **options))
    steps = by_hand(tmp_path, epochs=4, lr=0.05)
    ranks = [(rankdata(values) - 0.5) / 50 for values in steps["dot"]]
    np.testing.assert_allclose(found["dvgs"], np.mean(ranks, 0), atol=1e-6)
    np.testing.assert_allclose(found["dvgs_cosine"], np.mean(steps["cosine"], 0), atol=2e-5)


def test_steps_are_weighed_by_the_norm_of_the_target_gradient_on_request(tmp_path: Path):
    found = scored(settings_of(tmp_path, epochs=5, batch_size=40, weight_by_norm=True))
    steps = by_hand(tmp_path, epochs=5, lr=0.05)
    norms = [float(np.nanmedian(d / p)) for d, p in
             zip(steps["dot"], steps["projection"], strict=True)]  # fmt: skip
    wanted = np.average(steps["cosine"], axis=0, weights=norms)
    np.testing.assert_allclose(found["dvgs"], wanted, atol=2e-5)
    assert np.abs(wanted - np.mean(steps["cosine"], 0)).max() > 1e-3


def test_partitions_and_batches_do_not_change_the_values(tmp_path: Path):
    whole = scored(settings_of(tmp_path, "whole", more={"index": {"held_out": 0.0}}))
    more = {"score": {"batch_tokens": 12, "scorers": [{"dvgs": {"epochs": 3, "lr": 0.05,
            "batch_size": 20}}]}}  # fmt: skip
    pieces = scored(settings_of(tmp_path, "pieces", more=more))
    for column in parse(DVGS, {}).columns:
        np.testing.assert_allclose(pieces[column], whole[column], atol=1e-5)


def test_seeds_are_averaged_and_their_spread_is_shown(tmp_path: Path):
    alone = [scored(settings_of(tmp_path, f"seed-{seed}", seeds=[seed])) for seed in (3, 4)]
    both = scored(settings_of(tmp_path, "both", seeds=[3, 4]))
    values = np.stack([table["dvgs"].to_numpy() for table in alone])
    np.testing.assert_allclose(both["dvgs"], values.mean(0), atol=1e-6)
    np.testing.assert_allclose(both["dvgs_std"], values.std(0, ddof=1), atol=1e-6)
    assert (both["dvgs_std"] > 0).any()


def test_a_model_from_scratch_is_drawn_anew_for_each_seed(tmp_path: Path):
    model = {"model": {"config": {"model_type": "mlp", "hidden": [5]}, "device": "cpu"}}
    found = scored(settings_of(tmp_path, more=model, seeds=[0, 1]))
    assert found["dvgs"].null_count() == 0
    first, second = (Path(tmp_path, "run", "dvgs", f"seed-{n}", "steps", "step-000001.safetensors")
                     for n in (0, 1))  # fmt: skip
    assert first.read_bytes() != second.read_bytes()


def test_subsampling_evaluates_fewer_and_stays_near_the_full_average(tmp_path: Path):
    full = scored(settings_of(tmp_path, "full", epochs=20))
    part = scored(settings_of(tmp_path, "part", epochs=20, subsample=4))
    error = (part["dvgs"] - full["dvgs"]).to_numpy()
    assert error.std() > 0
    assert abs(error.mean()) < 4 * error.std() / np.sqrt(50)
    assert np.corrcoef(part["dvgs"], full["dvgs"])[0, 1] > 0.5
    ranked = scored(settings_of(tmp_path, "rank", epochs=20, subsample=4, aggregate="rank"))
    assert ranked["dvgs"].is_between(0, 1).all()


def test_what_is_done_is_not_done_again_and_a_similarity_costs_no_pass(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    settings = settings_of(tmp_path)
    scored(settings)
    before = tables_of(settings)
    again = settings_of(tmp_path, similarity="projection")
    chosen = parse(DVGS, {"epochs": 3, "lr": 0.05, "batch_size": 20, "similarity": "projection"})
    assert all(task.is_done() for task in passes(again, chosen).tasks)
    found = scored(again)
    assert found["dvgs"].equals(found["dvgs_projection"].alias("dvgs"))
    assert tables_of(again) == before
    assert plan_score(again).done == plan_score(again).total
    other = [task.name for task in passes(again, replace(chosen, lr=0.1)).tasks
             if not task.is_done()]  # fmt: skip
    assert len(other) == 1 + 3  # the training and three partitions; the target is as it was


@pytest.mark.parametrize("aggregate", ["mean", "rank"])
def test_the_recorded_steps_may_be_removed_and_come_back_with_new_data(
    tmp_path: Path, aggregate: str
):
    settings = settings_of(tmp_path, aggregate=aggregate)
    first = scored(settings)
    shutil.rmtree(tmp_path / "run" / "dvgs")
    assert scored(settings).equals(first)
    assert not (tmp_path / "run" / "dvgs").exists()
    frame(70, 0).write_parquet(tmp_path / "pool.parquet")
    assert scored(settings)["dvgs"].null_count() == 0
    assert (tmp_path / "run" / "dvgs" / "seed-0" / "done.json").exists()


def test_a_target_that_has_changed_changes_everything(tmp_path: Path):
    settings = settings_of(tmp_path)
    first = scored(settings)
    frame(41, 9).write_parquet(tmp_path / "target.parquet")
    chosen = parse(DVGS, {"epochs": 3, "lr": 0.05, "batch_size": 20})
    assert not any(task.is_done() for task in passes(settings, chosen).tasks)
    assert not scored(settings)["dvgs"].equals(first["dvgs"])


def test_saying_what_is_to_be_done_writes_nothing(tmp_path: Path):
    settings = settings_of(tmp_path, aggregate="rank", seeds=[0, 1])
    index_run(settings, pool=INLINE)
    before = sorted(path.as_posix() for path in tmp_path.rglob("*"))
    state = plan_score(settings)
    assert (state.done, state.total) == (0, 1 + 2 + 6 + 2 + 6 + 3)
    assert sorted(path.as_posix() for path in tmp_path.rglob("*")) == before


def test_a_later_phase_that_is_due_again_gives_the_same_bytes(tmp_path: Path):
    settings = settings_of(tmp_path, aggregate="rank")
    scored(settings)
    before = tables_of(settings)
    part = RunFolder(Path(settings.run)).partitions()[1]
    RunFolder(Path(settings.run)).quantities(part, slug_of(0)).remove()
    score_run(settings, pool=INLINE)
    assert tables_of(settings) == before


def test_without_a_target_there_is_nothing_to_compare_with(tmp_path: Path):
    settings = settings_of(tmp_path, more={"target": None})
    with pytest.raises(ConfigError, match="the settings name none") as caught:
        scored(settings)
    assert "target: {path" in caught.value.fix


def test_without_a_model_there_is_nothing_to_train(tmp_path: Path):
    with pytest.raises(ConfigError, match="trains a model on the target"):
        scored(settings_of(tmp_path, more={"model": {"device": "cpu"}}))


def test_a_target_without_labels_is_refused_with_its_first_row(tmp_path: Path):
    labels = pl.Series("label", [1, 0, None, 1] + [0] * 36)
    frame(40, 1).with_columns(labels).write_parquet(tmp_path / "target.parquet")
    with pytest.raises(
        TooManyBadError, match=r"row 2 of target/target\.parquet.*label is null"
    ) as e:
        scored(settings_of(tmp_path))
    assert "remove these rows from the target" in e.value.fix


def test_a_target_row_that_cannot_be_trained_on_is_refused_by_name(tmp_path: Path):
    features = np.ones((40, 4), dtype=np.float32)
    features[7, 2] = np.nan
    table = pl.DataFrame({"x": features, "label": [0, 1] * 20})
    table.write_parquet(tmp_path / "target.parquet")
    with pytest.raises(CurateError, match=r"(row 7 of target|target\.parquet', 7)"):
        scored(settings_of(tmp_path))


def test_a_target_that_names_no_label_column_is_refused_with_the_right_key(tmp_path: Path):
    target = {"path": str(tmp_path / "target.parquet"), "features": "x"}
    frame(40, 1).drop("label").write_parquet(tmp_path / "target.parquet")
    with pytest.raises(InputError, match="no label column") as caught:
        scored(settings_of(tmp_path, more={"target": target}))
    assert "set target.label" in caught.value.fix


def test_a_target_of_another_width_is_refused(tmp_path: Path):
    wide = pl.DataFrame({"x": np.zeros((40, 5), dtype=np.float32), "label": [0, 1] * 20})
    wide.write_parquet(tmp_path / "target.parquet")
    with pytest.raises(ConfigError, match="the target has 5 features, the pool 4"):
        scored(settings_of(tmp_path))


def test_a_target_that_is_not_there_is_an_input_error(tmp_path: Path):
    (tmp_path / "target.parquet").unlink()
    with pytest.raises(InputError, match="target"):
        scored(settings_of(tmp_path))


def test_a_small_target_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    frame(29, 1).write_parquet(tmp_path / "target.parquet")
    with caplog.at_level(logging.WARNING):
        scored(settings_of(tmp_path))
    assert "the target has 29 examples" in caplog.text


@pytest.mark.parametrize("copies", ["keep", "drop"])
def test_examples_that_stand_in_the_target_are_told_and_dropped_on_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, copies: str
):
    own = frame(50, 0)
    flipped = own[5:8].with_columns(label=1 - pl.col("label"))
    pl.concat([frame(37, 1), flipped]).write_parquet(tmp_path / "target.parquet")
    with caplog.at_level(logging.WARNING):
        found = scored(settings_of(tmp_path, copies=copies))
    assert "3 examples of part-" in caplog.text
    lost = [5, 6, 7] if copies == "drop" else []
    assert found["dvgs"].is_null().arg_true().to_list() == lost
    assert found["dvgs_target_loss"].is_null().arg_true().to_list() == lost


def test_of_a_model_with_an_adapter_only_the_adapter_is_trained_measured_and_kept(tmp_path: Path):
    pytest.importorskip("peft")
    save_language_model(tmp_path / "lm")
    texts(6, 0).write_parquet(tmp_path / "pool.parquet")
    texts(30, 1).write_parquet(tmp_path / "target.parquet")
    more = {
        "sources": {"pool": {"path": str(tmp_path / "pool.parquet"), "text": "text"}},
        "target": {"path": str(tmp_path / "target.parquet"), "text": "text"},
        "task": {"kind": "causal-lm"},
        "model": {"name": str(tmp_path / "lm"), "lora": {"rank": 2}, "device": "cpu"},
    }
    found = scored(settings_of(tmp_path, more=more, epochs=4, batch_size=30))
    assert (found["dvgs"].abs() > 0.01).all()
    steps = sorted((tmp_path / "run" / "dvgs" / "seed-0" / "steps").iterdir())
    assert all("lora_" in key for path in steps for key in load_file(path))


def test_pairs_of_answers_are_compared_with_pairs(tmp_path: Path):
    """A pair whose answers are swapped pulls the other way than the same pair in the target."""
    save_language_model(tmp_path / "lm", num_hidden_layers=1)
    prompts = [f"the cat {row}" for row in range(30)]
    pairs = pl.DataFrame(
        {"prompt": prompts, "chosen": [" in a hat"] * 30, "rejected": [" sat"] * 30}
    )
    pairs.write_parquet(tmp_path / "target.parquet")
    swapped = pairs[:3].rename({"chosen": "rejected", "rejected": "chosen"})
    pl.concat([pairs[3:6], swapped.select(pairs.columns)]).write_parquet(tmp_path / "pool.parquet")
    more = {
        "sources": {"pool": {"path": str(tmp_path / "pool.parquet")}},
        "target": {"path": str(tmp_path / "target.parquet")},
        "task": {"kind": "preference"},
        "model": {"name": str(tmp_path / "lm"), "device": "cpu"},
    }
    found = scored(settings_of(tmp_path, more=more, epochs=2, lr=1e-4, batch_size=30))["dvgs"]
    assert (found[:3] > 0.5).all()
    assert (found[3:] < -0.5).all()


def answers(root: Path, name: str, count: int, *, long: int | None = None) -> dict[str, str]:
    """Prompts and responses; the prompt of row `long` leaves no room for its response."""
    prompts = ["the cat" if row != long else "the cat " * 20 for row in range(count)]
    table = pl.DataFrame({"p": prompts, "r": [f"in a hat {row}" for row in range(count)]})
    table.write_parquet(root / f"{name}.parquet")
    return {"path": str(root / f"{name}.parquet"), "prompt": "p", "response": "r"}


def answering(root: Path, **places: int | None) -> Settings:
    save_language_model(root / "lm", num_hidden_layers=1)
    more = {
        "sources": {"pool": answers(root, "pool", 6, long=places.get("pool"))},
        "target": answers(root, "target", 30, long=places.get("target")),
        "task": {"kind": "causal-lm", "max_tokens": 24},
        "model": {"name": str(root / "lm"), "device": "cpu"},
    }
    return settings_of(root, more=more, epochs=1)


def test_an_example_with_nothing_to_score_is_null(tmp_path: Path):
    found = scored(answering(tmp_path, pool=2))
    for column in parse(DVGS, {}).columns:
        assert found[column].is_null().arg_true().to_list() == [2]


def test_a_target_example_with_nothing_to_train_on_is_refused_by_name(tmp_path: Path):
    with pytest.raises(InputError, match=r"1 target examples .*'target\.parquet', 7\)"):
        scored(answering(tmp_path, target=7))


def test_only_the_named_parameters_are_measured_and_kept(tmp_path: Path):
    from safetensors import safe_open

    found = scored(settings_of(tmp_path, parameters=r"layers\.2"))
    assert found["dvgs"].null_count() == 0
    path = tmp_path / "run" / "dvgs" / "seed-0" / "steps" / "step-000001.safetensors"
    with safe_open(path, framework="pt") as file:
        names = sorted(file.keys())
    assert [n for n in names if n.startswith("gradient.")] == [
        "gradient.layers.2.bias", "gradient.layers.2.weight"]  # fmt: skip
    assert len([n for n in names if n.startswith("weight.")]) == 4


def texts(count: int, seed: int) -> pl.DataFrame:
    words = ["the", "cat", "in", "a", "hat", "then", "sat"]
    generator = np.random.default_rng(seed)
    lines = [" ".join(generator.choice(words, 2 + row % 5)) for row in range(count)]
    return pl.DataFrame({"text": lines, "label": [row % 3 for row in range(count)]})


@pytest.mark.parametrize("kind", ["causal-lm", "text-classification"])
def test_texts_have_the_cosine_of_plain_autograd(tmp_path: Path, kind: str):
    """One step on the whole target: its gradient is the mean over all counted positions."""
    texts(30, 1).write_parquet(tmp_path / "target.parquet")
    texts(6, 0).write_parquet(tmp_path / "pool.parquet")
    task: dict[str, Any] = {"kind": kind}
    source = {"text": "text"}
    if kind == "causal-lm":
        save_language_model(tmp_path / "model", num_hidden_layers=1)
    else:
        save_classifier(tmp_path / "model", num_labels=3, num_hidden_layers=1)
        task, source = task | {"num_classes": 3}, source | {"label": "label"}
    more = {
        "sources": {"pool": {"path": str(tmp_path / "pool.parquet"), **source}},
        "target": {"path": str(tmp_path / "target.parquet"), **source},
        "task": task,
        "model": {"name": str(tmp_path / "model"), "device": "cpu"},
    }
    found = scored(settings_of(tmp_path, more=more, epochs=1, batch_size=30))
    g, t = _text_gradients(tmp_path, kind)
    wanted = functional.cosine_similarity(g, t[None])
    np.testing.assert_allclose(found["dvgs"], wanted, atol=1e-5)
    np.testing.assert_allclose(found["dvgs_dot"], g @ t, rtol=1e-4, atol=1e-5)
    assert found["num_scored"].null_count() == 0


def _text_gradients(root: Path, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, P) of each pool text's mean loss, (P,) of the target's, one text at a time."""
    import transformers

    name = "AutoModelForCausalLM" if kind == "causal-lm" else "AutoModelForSequenceClassification"
    model = getattr(transformers, name).from_pretrained(root / "model").double().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "model")

    def summed(row: dict[str, Any]) -> tuple[torch.Tensor, int]:
        ids = torch.tensor([tokenizer(row["text"])["input_ids"]])
        if kind != "causal-lm":
            return functional.cross_entropy(model(ids).logits, torch.tensor([row["label"]])), 1
        ids = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], 1)
        logits = model(ids).logits[0, :-1]
        return functional.cross_entropy(logits, ids[0, 1:], reduction="sum"), len(logits)

    def gradient(rows: list[dict[str, Any]]) -> torch.Tensor:
        pairs = [summed(row) for row in rows]
        loss = torch.stack([pair[0] for pair in pairs]).sum() / sum(pair[1] for pair in pairs)
        parameters = [p for p in model.parameters() if p.requires_grad]
        grads: Any = torch.autograd.grad(loss, parameters, allow_unused=True)
        return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten()
                          for p, g in zip(parameters, grads, strict=True)])  # fmt: skip

    pool, target = (pl.read_parquet(root / f"{n}.parquet").to_dicts() for n in ("pool", "target"))
    return torch.stack([gradient([row]) for row in pool]), gradient(target)


@pytest.mark.slow
def test_a_run_that_is_killed_and_started_again_gives_the_same_bytes(tmp_path: Path):
    settings = settings_of(tmp_path, "whole", epochs=40, every=1, seeds=[0, 1])
    scored(settings)
    config = tmp_path / "killed.yaml"
    config.write_text(to_yaml(plain(replace(settings, run=str(tmp_path / "killed")))))
    command = curate_command("score", config)
    steps = tmp_path / "killed" / "dvgs" / "seed-0" / "steps"
    assert is_killed(command, lambda: found(steps, "step-*") >= 5)
    assert not (steps.parent / "done.json").exists()
    run_to_end(command)
    whole, killed = (_files(tmp_path / name) for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert [name for name in whole if whole[name] != killed[name]] == []


def _files(run: Path) -> dict[str, bytes]:
    """Tables, weights and gradients; not manifests and marks, which hold times and paths."""
    paths = [*run.glob("quantities/*/*.parquet"), *run.glob("scores/*/*.parquet"),
             *run.glob("dvgs/**/*.safetensors"), *run.glob("dvgs/seed-*/done.json")]  # fmt: skip
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in paths}
