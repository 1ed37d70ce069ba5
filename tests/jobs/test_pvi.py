"""PVI through a run: folds, models that did not see what they judge, kills, what is refused."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from killed import curate_command, found, is_killed
from tiny_models import byte_tokenizer, save_classifier, save_language_model
from torch.nn import functional

from curate.config import plain
from curate.data.files import read_json
from curate.data.layout import RunFolder
from curate.errors import ConfigError
from curate.models.mlp import MLP
from curate.models.settings import CausalLM
from curate.models.tasks import build_task
from curate.models.without_input import WithoutInput, blanked, nothing
from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.pvi_work import done_output, lengths_output
from jobs.score import plan_score, score_run
from jobs.settings import Settings, parse_settings

INLINE = Pool(InlineExecutor(), 1)


def write_blobs(folder: Path, rows: int = 180) -> np.ndarray:
    """Three well separated classes with priors 1/2, 1/3, 1/6; which rows have a wrong label."""
    draw = np.random.default_rng(0)
    labels = np.array([0, 0, 0, 1, 1, 2] * (rows // 6))
    centres = np.array([[4.0, 0, 0], [0, 4, 0], [0, 0, 4]])
    values = (centres[labels] + draw.normal(size=(rows, 3))).astype(np.float32)
    wrong = draw.random(rows) < 0.1
    shown = np.where(wrong, (labels + 1) % 3, labels)
    table = pl.DataFrame({"x": values, "label": shown})
    table.write_parquet(folder / "blobs.parquet")
    return wrong


def settings_of(folder: Path, *, run: str = "run", **more: Any) -> Settings:
    values: dict[str, Any] = {
        "run": str(folder / run),
        "sources": {"blobs": {"path": str(folder / "blobs.parquet"), "features": "x"}},
        "index": {"partition_rows": 70, "held_out": 0.2},
        "task": {"kind": "tabular-classification", "num_classes": 3},
        "model": {"config": {"model_type": "mlp", "hidden": [16]}, "device": "cpu"},
        "checkpoints": {"train": {"epochs": 4, "lr": 0.03, "batch_tokens": 16, "seeds": [0, 1]}},
        "score": {"scorers": [{"pvi": {"folds": 3}}]},
    }
    return parse_settings(values | more)


def scored(settings: Settings) -> pl.DataFrame:
    index_run(settings, pool=INLINE)
    score_run(settings, pool=INLINE)
    return scores_of(settings)


def scores_of(settings: Settings) -> pl.DataFrame:
    run = RunFolder(Path(settings.run))
    return pl.concat([pl.read_parquet(run.scores(part, "pvi").path) for part in run.partitions()])


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, Settings]:
    folder = tmp_path_factory.mktemp("blobs")
    wrong = write_blobs(folder)
    settings = settings_of(folder)
    scored(settings)
    return folder, wrong, settings


World = tuple[Path, np.ndarray, Settings]


def test_wrong_labels_mislead_and_right_ones_are_bounded_by_their_prior(blobs: World):
    folder, wrong, settings = blobs
    found = scores_of(settings)
    assert found.columns == ["source", "file", "row", "pvi", "pvi_std"]
    pvi = found["pvi"].to_numpy()
    assert np.isfinite(pvi).all()
    assert np.mean(pvi[wrong] < 0) > 0.8
    assert np.mean(pvi[~wrong] > 0) > 0.9
    labels = pl.read_parquet(folder / "blobs.parquet")["label"].to_numpy()
    for label in range(3):
        bound = -math.log2(np.mean(labels == label))
        assert pvi[labels == label].max() < bound + 0.5
    assert found["pvi_std"].is_not_null().all()


def test_each_example_is_judged_by_the_model_that_did_not_see_it(blobs: World):
    """Both surprises again, from the saved models by plain torch."""
    folder, _, settings = blobs
    run = RunFolder(Path(settings.run))
    data = pl.read_parquet(folder / "blobs.parquet")
    splits: list[str] = []
    for part in run.partitions():
        folds = pl.read_parquet(lengths_output(run, part).path)
        table = pl.read_parquet(run.quantities(part, "pvi-seed-1").path)
        examples = pl.read_parquet(run.examples(part).path)
        splits += examples["split"].to_list()
        assert ((folds["num_tokens"] > 0) == (examples["split"] == "train")).all()
        for row, fold, given, null in zip(
            table["row"], folds["fold"], table["given_bits"], table["null_bits"], strict=True
        ):
            x, label = torch.tensor([data["x"].to_list()[row]]), torch.tensor([data["label"][row]])
            for model, inputs, bits in ((f"fold-{fold}", x, given), ("null", x * 0, null)):
                done = read_json(done_output(run, model, 1).path) or {}
                network = MLP.from_pretrained(run.root / "pvi" / model / done["checkpoint"]["name"])
                with torch.no_grad():
                    wanted = functional.cross_entropy(network(inputs), label) / math.log(2)
                assert bits == pytest.approx(float(wanted), rel=1e-4, abs=1e-5)
    assert 20 < splits.count("held_out") < 60
    all_folds = {
        fold
        for part in run.partitions()
        for fold in pl.read_parquet(lengths_output(run, part).path)["fold"]
    }
    assert all_folds == {0, 1, 2}


def test_labels_that_were_drawn_at_random_are_not_learnt_by_heart(tmp_path: Path):
    """A model that saw them would find them all easy."""
    draw = np.random.default_rng(3)
    values = draw.normal(size=(90, 8)).astype(np.float32)
    labels = draw.integers(2, size=90)
    pl.DataFrame({"x": values, "label": labels}).write_parquet(tmp_path / "blobs.parquet")
    settings = settings_of(
        tmp_path,
        task={"kind": "tabular-classification", "num_classes": 2},
        model={"config": {"model_type": "mlp", "hidden": [64]}, "device": "cpu"},
        checkpoints={"train": {"epochs": 25, "lr": 0.03, "batch_tokens": 32}},
        score={"scorers": [{"pvi": {"folds": 2, "stop": "last"}}]},
    )
    scored(settings)
    run = RunFolder(Path(settings.run))
    (part,) = run.partitions()[:1]
    table = pl.read_parquet(run.scores(part, "pvi").path)
    examples = pl.read_parquet(run.examples(part).path)
    seen = table.filter(examples["split"] == "train")["pvi"].to_numpy()
    assert seen.mean() < 0
    assert np.mean(seen > 0) < 0.7


def test_the_model_without_input_knows_the_spread_of_the_labels(blobs: World):
    _, _, settings = blobs
    run = RunFolder(Path(settings.run))
    for part in run.partitions():
        table = pl.read_parquet(run.quantities(part, "pvi-seed-0").path)
        labels = pl.read_parquet(run.examples(part).path)["label"]
        surprise = (
            table.with_columns(labels).group_by("label").agg(pl.col("null_bits").round(4).unique())
        )
        for label, bits in surprise.iter_rows():
            assert len(bits) == 1  # it depends on the label alone
            assert bits[0] == pytest.approx([1.0, math.log2(3), math.log2(6)][label], abs=0.6)


def test_a_second_run_does_nothing_and_another_setting_redoes_what_depends_on_it(blobs: World):
    folder, _, settings = blobs
    state = plan_score(settings)
    lengths, trainings, measurings, joined, columns = 3, 2 * 4, 2 * 4 * 3, 2 * 3, 3
    total = lengths + trainings + measurings + joined + columns
    assert state.done == state.total == total
    assert score_run(settings, pool=INLINE)["done"] == 0
    others = settings_of(folder, score={"scorers": [{"pvi": {"folds": 3, "stop": "last"}}]})
    due = plan_score(others)
    assert due.total - due.done == total - lengths  # the folds stay


def test_the_best_state_judges_and_the_others_are_removed(blobs: World):
    folder, _, settings = blobs
    run = RunFolder(Path(settings.run))
    done = read_json(done_output(run, "fold-0", 0).path) or {}
    assert done["held_out_loss"] <= done["last_held_out_loss"]
    curve = pl.read_parquet(run.root / "pvi" / "fold-0" / "seed-0" / "curve.parquet")
    saved = curve.drop_nulls("held_out_loss")
    assert saved.height == 4
    assert done["step"] == saved.sort("held_out_loss")["step"][0]
    left = list((run.root / "pvi" / "fold-0" / "seed-0").glob("step-*"))
    assert [path.name for path in left] == [f"step-{done['step']:06d}"]
    last = settings_of(folder, run="last", score={"scorers": [{"pvi": {"stop": "last"}}]})
    scored(last)
    done = read_json(done_output(RunFolder(Path(last.run)), "fold-0", 0).path) or {}
    assert done["epoch"] == done["last_epoch"] == 4


@pytest.mark.slow
def test_killed_anywhere_it_ends_in_the_same_bytes(blobs: World, tmp_path: Path):
    folder, _, whole = blobs
    train = {"epochs": 4, "lr": 0.03, "batch_tokens": 16, "seeds": [0, 1],
             "resume_every_seconds": 0.01}  # fmt: skip
    settings = settings_of(folder, run=str(tmp_path / "run"), checkpoints={"train": train})
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(plain(settings)))
    done = Path(settings.run) / "pvi"
    command = curate_command("score", config)
    killed = sum(
        is_killed(command, lambda count=count: found(done, "**/.done/*.json") >= count)
        for count in (4, 7, 13)
    )
    assert killed >= 2
    before = {path: path.stat().st_mtime_ns for path in done.glob("*/seed-*/done.json")}
    assert before
    score_run(settings, pool=INLINE)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    runs = [RunFolder(Path(each.run)) for each in (whole, settings)]
    for part in runs[0].partitions():
        first, second = (run.scores(part, "pvi").path.read_bytes() for run in runs)
        assert first == second


def test_a_language_model_is_asked_for_the_response_without_its_prompt(tmp_path: Path):
    """Both surprises per response token again, by the saved models, sequence by sequence."""
    draw = np.random.default_rng(0)
    names = [("n", "up"), ("s", "down"), ("e", "right"), ("w", "left")]
    picked = [names[i] for i in draw.integers(4, size=60)]
    rows = pl.DataFrame(
        {
            "prompt": [f"{p}{i}" for i, (p, _) in enumerate(picked)],
            "response": [" " + r for _, r in picked],
        }
    )
    rows.write_parquet(tmp_path / "pairs.parquet")
    save_language_model(tmp_path / "model")
    settings = settings_of(
        tmp_path,
        sources={"pairs": {"path": str(tmp_path / "pairs.parquet")}},
        task={"kind": "causal-lm", "max_tokens": 10},
        model={"name": str(tmp_path / "model"), "device": "cpu"},
        checkpoints={"train": {"epochs": 2, "lr": 2e-3, "batch_tokens": 100}},
        score={"scorers": [{"pvi": {"folds": 2}}]},
    )
    found = scored(settings)
    assert found["pvi"].null_count() == 0
    assert found["num_scored"].min() == 3
    from transformers import AutoModelForCausalLM

    run = RunFolder(Path(settings.run))
    part = run.partitions()[0]
    tokenizer = byte_tokenizer()
    folds = pl.read_parquet(lengths_output(run, part).path)["fold"]
    table = pl.read_parquet(run.quantities(part, "pvi-seed-0").path)
    for index in range(0, table.height, 9):
        row = rows.row(table["row"][index], named=True)
        response = tokenizer(row["response"]).input_ids
        for model, prompt, bits in (
            (f"fold-{folds[index]}", tokenizer(row["prompt"]).input_ids, table["given_bits"]),
            ("null", [tokenizer.bos_token_id], table["null_bits"]),
        ):
            done = read_json(done_output(run, model, 0).path) or {}
            network: Any = AutoModelForCausalLM.from_pretrained(
                str(run.root / "pvi" / model / done["checkpoint"]["name"])
            )
            given = [tokenizer.bos_token_id, *prompt]
            answer = response[: 10 - 1 - len(tokenizer(row["prompt"]).input_ids)]
            ids = torch.tensor([[*given, *answer]])
            with torch.no_grad():
                logits = network(input_ids=ids).logits[0, len(given) - 1 : -1]
            wanted = functional.cross_entropy(logits, torch.tensor(answer)) / math.log(2)
            assert bits[index] == pytest.approx(float(wanted), rel=1e-4), model


def test_texts_without_tokens_are_read_as_one_special_token(tmp_path: Path):
    assert nothing(byte_tokenizer()) == "<s>"
    assert nothing(byte_tokenizer(bos=False)) == "</s>"
    draw = np.random.default_rng(1)
    labels = draw.integers(2, size=60)
    texts = [("yes " if label else "no ") + str(i) for i, label in enumerate(labels)]
    pl.DataFrame({"text": texts, "label": labels}).write_parquet(tmp_path / "texts.parquet")
    save_classifier(tmp_path / "model", num_labels=2)
    settings = settings_of(
        tmp_path,
        sources={"texts": {"path": str(tmp_path / "texts.parquet")}},
        task={"kind": "text-classification", "num_classes": 2, "max_tokens": 16},
        model={"name": str(tmp_path / "model"), "device": "cpu"},
        checkpoints={"train": {"epochs": 12, "lr": 3e-3, "batch_tokens": 100}},
        score={"scorers": [{"pvi": {"folds": 2}}]},
    )
    found = scored(settings)["pvi"]
    assert found.null_count() == 0
    assert found.mean() > 0.3  # pyright: ignore[reportOperatorIssue]


def test_a_chat_keeps_its_answers_and_loses_what_was_asked():
    chat = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "why"},
        {"role": "assistant", "content": "because"},
    ]
    fields = pl.DataFrame({"messages": [chat]})
    whole = blanked(fields, "")["messages"].to_list()[0]
    assert [turn["content"] for turn in whole] == ["", "", "yes?", "", "because"]
    last = blanked(fields, "", last_only=True)["messages"].to_list()[0]
    assert [turn["content"] for turn in last] == ["", "", "", "", "because"]


def test_a_cut_response_counts_as_many_tokens_without_the_prompt():
    task = build_task(CausalLM(max_tokens=8), byte_tokenizer())
    fields = pl.DataFrame({"prompt": ["abcd", "", "abcdefghij"], "response": ["wxyz!", "v", "w"]})
    given = task.encode(fields)
    assert given.num_scored.tolist() == [3, 1, 0]
    without = WithoutInput(task, byte_tokenizer())
    blank = without.encode(fields)
    assert blank.num_scored.tolist() == [3, 1, 0]
    batch = without.collate(blank, [0])
    counted = batch["targets"][batch["targets"] >= 0].tolist()
    assert byte_tokenizer().decode(counted) == "wxy"


def test_what_has_no_input_of_its_own_is_refused(tmp_path: Path):
    save_language_model(tmp_path / "model")
    pl.DataFrame({"text": ["a b", "c d"]}).write_parquet(tmp_path / "blobs.parquet")
    more: dict[str, Any] = {
        "sources": {"texts": {"path": str(tmp_path / "blobs.parquet")}},
        "model": {"name": str(tmp_path / "model"), "device": "cpu"},
        "index": {"held_out": 0.0},
    }
    settings = settings_of(tmp_path, task={"kind": "causal-lm"}, **more)
    index_run(settings, pool=INLINE)
    with pytest.raises(ConfigError, match="pvi is not defined"):
        score_run(settings, pool=INLINE)
    pairs = pl.DataFrame({"chosen": ["a b", "c d"], "rejected": ["a", "c"]})
    pairs.write_parquet(tmp_path / "blobs.parquet")
    settings = settings_of(tmp_path, task={"kind": "preference"}, **more)
    index_run(settings, pool=INLINE)
    with pytest.raises(ConfigError, match="pvi is not defined"):
        score_run(settings, pool=INLINE)
