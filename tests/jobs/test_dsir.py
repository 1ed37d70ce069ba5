"""DSIR as part of a run: the numbers of the formulas, restarts, bad input."""

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file

import curate
from curate.cli import main
from curate.data.layout import RunFolder
from jobs.dsir import count_work, largest_output, model_output
from tests.jobs.lexical_pool import (
    partitions,
    score_bytes,
    scored,
    table,
    texts_of,
    values_of,
    write_config,
    write_world,
)


def words_and_pairs(text: str) -> list[str]:
    words = re.findall(r"\w+|[^\w\s]+", text.lower())
    return [*words, *(" ".join(pair) for pair in pairwise(words))]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pl.DataFrame]:
    root = tmp_path_factory.mktemp("dsir")
    write_world(root)
    # Among a million buckets hardly two n-grams meet, so that plain counts are an oracle.
    return root, scored(root, [{"dsir": {"buckets": 1 << 20, "smoothing": 0.3}}])


def test_weights_are_those_of_plain_counts(world: tuple[Path, pl.DataFrame]):
    root, scores = world
    pool_counts: Counter[str] = Counter()
    for text in scores.filter(pl.col("split") == "train")["text"]:
        pool_counts.update(words_and_pairs(text))
    target_counts: Counter[str] = Counter()
    for text in pl.read_parquet(root / "target.parquet")["text"]:
        target_counts.update(words_and_pairs(text))
    extra = 0.3 * (1 << 20)

    def ratio(gram: str) -> float:
        q = (pool_counts[gram] + 0.3) / (pool_counts.total() + extra)
        p = (target_counts[gram] + extra * q) / (target_counts.total() + extra)
        return np.log(p / q)

    expected = [sum(map(ratio, words_and_pairs(text))) for text in scores["text"]]
    sizes = [len(words_and_pairs(text)) for text in scores["text"]]
    # A few of the n-grams share a bucket of a million.
    np.testing.assert_allclose(scores["dsir"], expected, atol=1e-4)
    np.testing.assert_allclose(scores["dsir_per_ngram"], np.array(expected) / sizes, atol=1e-5)
    assert scores["dsir_num_ngrams"].to_list() == sizes
    assert 0 < (scores["split"] == "held_out").sum() < 60


def test_the_targets_kind_comes_first_and_keys_are_a_perturbed_weight(
    world: tuple[Path, pl.DataFrame], tmp_path: Path
):
    write_world(tmp_path)
    scores = scored(tmp_path, ["dsir"])
    best = scores.sort("dsir_per_ngram", descending=True)[:50]
    assert (best["kind"] == "sea").sum() > 47
    noise = (scores["dsir_key"] - scores["dsir"]).to_numpy()
    assert abs(noise.mean() - 0.5772) < 0.3
    # The draw belongs to seed and key: neither partitions nor other settings move it.
    other = (world[1]["dsir_key"] - world[1]["dsir"]).to_numpy()
    np.testing.assert_allclose(noise, other, atol=1e-4)
    write_world(tmp_path / "again")
    seeded = scored(tmp_path / "again", ["dsir"], seed=1)
    assert np.abs((seeded["dsir_key"] - seeded["dsir"]).to_numpy() - noise).max() > 0.5


def test_partitions_and_workers_change_nothing(world: tuple[Path, pl.DataFrame], tmp_path: Path):
    write_world(tmp_path)
    few = scored(tmp_path, ["dsir"], index={"held_out": 0.1, "partition_rows": 1000})
    more = scored(tmp_path, ["dsir"], run="more", index={"held_out": 0.1, "partition_rows": 7})
    assert partitions(tmp_path) == 2
    assert partitions(tmp_path, "more") > 20
    assert few.equals(more)


def test_a_second_run_does_nothing_and_another_prior_counts_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_world(tmp_path)
    scored(tmp_path, ["dsir"])
    before = score_bytes(tmp_path, "run")

    def fail(_: object) -> object:
        raise AssertionError("counted again")

    monkeypatch.setattr("jobs.dsir.count_work", fail)
    scored(tmp_path, ["dsir"])
    assert score_bytes(tmp_path, "run") == before
    scored(tmp_path, [{"dsir": {"prior": "uniform"}}])
    assert score_bytes(tmp_path, "run") != before
    assert count_work is not fail


def test_new_data_is_counted_alone_and_a_removed_file_forgotten(tmp_path: Path):
    write_world(tmp_path)
    scored(tmp_path, ["dsir"])
    counts = tmp_path / "run" / "dsir" / "counts"
    times = {path.name: path.stat().st_mtime_ns for path in counts.glob("part-*")}
    pl.DataFrame({"text": texts_of("law", 10, seed=4), "kind": "law"}).write_parquet(
        tmp_path / "data" / "zzz.parquet"
    )
    scores = scored(tmp_path, ["dsir"])
    assert scores.height == 190
    now = {path.name: path.stat().st_mtime_ns for path in counts.glob("part-*")}
    assert len(now) == len(times) + 1
    assert all(now[name] == time for name, time in times.items())
    (tmp_path / "data" / "zzz.parquet").unlink()
    scored(tmp_path, ["dsir"])
    assert {path.name for path in counts.glob("part-*")} == times.keys()


def test_the_keys_draw_the_plan(tmp_path: Path):
    write_world(tmp_path)
    values = values_of(
        tmp_path,
        ["dsir"],
        plan={"score": "dsir_key", "draw": "top", "within": "all", "keep": {"examples": 30}},
    )
    config = str(write_config(tmp_path, values))
    assert main(["score", config]) == 0
    assert main(["plan", config]) == 0
    opened = curate.open(tmp_path / "run")
    plan = opened.plan.collect()
    scores = opened.scores.collect()
    kept = scores.filter(plan["keep"])
    train = scores.filter(opened.examples.collect()["split"] == "train")
    assert sorted(kept["dsir_key"]) == sorted(train["dsir_key"].sort()[-30:])


def test_characters_are_counted_where_words_have_no_spaces(tmp_path: Path):
    sea = ["東京湾の船", "船と波と海", "海の風と波"] * 5
    law = ["法律と裁判", "裁判官の判決", "契約の法"] * 5
    frame = pl.DataFrame({"text": [f"{t}{n}" for n, t in enumerate(sea + law)],
                          "kind": ["sea"] * 15 + ["law"] * 15})  # fmt: skip
    write_world(tmp_path, target=["船と海", "波の海と船"], frame=frame)
    scores = scored(tmp_path, [{"dsir": {"words": "characters"}}])
    best = scores.sort("dsir_per_ngram", descending=True)[:13]
    assert (best["kind"] == "sea").all()


def test_texts_without_a_word_are_unscored_and_one_example_is_enough(tmp_path: Path):
    write_world(tmp_path, frame=pl.DataFrame({"text": ["ship deck"], "kind": ["sea"]}))
    changes: dict[str, Any] = {"index": {"held_out": 0.0}}
    assert scored(tmp_path, ["dsir"], **changes)["dsir"].is_finite().all()
    other = tmp_path / "blank"
    frame = pl.DataFrame({"text": ["ship deck", "\u200b", "a a"], "kind": ["sea"] * 3})
    write_world(other, frame=frame)
    scores = scored(other, [{"dsir": {"ngrams": [2, 2]}}], **changes)
    assert scores["dsir"].is_null().to_list() == [False, True, False]


def test_all_texts_alike_weigh_alike(tmp_path: Path):
    frame = pl.DataFrame({"text": ["the same words"] * 20, "kind": ["sea"] * 20})
    write_world(tmp_path, frame=frame, target=["the same words"])
    scores = scored(tmp_path, ["dsir"], index={"held_out": 0.0})
    assert scores["dsir"].n_unique() == 1
    assert scores["dsir_key"].n_unique() == 20


def test_a_target_of_other_words_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_world(tmp_path, target=["zzz yyy xxx www"])
    values = values_of(tmp_path, ["dsir"])
    assert main(["score", str(write_config(tmp_path, values))]) == 0
    mark = model_output(RunFolder(tmp_path / "run")).mark() or {}
    assert mark["target_unseen_share"] > 0.5
    assert mark["target_ngrams"] == 7
    assert "stand nowhere in the pool" in capsys.readouterr().err


RUSSIAN = [
    f"Корабль номер {number} вышел из гавани в открытое море, и шторм не утихал."
    for number in range(20)
]


def test_a_target_of_another_language_is_told_though_the_pool_fills_every_bucket(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    target = [*RUSSIAN, "The captain of the ship."]
    write_world(tmp_path, target=target)
    values = values_of(tmp_path, [{"dsir": {"buckets": 50}}])
    assert main(["score", str(write_config(tmp_path, values))]) == 0
    run = RunFolder(tmp_path / "run")
    assert (load_file(model_output(run).path)["pool"] > 0).all()
    scores = table(tmp_path)
    held: set[str] = set()
    for text in scores.filter(pl.col("split") == "train")["text"]:
        held.update(words_and_pairs(text))
    grams = [gram for text in target for gram in words_and_pairs(text)]
    expected = sum(gram not in held for gram in grams) / len(grams)
    assert 0.5 < expected < 1
    found = (model_output(run).mark() or {})["target_unseen_share"]
    assert found == pytest.approx(expected, abs=1e-6)
    assert f"{100 * expected:.0f} % of the target's n-grams" in capsys.readouterr().err


def test_an_ordinary_target_is_not_told_of_unseen_words_or_flat_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_world(tmp_path)
    scored(tmp_path, ["dsir"])
    said = capsys.readouterr().err
    assert "nowhere in the pool" not in said
    assert "of all examples are within" not in said
    assert (largest_output(RunFolder(tmp_path / "run")).mark() or {})["largest"] > 1


def test_weights_that_are_all_alike_are_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_world(tmp_path, target=["The captain of a ship"])  # no n-gram of it twice
    scores = scored(tmp_path, ["dsir"])
    largest = scores["dsir"].abs().max()
    assert isinstance(largest, float)
    assert 0 < largest < 0.001
    said = "the weights of all examples are within 1 % of 1: the target is too small"
    assert capsys.readouterr().err.count(said) == 1
    mark = largest_output(RunFolder(tmp_path / "run")).mark() or {}
    assert mark["largest"] == pytest.approx(largest, rel=1e-5)
    scored(tmp_path, [{"dsir": {"smoothing": 0.3}}])
    assert said not in capsys.readouterr().err


def test_what_cannot_be_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_world(tmp_path, target=["-", "="])
    without = {k: v for k, v in values_of(tmp_path, ["dsir"]).items() if k != "target"}
    assert main(["score", str(write_config(tmp_path, without))]) == 2
    assert "scorer dsir compares every example with a target" in capsys.readouterr().err
    bad = values_of(tmp_path, [{"dsir": {"ngrams": [2, 2]}}])
    assert main(["score", str(write_config(tmp_path, bad))]) == 3
    said = capsys.readouterr().err
    assert "the target has no n-grams" in said
    assert "the option `ngrams` of the scorer dsir under score.scorers" in " ".join(said.split())
    numbers = pl.DataFrame({"x": [[1.0, 2.0]] * 5})
    numbers.write_parquet(tmp_path / "numbers.parquet")
    wrong = values_of(
        tmp_path, ["dsir"], sources={"web": {"path": str(tmp_path / "numbers.parquet"),
                                             "features": "x"}}, run="numbers",
    )  # fmt: skip
    assert main(["score", str(write_config(tmp_path, wrong))]) == 2
    assert "counts words, and the examples are numbers" in capsys.readouterr().err
