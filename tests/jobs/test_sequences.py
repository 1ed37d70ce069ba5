"""Sequences of a run: against texts that are counted and searched as strings."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tiny_models import byte_tokenizer, save_classifier, save_language_model

from curate.data.layout import RunFolder
from curate.data.tables import read_examples
from curate.errors import ConfigError, InputError
from curate.models.mlp import MLP
from curate.models.sequences import PARTS, Sequences
from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.proxy_work import open_proxy
from jobs.run import Outcome, raise_failures, run_tasks
from jobs.sequences import (
    SequenceTasks,
    left_out,
    open_sequences,
    open_target,
    sequence_tasks,
)
from jobs.sequences_work import make_sequences, make_target
from jobs.settings import Settings, parse_settings
from jobs.training_work import make_workshop
from mixers.proxy_settings import Proxy

INLINE = Pool(InlineExecutor(), 1)
WORDS = ["cat", "hat", "dawn", "dusk", "river", "stone", "lamp", "door"]
TRAINING = ("reference", "proxy")


def text_of(row: int) -> str:
    """All different, of 5 to 60 letters."""
    words = [WORDS[(row * k) % 8] for k in range(1, 2 + row % 12)]
    return " ".join([str(row), *words])


def rows() -> pl.DataFrame:
    topics = ["code", "news", "talk"]
    return pl.DataFrame(
        {
            "text": [text_of(row) for row in range(90)],
            "topic": [topics[row % 3] for row in range(90)],
        }
    )


@pytest.fixture(autouse=True)
def inputs(tmp_path: Path) -> None:
    """A pool of 90 texts in three domains; a target of 12, of which 4 stand in the pool."""
    rows().write_parquet(tmp_path / "rows.parquet")
    shared = [text_of(row) for row in (3, 4, 6, 9)]
    target = [f"wanted {row}" for row in range(8)] + shared
    pl.DataFrame({"text": target}).write_parquet(tmp_path / "target.parquet")
    save_language_model(tmp_path / "model", tokenizer=byte_tokenizer(merges=False))


def settings_of(root: Path, **more: Any) -> Settings:
    values: dict[str, Any] = {
        "run": str(root / "run"),
        "sources": {
            "rows": {"path": str(root / "rows.parquet"), "text": "text", "domain": "topic"}
        },
        "target": {"path": str(root / "target.parquet"), "text": "text"},
        "task": {"kind": "causal-lm", "max_tokens": 32},
        "model": {"name": str(root / "model"), "device": "cpu"},
        "index": {"held_out": 0.2, "partition_rows": 25},
        **more,
    }
    return parse_settings(values)


def made(settings: Settings, *, packed: bool = True, length: int | None = None,
         **more: Any) -> tuple[SequenceTasks, list[Outcome]]:  # fmt: skip
    """Index, then make all sequences."""
    index_run(settings, pool=INLINE)
    tasks = sequence_tasks(settings, packed=packed, length=length, **more)
    outcomes = [
        run_tasks("target sequences", tasks.target, make_target, pool=INLINE),
        run_tasks("sequences", tasks.pool, make_sequences, pool=INLINE),
    ]
    for outcome in outcomes:
        raise_failures("sequences", outcome)
    return tasks, outcomes


def split_of(settings: Settings) -> dict[int, str]:
    """Row -> split."""
    run = RunFolder(Path(settings.run))
    tables = [read_examples(run, part, ["row", "split"]) for part in run.partitions()]
    return dict(pl.concat(tables).iter_rows())


def letters(data: Sequences, domain: int) -> list[str]:
    """What each sequence of a domain counts, as text."""
    size = int(data.sizes[domain])
    encoded = data.take([domain] * size, range(size)).encoded
    starts, tokenizer = encoded.arrays["starts"], byte_tokenizer(merges=False)
    found: list[str] = []
    for row in range(size):
        own = slice(starts[row], starts[row + 1])
        counted = encoded.arrays["tokens"][own][encoded.arrays["counted"][own]]
        found.append(tokenizer.decode(counted))
    return found


@pytest.mark.parametrize("length", [8, 32, 200])
def test_packed_sequences_hold_every_letter_of_every_text_once(tmp_path: Path, length: int):
    settings = settings_of(tmp_path)
    tasks, _ = made(settings, length=length)
    splits = split_of(settings)
    for parts, split in ((TRAINING, "train"), (("held_out",), "held_out")):
        data = open_sequences(settings, tasks.key, parts)
        assert data.domains == ("code", "news", "talk")
        for domain in range(3):
            texts = [text_of(row) for row in range(domain, 90, 3) if splits[row] == split]
            # Each text begins with a token that is not counted; the others are its letters.
            assert Counter("".join(letters(data, domain))) == Counter("".join(texts))
            assert data.num_tokens[domain] == sum(map(len, texts))
            size = int(data.sizes[domain])
            taken = data.take([domain] * size, range(size)).encoded
            assert set(taken.lengths.tolist()) == {length}
            assert len(taken.arrays["positions"]) == size * length


def test_padded_sequences_are_the_texts_cut_at_the_length(tmp_path: Path):
    settings = settings_of(tmp_path)
    tasks, _ = made(settings, packed=False, length=20)
    splits = split_of(settings)
    data = open_sequences(settings, tasks.key, TRAINING)
    for domain in range(3):
        texts = [text_of(row) for row in range(domain, 90, 3) if splits[row] == "train"]
        assert letters(data, domain) == [text[:19] for text in texts]
    marks = [task.output.mark() or {} for task in tasks.pool]
    cut = sum(len(text_of(row)) > 19 for row in range(90))
    assert sum(mark["truncated"] for mark in marks) == cut > 10
    assert sum(mark["sequences"] for mark in marks) == 90


def test_the_length_is_by_default_that_of_the_task(tmp_path: Path):
    settings = settings_of(tmp_path)
    tasks, _ = made(settings)
    assert open_sequences(settings, tasks.key, TRAINING).take([0], [0]).encoded.lengths[0] == 32
    assert sequence_tasks(settings, packed=True, length=32).key == tasks.key
    assert sequence_tasks(settings, packed=True, length=31).key != tasks.key


def test_the_halves_share_no_text_and_together_are_the_training_texts(tmp_path: Path):
    twice = pl.concat([rows(), rows()])  # copies fall into the same half
    twice.write_parquet(tmp_path / "rows.parquet")
    settings = settings_of(tmp_path)
    tasks, _ = made(settings, packed=False, length=100)
    found = {
        part: {text for k in range(3) for text in letters(data, k)}
        for part in TRAINING
        for data in [open_sequences(settings, tasks.key, (part,))]
    }
    assert not found["reference"] & found["proxy"]
    whole = open_sequences(settings, tasks.key, TRAINING)
    assert found["reference"] | found["proxy"] == {t for k in range(3) for t in letters(whole, k)}
    other = settings_of(tmp_path, seed=1, run=str(tmp_path / "other"))
    again, _ = made(other, packed=False, length=100)
    assert again.key != tasks.key
    data = open_sequences(other, again.key, ("proxy",))
    assert {text for k in range(3) for text in letters(data, k)} != found["proxy"]


def test_target_texts_are_left_out_of_every_part_and_counted(tmp_path: Path):
    settings = settings_of(tmp_path)
    tasks, _ = made(settings, packed=False, length=100, exclude_target=True)
    data = open_sequences(settings, tasks.key, PARTS)
    kept = [text for k in range(3) for text in letters(data, k)]
    shared = {text_of(row) for row in (3, 4, 6, 9)}
    assert not shared & set(kept)
    assert len(kept) == 86
    assert left_out(settings, tasks.key) == {"code": 3, "news": 1}
    without = sequence_tasks(settings, packed=False, length=100)
    assert without.key != tasks.key
    assert without.target == []


def test_the_target_falls_into_two_halves(tmp_path: Path):
    settings = settings_of(tmp_path)
    tasks, _ = made(settings, packed=False, length=100, with_target=True)
    halves: list[list[str]] = []
    for part in ("target", "target_held_out"):
        data = open_target(settings, tasks.key, (part,))
        assert data.domains == ("target",)
        halves.append(letters(data, 0))
    wanted = pl.read_parquet(tmp_path / "target.parquet")["text"].to_list()
    assert sorted(halves[0] + halves[1]) == sorted(wanted)
    assert min(map(len, halves)) >= 2
    assert left_out(settings, tasks.key) == {}


def test_domains_of_the_target_can_be_kept(tmp_path: Path):
    frame = pl.DataFrame({"text": ["one", "two", "three"], "skill": ["x", "y", "x"]})
    frame.write_parquet(tmp_path / "target.parquet")
    target = {"path": str(tmp_path / "target.parquet"), "text": "text", "domain": "skill"}
    settings = settings_of(tmp_path, target=target)
    tasks, _ = made(settings, packed=False, with_target=True)
    both = ("target", "target_held_out")
    data = open_target(settings, tasks.key, both, by_domain=True)
    assert {n: letters(data, k) for k, n in enumerate(data.domains)} == {
        "x": ["one", "three"],
        "y": ["two"],
    }
    assert letters(open_target(settings, tasks.key, both), 0) == ["one", "two", "three"]


def test_what_is_there_is_not_made_again(tmp_path: Path):
    settings = settings_of(tmp_path)
    tasks, first = made(settings, with_target=True)
    assert [len(outcome.done) for outcome in first] == [1, 4]
    contents = [task.output.path.read_bytes() for task in tasks.pool]
    _, second = made(settings, with_target=True)
    assert [len(outcome.skipped) for outcome in second] == [1, 4]
    tasks.pool[2].output.remove()  # as a kill would leave it
    _, third = made(settings, with_target=True)
    assert [len(outcome.done) for outcome in third] == [0, 1]
    assert [task.output.path.read_bytes() for task in tasks.pool] == contents


def test_new_domains_or_another_split_make_the_sequences_anew(tmp_path: Path):
    settings = settings_of(tmp_path)
    made(settings)
    rows().with_columns(topic=pl.lit("all")).write_parquet(tmp_path / "rows.parquet")
    tasks, outcomes = made(settings)
    assert len(outcomes[1].done) == 4
    assert open_sequences(settings, tasks.key, TRAINING).domains == ("all",)
    changed = settings_of(tmp_path, index={"held_out": 0.5, "partition_rows": 25})
    _, outcomes = made(changed)
    assert len(outcomes[1].done) >= 3


def test_tables_and_classified_texts_have_one_sequence_for_each_row(tmp_path: Path):
    numbers = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    frame = pl.DataFrame({"x": numbers, "label": [i % 3 for i in range(30)]})
    frame.write_parquet(tmp_path / "rows.parquet")
    MLP(num_features=4, num_classes=3, hidden=(4,)).save_pretrained(tmp_path / "mlp")
    settings = settings_of(
        tmp_path,
        sources={"rows": {"path": str(tmp_path / "rows.parquet"), "features": "x",
                          "label": "label"}},
        task={"kind": "tabular-classification", "num_classes": 3},
        model={"name": str(tmp_path / "mlp"), "device": "cpu"},
        target=None,
    )  # fmt: skip
    tasks, _ = made(settings, packed=True, length=64)  # neither means anything here
    data = open_sequences(settings, tasks.key, (*TRAINING, "held_out"))
    assert data.sizes.tolist() == [30]
    encoded = data.take([0] * 30, range(30)).encoded
    np.testing.assert_array_equal(encoded.arrays["features"], numbers)
    assert sequence_tasks(settings, packed=False, length=None).key == tasks.key

    texts = rows().with_columns(label=pl.Series([i % 3 for i in range(90)]))
    texts.write_parquet(tmp_path / "texts.parquet")
    save_classifier(tmp_path / "bert")
    settings = settings_of(
        tmp_path,
        run=str(tmp_path / "other"),
        sources={"rows": {"path": str(tmp_path / "texts.parquet"), "text": "text",
                          "label": "label"}},
        task={"kind": "text-classification", "num_classes": 3, "max_tokens": 16},
        model={"name": str(tmp_path / "bert"), "device": "cpu"},
        target=None,
    )  # fmt: skip
    tasks, _ = made(settings, packed=False)
    data = open_sequences(settings, tasks.key, (*TRAINING, "held_out"))
    taken = data.take([0, 0], [7, 3]).encoded
    assert taken.arrays["labels"].tolist() == [1, 0]
    assert taken.lengths.tolist() == [16, min(16, len(text_of(3)) + 2)]


def test_clustered_domains_are_those_of_the_sequences(tmp_path: Path):
    pytest.importorskip("faiss")
    from jobs.domains import domains_run
    from jobs.embedding import embed_run

    settings = settings_of(
        tmp_path,
        domains={"clusters": 2},
        embed={"words": {"kind": "ngrams", "dim": 64}},
    )
    index_run(settings, pool=INLINE)
    with pytest.raises(InputError, match="no clustered domains yet"):
        sequence_tasks(settings, packed=True, length=32)
    embed_run(settings, pool=INLINE)
    domains_run(settings, pool=INLINE)
    tasks, _ = made(settings)
    run = RunFolder(Path(settings.run))
    names = {
        name for part in run.partitions() for name in read_examples(run, part, ["domain"])["domain"]
    }
    data = open_sequences(settings, tasks.key, PARTS)
    assert set(data.domains) == names
    assert names.isdisjoint({"code", "news", "talk"})


def test_what_cannot_be_made_is_refused_before_anything_runs(tmp_path: Path):
    settings = settings_of(tmp_path)
    with pytest.raises(InputError, match="curate index"):
        sequence_tasks(settings, packed=True, length=32)
    index_run(settings, pool=INLINE)
    windows = settings_of(
        tmp_path, task={"kind": "causal-lm", "max_tokens": 32, "window": {"overlap": 8}}
    )
    with pytest.raises(ConfigError, match=r"task\.window"):
        sequence_tasks(windows, packed=True, length=32)
    with pytest.raises(ConfigError, match="compares two answers"):
        sequence_tasks(settings_of(tmp_path, task={"kind": "preference"}), packed=True, length=8)
    with pytest.raises(ConfigError, match="settings name none"):
        sequence_tasks(settings_of(tmp_path, target=None), packed=True, length=8, with_target=True)


def test_a_target_in_which_nothing_counts_is_refused(tmp_path: Path):
    frame = pl.DataFrame({"prompt": ["ask " * 20], "response": ["never reached"]})
    frame.write_parquet(tmp_path / "target.parquet")
    target = {"path": str(tmp_path / "target.parquet"), "prompt": "prompt",
              "response": "response"}  # fmt: skip
    settings = settings_of(tmp_path, target=target)
    with pytest.raises(InputError, match="no example in which anything counts"):
        made(settings, packed=False, length=8, with_target=True)


def test_sequences_that_were_not_made_are_named(tmp_path: Path):
    settings = settings_of(tmp_path)
    index_run(settings, pool=INLINE)
    with pytest.raises(InputError, match=r"part-.*safetensors is missing"):
        open_sequences(settings, "0" * 12, TRAINING)
    with pytest.raises(InputError, match=r"target\.safetensors is missing"):
        open_target(settings, "0" * 12, ("target",))


def test_examples_of_the_target_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="jobs.sequences_work"):
        made(settings_of(tmp_path), exclude_target=True)
    assert any("4 examples of part-" in message for message in caplog.messages)


WIDTHS = {"hidden_size": 32, "n_layer": 2, "n_head": 4}


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ({"model_type": "bloom", **WIDTHS}, "does not keep the texts of a packed row apart"),
        ({"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16},
         "sequences have 32 tokens, but the proxy reads 16"),
    ],
)  # fmt: skip
def test_a_proxy_that_cannot_read_the_sequences_is_refused(
    tmp_path: Path, model: dict[str, Any], why: str
):
    shop = make_workshop(settings_of(tmp_path))
    with pytest.raises(ConfigError, match=why):
        open_proxy(shop, Proxy(model=model))


def test_a_proxy_that_reads_padded_texts_may_be_of_any_kind(tmp_path: Path):
    shop = make_workshop(settings_of(tmp_path))
    proxy = Proxy(model={"model_type": "bloom", **WIDTHS}, packed=False)
    assert type(open_proxy(shop, proxy).model).__name__ == "BloomForCausalLM"


def test_a_proxy_may_read_less_than_the_run_does_where_its_sequences_are_short(tmp_path: Path):
    shop = make_workshop(settings_of(tmp_path))
    small = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16}
    open_proxy(shop, Proxy(model=small, length=16))
