"""Scoring through a run folder: what is measured once, what is redone, what is refused."""

import dataclasses
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import xxhash
from tiny_models import byte_tokenizer, save_classifier, save_language_model
from torch.nn import functional

from curate.config import plain
from curate.data.files import read_json
from curate.errors import ConfigError, CurateError, InputError, TooManyBadError
from curate.models.mlp import MLP
from jobs.cluster import Cluster, InlineExecutor, Pool, open_pool
from jobs.index import index_run
from jobs.lengths import CHARACTERS
from jobs.score import (
    lengths_run,
    measure_score,
    plan_lengths,
    plan_score,
    score_run,
    tokenizer_for,
)
from jobs.settings import Settings, parse_settings

INLINE = Pool(InlineExecutor(), 1)
WORDS = ["the", "cat", "in", "a", "hat", "then", "sat", "there", "until", "dawn"]


def text(number: int) -> str:
    return " ".join(WORDS[(number * k) % 10] for k in range(1, 3 + number % 9))


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Two files of text and a model."""
    for name, count in (("one", 25), ("two", 10)):
        rows = {
            "text": [text(i) for i in range(count)],
            "name": [f"{name}-{i}" for i in range(count)],
        }
        pl.DataFrame(rows).write_parquet(tmp_path / f"{name}.parquet")
    save_language_model(tmp_path / "model")
    return tmp_path


def settings_of(world: Path, *scorers: Any, run: str = "run", **more: Any) -> Settings:
    values: dict[str, Any] = {
        "run": str(world / run),
        "sources": {"texts": {"path": str(world / "*.parquet"), "text": "text", "id": "name"}},
        "task": {"kind": "causal-lm", "max_tokens": 64},
        "model": {"name": str(world / "model"), "device": "cpu"},
        "index": {"partition_rows": 10},
        "score": {"scorers": list(scorers), "batch_tokens": 256},
    }
    for key, value in more.items():
        values[key] = {**values[key], **value} if isinstance(values.get(key), dict) else value
    settings = parse_settings(values)
    index_run(settings, pool=INLINE)
    return settings


def table(settings: Settings, folder: str) -> pl.DataFrame:
    paths = sorted((Path(settings.run) / folder).glob("*.parquet"))
    return pl.concat([pl.read_parquet(path) for path in paths]).sort("source", "file", "row")


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*.parquet"))
    }


def replaced(settings: Settings, **changes: Mapping[str, Any]) -> Settings:
    """Other settings for the same run."""
    values = plain(settings)
    for key, change in changes.items():
        values[key] = {**values[key], **change} if isinstance(change, dict) else change
    return parse_settings(values)


def test_scores_are_what_the_model_says_of_each_text_alone(world: Path):
    settings = settings_of(world, "el2n", "loss", "margin", "entropy")
    summary = score_run(settings, pool=INLINE)
    assert summary["rows"] == 35
    assert (summary["done"], summary["checkpoints"]) == (5 - 1, ["model"])
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world / "model").eval()
    tokenizer = byte_tokenizer()
    scores = pl.concat(
        [
            table(settings, f"scores/{name}").drop("source", "file", "row", "num_scored")
            for name in ("el2n", "loss", "margin", "entropy")
        ],
        how="horizontal",
    ).hstack(table(settings, "scores/loss").select("file", "row", "num_scored"))
    for row in scores.filter(pl.col("row") % 6 == 5).rows(named=True):
        ids = [tokenizer.bos_token_id, *tokenizer(text(row["row"]))["input_ids"]]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].double()
        targets = torch.tensor(ids[1:])
        p = logits.softmax(-1)
        errors = (p - functional.one_hot(targets, p.shape[1])).norm(dim=1)
        loss = functional.cross_entropy(logits, targets).item()
        assert row["loss"] == pytest.approx(loss, rel=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert row["el2n"] == pytest.approx(errors.mean().item(), rel=1e-5)
        assert row["el2n_frob"] == pytest.approx(errors.norm().item(), rel=1e-5)
        assert row["entropy"] == pytest.approx(-(p * p.log()).sum(1).mean().item(), rel=1e-5)
        assert row["num_scored"] == len(targets)


def test_all_tables_have_the_rows_of_the_index_in_its_order(world: Path):
    settings = settings_of(world, "loss", "length", "random")
    score_run(settings, pool=INLINE)
    examples = files(Path(settings.run) / "examples")
    for folder in ("quantities/model", "scores/loss", "scores/length", "scores/random"):
        found = files(Path(settings.run) / folder)
        assert found.keys() == examples.keys()
        for name, content in found.items():
            keys = pl.read_parquet(content).select("source", "file", "row")
            assert keys.equals(pl.read_parquet(examples[name]).select("source", "file", "row"))


def test_a_second_start_measures_nothing_and_leaves_every_byte(world: Path):
    settings = settings_of(world, "el2n", "random")
    score_run(settings, pool=INLINE)
    before = files(Path(settings.run))
    summary = score_run(settings, pool=INLINE)
    assert (summary["done"], summary["skipped"]) == (0, 4)
    assert files(Path(settings.run)) == before


def test_a_new_scorer_costs_no_new_pass(world: Path):
    settings = settings_of(world, "el2n")
    score_run(settings, pool=INLINE)
    more = replaced(settings, score={"scorers": ["el2n", "margin"]})
    assert plan_score(more).total - plan_score(more).done == 4  # the columns of margin
    summary = score_run(more, pool=INLINE)
    assert (summary["done"], summary["skipped"]) == (0, 4)
    assert "margin" in summary["scorers"]


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        ({"task": {"max_tokens": 6}}, 4),
        ({"score": {"batch_tokens": 128}}, 4),
        ({"model": {"dtype": "bfloat16"}}, 4),
        ({"cluster": {"threads": 2}}, 4),
        ({"seed": 5}, 0),
        ({"plan": {"keep": 0.5}}, 0),
        ({"index": {"held_out": 0.5, "partition_rows": 10}}, 0),
    ],
)
def test_a_changed_setting_redoes_what_depends_on_it_and_nothing_else(
    world: Path, change: Any, redone: int
):
    settings = settings_of(world, "loss")
    score_run(settings, pool=INLINE)
    other = replaced(settings, **change)
    index_run(other, pool=INLINE)
    state = plan_score(other)
    assert score_run(other, pool=INLINE)["done"] == redone
    assert bool(state.why) == bool(redone)
    assert state.total - state.done == 2 * redone
    torch.set_num_threads(1)


def test_other_weights_in_the_same_folder_are_noticed(world: Path):
    settings = settings_of(world, "loss")
    score_run(settings, pool=INLINE)
    before = table(settings, "scores/loss")["loss"]
    save_language_model(world / "model", seed=1)
    assert score_run(settings, pool=INLINE)["done"] == 4
    assert not before.equals(table(settings, "scores/loss")["loss"])


def test_a_changed_text_redoes_its_own_partition(world: Path):
    settings = settings_of(world, "loss")
    score_run(settings, pool=INLINE)
    changed = pl.read_parquet(world / "one.parquet").with_columns(
        text=pl.when(pl.col("name") == "one-3").then(pl.lit("another")).otherwise("text")
    )
    changed.write_parquet(world / "one.parquet")
    index_run(settings, pool=INLINE)
    assert score_run(settings, pool=INLINE)["done"] == 1


def test_checkpoints_are_averaged_within_seeds_and_seeds_have_a_spread(world: Path):
    for seed in (0, 1):
        for step in (1, 2):
            folder = world / f"seed-{seed}-{step}"
            save_language_model(folder, seed=10 * seed + step)
            (folder / "checkpoint.json").write_text(f'{{"seed": {seed}}}')
    names = ["seed-0-1", "seed-0-2", "seed-1-1", "seed-1-2"]
    settings = settings_of(
        world, "loss", checkpoints={"paths": [str(world / name) for name in names]}
    )
    score_run(settings, pool=INLINE)
    each = np.stack([table(settings, f"quantities/{name}")["loss"].to_numpy() for name in names])
    means = each.astype(np.float64).reshape(2, 2, -1).mean(axis=1)
    scores = table(settings, "scores/loss")
    np.testing.assert_allclose(scores["loss"], means.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(scores["loss_std"], means.std(axis=0, ddof=1), rtol=1e-5)
    last = replaced(settings, score={"checkpoints": "last"})
    assert score_run(last, pool=INLINE)["checkpoints"] == ["seed-0-2", "seed-1-2"]
    one = replaced(settings, score={"checkpoints": ["seed-0-1"]})
    assert score_run(one, pool=INLINE)["done"] == 0
    assert table(one, "scores/loss")["loss_std"].null_count() == 35


def test_an_unknown_checkpoint_is_refused_with_the_known_names(world: Path):
    settings = settings_of(world, "loss", score={"checkpoints": ["seed-9/step-000001"]})
    with pytest.raises(InputError, match="seed-9/step-000001") as caught:
        score_run(settings, pool=INLINE)
    assert "model" in caught.value.fix


def test_length_and_random_need_no_model_at_all(world: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.rmtree(world / "model")
    settings = settings_of(world, "length", "random", task={}, model={"name": None})
    settings = dataclasses.replace(settings, task={})
    summary = score_run(settings, pool=INLINE)
    assert summary["checkpoints"] == []
    assert summary["tokens"] == "characters, as no tokenizer is set"
    lengths = table(settings, "scores/length")
    assert lengths["num_tokens"].null_count() == 35
    assert lengths.filter(pl.col("file") == "two.parquet")["num_chars"].to_list() == [
        len(text(i)) for i in range(10)
    ]
    assert not (Path(settings.run) / "quantities").exists()


def test_random_is_a_hash_of_seed_and_key(world: Path):
    settings = settings_of(world, "random", seed=7)
    score_run(settings, pool=INLINE)
    for source, file, row, value in table(settings, "scores/random").rows():
        draw = xxhash.xxh3_64(f"7\0random\0{source}\0{file}\0{row}".encode()).intdigest()
        assert value == (draw >> 40) / 2**24


def test_rows_that_cannot_be_scored_are_null_and_counted(world: Path):
    answers = {"prompt": ["the", "a long prompt " * 9, "in"], "response": [" cat", "x", " hat"]}
    pl.DataFrame(answers).write_parquet(world / "answers.parquet")
    source = {"path": str(world / "answers.parquet"), "prompt": "prompt", "response": "response"}
    settings = settings_of(world, "loss", sources={"texts": source}, task={"max_tokens": 16})
    summary = score_run(settings, pool=INLINE)
    assert (summary["unscored"], summary["truncated"]) == (1, 1)
    assert table(settings, "scores/loss")["loss"].is_null().to_list() == [False, True, False]
    assert summary["scorers"]["loss"]["loss"]["nulls"] == 1


def test_tables_from_outside_join_by_key_and_by_id(world: Path):
    pl.DataFrame(
        {
            "file": ["one.parquet", "two.parquet"],
            "row": [3, 9],
            "good": [1.5, 2],
            "word": ["a", "b"],
        }
    ).write_csv(world / "by-key.csv")
    pl.DataFrame({"id": ["two-1", "one-24", "nobody"], "stars": [5, 1, 3]}).write_parquet(
        world / "by-id.table.parquet"
    )
    (world / "by-id.table.parquet").rename(world / "stars.pq.parquet")
    settings = settings_of(
        world,
        {"external": {"quality": str(world / "by-key.csv"),
                      "stars": {"path": str(world / "stars.pq.parquet"), "on": "id"}}},
        sources={"texts": {"path": [str(world / "one.parquet"), str(world / "two.parquet")],
                           "text": "text", "id": "name"}},
    )  # fmt: skip
    score_run(settings, pool=INLINE)
    good = table(settings, "scores/quality").filter(pl.col("good").is_not_null())
    assert good.select("file", "row", "good").rows() == [
        ("one.parquet", 3, 1.5),
        ("two.parquet", 9, 2.0),
    ]
    stars = table(settings, "scores/stars").filter(pl.col("stars").is_not_null())
    assert stars.select("file", "row", "stars").rows() == [
        ("one.parquet", 24, 1.0),
        ("two.parquet", 1, 5.0),
    ]


def test_a_changed_external_table_is_noticed(world: Path):
    place = world / "quality.csv"
    place.write_text("file,row,good\none.parquet,0,1\n")
    settings = settings_of(world, {"external": {"quality": str(place)}},
                           sources={"texts": {"path": str(world / "one.parquet")}})  # fmt: skip
    score_run(settings, pool=INLINE)
    place.write_text("file,row,good\none.parquet,0,2\n")
    score_run(settings, pool=INLINE)
    assert table(settings, "scores/quality")["good"][0] == 2


def test_a_table_that_names_an_example_twice_is_refused_naming_it(world: Path):
    (world / "twice.csv").write_text("file,row,q\none.parquet,4,1\none.parquet,4,2\n")
    settings = settings_of(world, {"external": {"q": str(world / "twice.csv")}})
    with pytest.raises(TooManyBadError, match=r"more than one row for file one\.parquet, row 4"):
        score_run(settings, pool=INLINE)


def test_scores_of_another_run_are_taken_where_nothing_differs(world: Path):
    first = settings_of(world, "el2n")
    score_run(first, pool=INLINE)
    extra = pl.DataFrame({"text": ["the new one"], "name": ["x"]})
    extra.write_parquet(world / "zzz.parquet")
    second = settings_of(world, "el2n", run="second")
    summary = score_run(second, pool=INLINE, reuse=[Path(first.run)])
    assert (summary["reused"], summary["done"]) == (4, 1)
    fresh = settings_of(world, "el2n", run="third")
    score_run(fresh, pool=INLINE)
    assert files(Path(second.run)) == files(Path(fresh.run))
    assert score_run(second, pool=INLINE)["skipped"] == 5


def test_nothing_is_taken_from_a_run_with_other_settings_or_a_torn_table(world: Path):
    first = settings_of(world, "el2n")
    score_run(first, pool=INLINE)
    torn = sorted((Path(first.run) / "quantities" / "model").glob("*.parquet"))[0]
    torn.write_bytes(torn.read_bytes()[:-10])
    second = settings_of(world, "el2n", run="second")
    assert score_run(second, pool=INLINE, reuse=[Path(first.run)])["reused"] == 3
    other = settings_of(world, "el2n", run="other", task={"max_tokens": 5})
    assert score_run(other, pool=INLINE, reuse=[Path(first.run)])["reused"] == 0
    with pytest.raises(InputError, match="there is no run"):
        score_run(other, pool=INLINE, reuse=[world / "nowhere"])


def test_a_removed_file_takes_its_scores_with_it(world: Path):
    settings = settings_of(world, "loss")
    score_run(settings, pool=INLINE)
    (world / "two.parquet").unlink()
    index_run(settings, pool=INLINE)
    score_run(settings, pool=INLINE)
    for folder in ("scores/loss", "quantities/model"):
        assert set(table(settings, folder)["file"]) == {"one.parquet"}


def test_a_failed_partition_does_not_cost_the_others(world: Path):
    settings = settings_of(world, "loss")
    # The input changes behind the index's back.
    pl.read_parquet(world / "one.parquet").head(24).write_parquet(world / "one.parquet")
    with pytest.raises(CurateError, match="changed since it was indexed"):
        score_run(settings, pool=INLINE)
    for folder in ("quantities/model", "scores/loss"):
        assert set(table(settings, folder)["file"]) == {"two.parquet"}


def test_classification_of_texts_by_a_saved_model(world: Path):
    save_classifier(world / "classifier")
    rows = {"text": [text(i) for i in range(12)], "label": [i % 3 for i in range(12)]}
    pl.DataFrame(rows).write_parquet(world / "labelled.parquet")
    settings = settings_of(
        world,
        "el2n",
        sources={"texts": {"path": str(world / "labelled.parquet"), "id": None}},
        task={"kind": "text-classification", "num_classes": 3},
        model={"name": str(world / "classifier")},
    )
    score_run(settings, pool=INLINE)
    found = table(settings, "scores/el2n")
    assert found["el2n"].equals(found["el2n_frob"], check_names=False)
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(world / "classifier").eval()
    tokenizer = AutoTokenizer.from_pretrained(world / "classifier")
    for row in (0, 7):
        with torch.no_grad():
            logits = model(**tokenizer(text(row), return_tensors="pt")).logits[0]
        error = logits.softmax(-1) - functional.one_hot(torch.tensor(row % 3), 3)
        assert found["el2n"][row] == pytest.approx(error.norm().item(), rel=1e-5)
        assert found["num_scored"][row] == len(tokenizer(text(row))["input_ids"])


def test_tables_of_numbers_by_a_small_network(world: Path):
    torch.manual_seed(0)
    network = MLP(num_features=4, num_classes=3, hidden=(8,))
    network.save_pretrained(world / "mlp")
    generator = np.random.default_rng(0)
    features = generator.normal(size=(30, 4)).astype(np.float32)
    rows = {f"x{i}": features[:, i] for i in range(4)} | {"label": np.arange(30) % 3}
    pl.DataFrame(rows).write_parquet(world / "numbers.parquet")
    source = {
        "path": str(world / "numbers.parquet"),
        "features": ["x0", "x1", "x2", "x3"],
        "label": "label",
    }
    settings = tabular(world, source)
    score_run(settings, pool=INLINE)
    with torch.no_grad():
        wanted = functional.cross_entropy(
            network(torch.from_numpy(features) * 0.5), torch.arange(30) % 3, reduction="none"
        )
    found = table(settings, "scores/loss")
    np.testing.assert_allclose(found["loss"], wanted.numpy(), rtol=1e-5)
    assert "num_scored" not in found.columns
    assert set(table(settings, "scores/length")["num_tokens"]) == {1.0}
    assert tokenizer_for(settings) == (None, "examples")


def tabular(world: Path, source: dict[str, Any]) -> Settings:
    settings = parse_settings(
        {
            "run": str(world / "run"),
            "sources": {"numbers": source},
            "task": {"kind": "tabular-classification", "num_classes": 3, "scale": 0.5},
            "model": {"name": str(world / "mlp"), "device": "cpu"},
            "score": {"scorers": ["loss", "length"]},
            "index": {"partition_rows": 8},
        }
    )
    index_run(settings, pool=INLINE)
    return settings


def test_scorers_of_the_user_come_in_by_their_address(world: Path, monkeypatch: pytest.MonkeyPatch):
    (world / "own_scorers.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "@dataclass(frozen=True)\n"
        "class PerChar:\n"
        "    factor: float = 1.0\n"
        "    needs: ClassVar = frozenset({'loss', 'num_chars'})\n"
        "    columns: ClassVar = {'per_char': 'loss per character'}\n"
        "    def score(self, q):\n"
        "        return {'per_char': self.factor * q['loss'] / q['num_chars']}\n"
    )
    monkeypatch.syspath_prepend(world)
    settings = settings_of(world, "loss", {"own_scorers:PerChar": {"factor": 2}})
    score_run(settings, pool=INLINE)
    per_char = table(settings, "scores/PerChar")["per_char"]
    chars = table(settings, "examples")["num_chars"]
    loss = table(settings, "scores/loss")["loss"]
    np.testing.assert_allclose(per_char, 2 * loss / chars, rtol=1e-6)


@pytest.mark.parametrize(
    ("scorers", "message"),
    [
        (["el2nn"], "did you mean el2n"),
        ([{"el2n": {"smoothing": 1}}], "smoothing"),
        (["loss", {"external": {"loss": "x.csv"}}], "called loss"),
        ([{"external": {}}], "names no table"),
        ([{"external": {"q": "missing.csv"}}], "no score table missing.csv"),
    ],
)
def test_a_wrong_scorer_is_refused_before_anything_is_measured(
    world: Path, scorers: Sequence[Any], message: str
):
    settings = settings_of(world, *scorers)
    with pytest.raises((ConfigError, InputError), match=message):
        score_run(settings, pool=INLINE)
    assert not (Path(settings.run) / "quantities").exists()


def test_scoring_before_indexing_names_the_command(world: Path):
    settings = settings_of(world, "loss")
    fresh = dataclasses.replace(settings, run=str(world / "fresh"))
    with pytest.raises(InputError, match="the index has not run yet"):
        score_run(fresh, pool=INLINE)
    assert plan_score(fresh).why == ("the index has not been made yet",)


def test_a_model_that_nothing_trains_is_refused(world: Path):
    settings = settings_of(world, "loss", model={"name": None})
    with pytest.raises(ConfigError, match="no model is set"):
        score_run(settings, pool=INLINE)


def test_checkpoints_that_are_not_trained_yet_are_named(world: Path):
    settings = settings_of(world, "loss", checkpoints={"train": {"seeds": [3]}})
    with pytest.raises(InputError, match="no checkpoint of seed 3"):
        score_run(settings, pool=INLINE)
    state = plan_score(settings)
    assert (state.done, state.why) == (0, ("there is no checkpoint of seed 3 yet",))


def test_out_of_memory_is_survived_and_noted(world: Path, monkeypatch: pytest.MonkeyPatch):
    from curate.models.tasks.causal_lm import CausalLMTask

    collate = CausalLMTask.collate

    def cramped(self: CausalLMTask, encoded: Any, indices: Any) -> Any:
        if len(indices) > 2:
            raise torch.OutOfMemoryError("no room")
        return collate(self, encoded, indices)

    plenty = settings_of(world, "loss", run="plenty")
    score_run(plenty, pool=INLINE)
    monkeypatch.setattr(CausalLMTask, "collate", cramped)
    settings = settings_of(world, "loss")
    assert score_run(settings, pool=INLINE)["halved"] > 0
    np.testing.assert_allclose(
        table(settings, "scores/loss")["loss"], table(plenty, "scores/loss")["loss"], rtol=1e-6
    )
    marks = [
        read_json(path) for path in (Path(settings.run) / "quantities/model/.done").glob("*.json")
    ]
    assert all(mark["halved"] > 0 for mark in marks if mark["rows"] > 5)


def test_lengths_count_whole_texts_without_special_tokens(world: Path):
    settings = settings_of(world, "random", task={"max_tokens": 4})
    summary = lengths_run(settings, pool=INLINE)
    tokenizer, digest = tokenizer_for(settings)
    assert tokenizer is not None
    assert summary["digest"] == digest
    found = table(settings, f"lengths/{digest}")
    assert found.filter(pl.col("file") == "two.parquet")["num_tokens"].to_list() == [
        len(tokenizer(text(i), add_special_tokens=False)["input_ids"]) for i in range(10)
    ]
    assert summary["tokens"] == found["num_tokens"].sum()
    assert lengths_run(settings, pool=INLINE)["done"] == 0
    assert plan_lengths(settings).done == 4


def test_lengths_of_another_tokenizer_lie_beside_the_first(world: Path):
    settings = settings_of(world, "random")
    first = lengths_run(settings, pool=INLINE)
    byte_tokenizer(merges=False).save_pretrained(world / "bytes")
    other = replaced(settings, plan={"tokenizer": str(world / "bytes")})
    second = lengths_run(other, pool=INLINE)
    assert second["digest"] != first["digest"]
    assert second["tokens"] > first["tokens"]
    assert second["tokens"] == table(settings, "examples")["num_chars"].sum()
    assert len(files(Path(settings.run) / "lengths")) == 8


def test_without_any_tokenizer_characters_are_counted_and_said_so(world: Path):
    settings = settings_of(world, "random", model={"name": None})
    summary = lengths_run(settings, pool=INLINE)
    assert summary["digest"] == CHARACTERS
    assert summary["tokenizer"] == "characters, as no tokenizer is set"
    assert summary["tokens"] == table(settings, "examples")["num_chars"].sum()


def test_a_tokenizer_that_is_still_to_be_trained_is_named(world: Path):
    model = {"name": None, "config": {"model_type": "llama"}, "tokenizer": {"train": "bpe"}}
    settings = settings_of(world, "length", model=model)
    with pytest.raises(InputError, match="not been trained yet"):
        lengths_run(settings, pool=INLINE)
    assert "not been trained" in plan_lengths(settings).why[0]


def test_the_estimate_is_of_what_is_due(world: Path):
    settings = settings_of(world, "loss")
    found = measure_score(settings)
    assert found["seconds"] > 0
    assert found["size_bytes"] > 35 * 4
    assert not (Path(settings.run) / "quantities").exists()
    score_run(settings, pool=INLINE)
    assert measure_score(settings) == {"seconds": 0.0, "size_bytes": 0}


@pytest.mark.slow
def test_two_dask_workers_write_the_same_bytes_as_this_process(world: Path):
    inline = settings_of(world, "el2n", "entropy", "length", "random")
    score_run(inline, pool=INLINE)
    other = settings_of(world, "el2n", "entropy", "length", "random", run="dask")
    with open_pool(Cluster(kind="local", workers=2)) as pool:
        summary = score_run(other, pool=pool)
    assert summary["done"] == 4
    assert files(Path(other.run)) == files(Path(inline.run))
