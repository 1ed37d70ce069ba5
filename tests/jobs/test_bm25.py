"""BM25 as part of a run: the scores of a loop over words, restarts, bad input."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from curate.cli import main
from curate.data.layout import RunFolder
from jobs.bm25 import queries_output, weights_output
from tests.jobs.lexical_pool import (
    partitions,
    score_bytes,
    scored,
    texts_of,
    values_of,
    write_config,
    write_world,
)


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def by_loop(pool: list[str], queries: list[str], asked: list[str]) -> np.ndarray:
    """(asked, queries), frequencies and lengths of the pool."""
    documents = [words_of(text) for text in pool]
    mean = sum(map(len, documents)) / len(documents)
    held = {
        word: sum(word in set(document) for document in documents)
        for query in queries
        for word in words_of(query)
    }
    idf = {w: math.log(1 + (len(pool) - n + 0.5) / (n + 0.5)) for w, n in held.items()}
    found = np.zeros((len(asked), len(queries)))
    for i, text in enumerate(asked):
        own = words_of(text)
        penalty = 1.2 * (0.25 + 0.75 * len(own) / mean)
        for j, query in enumerate(queries):
            terms = set(words_of(query))
            parts = [idf[w] * own.count(w) / (own.count(w) + penalty) for w in terms]
            found[i, j] = sum(parts) / sum(idf[w] for w in terms)
    return found


@pytest.mark.parametrize("combine", ["mean", "max"])
def test_scores_are_those_of_a_loop(tmp_path: Path, combine: str):
    write_world(tmp_path)
    scores = scored(tmp_path, [{"bm25": {"combine": combine}}])
    train = scores.filter(pl.col("split") == "train")["text"].to_list()
    queries = pl.read_parquet(tmp_path / "target.parquet")["text"].to_list()
    expected = by_loop(train, queries, scores["text"].to_list())
    if combine == "mean":
        np.testing.assert_allclose(scores["bm25"], expected.mean(axis=1), rtol=1e-6)
        assert scores["bm25_row"].null_count() == scores.height
    else:
        np.testing.assert_allclose(scores["bm25"], expected.max(axis=1), rtol=1e-6)
        row = scores["bm25_row"].fill_null(0).cast(pl.Int64).to_numpy()
        np.testing.assert_allclose(expected[np.arange(len(row)), row], scores["bm25"], rtol=1e-6)
    assert 0 < (scores["split"] == "held_out").sum() < 60
    best = scores.sort("bm25", descending=True)[:50]
    assert (best["kind"] == "sea").sum() > 47


@pytest.mark.parametrize("combine", ["mean", "max"])
def test_partitions_change_nothing(tmp_path: Path, combine: str):
    write_world(tmp_path)
    scorers = [{"bm25": {"combine": combine}}]
    few = scored(tmp_path, scorers, index={"held_out": 0.1, "partition_rows": 1000})
    more = scored(tmp_path, scorers, run="more", index={"held_out": 0.1, "partition_rows": 7})
    assert partitions(tmp_path) == 2
    assert partitions(tmp_path, "more") > 20
    assert few.equals(more)


def test_a_second_run_does_nothing_and_another_k1_counts_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_world(tmp_path)
    scored(tmp_path, ["bm25"])
    before = score_bytes(tmp_path, "run")

    def fail(_: object) -> object:
        raise AssertionError("counted again")

    monkeypatch.setattr("jobs.bm25.count_work", fail)
    scored(tmp_path, ["bm25"])
    assert score_bytes(tmp_path, "run") == before
    scored(tmp_path, [{"bm25": {"k1": 2.0}}])
    assert score_bytes(tmp_path, "run") != before


def test_new_data_and_a_new_target_change_the_scores(tmp_path: Path):
    write_world(tmp_path)
    first = scored(tmp_path, ["bm25"])
    law = pl.DataFrame({"text": texts_of("law", 10, seed=4), "kind": "law"})
    law.write_parquet(tmp_path / "data" / "zzz.parquet")
    second = scored(tmp_path, ["bm25"])
    assert second.height == 190
    assert second["bm25"][:180].to_list() != first["bm25"].to_list()
    law.select("text").write_parquet(tmp_path / "target.parquet")
    third = scored(tmp_path, ["bm25"])
    assert (third.sort("bm25", descending=True)[:40]["kind"] == "law").sum() > 37
    (tmp_path / "data" / "zzz.parquet").unlink()
    scored(tmp_path, ["bm25"])
    assert len(list((tmp_path / "run" / "bm25" / "counts").glob("*.safetensors"))) == 8


def test_rows_that_say_nothing_are_told_apart(tmp_path: Path):
    frame = pl.DataFrame({"text": ["ship deck ship", "!!!", "court"], "kind": ["sea"] * 3})
    write_world(tmp_path, frame=frame, target=["a ship", "ship", "...", "zzz"])
    changes: dict[str, Any] = {"index": {"held_out": 0.0}}
    scores = scored(tmp_path, [{"bm25": {"combine": "max"}}], **changes)
    assert scores["bm25"].is_null().to_list() == [False, True, False]
    assert scores["bm25"][2] == 0
    # The third row of the target has no word, the fourth none that the pool has.
    assert scores["bm25_row"].to_list() == [1, None, None]
    run = RunFolder(tmp_path / "run")
    assert (queries_output(run).mark() or {})["without_words"] == 1
    assert (weights_output(run).mark() or {})["target_rows_without_match"] == 1
    assert (weights_output(run).mark() or {})["unseen_words_share"] == pytest.approx(2 / 4)


def test_a_target_of_another_language_is_told_though_each_line_has_a_number_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    frame = pl.DataFrame({"text": [f"the ship of {n}" for n in range(30)], "kind": "sea"})
    lines = [f"Корабль вышел в море {n}" for n in range(20)]  # 4 words beside 20 known numbers
    write_world(tmp_path, frame=frame, target=lines)
    scored(tmp_path, ["bm25"], index={"held_out": 0.0})
    mark = weights_output(RunFolder(tmp_path / "run")).mark() or {}
    assert mark["unseen_words_share"] == pytest.approx(0.8)
    assert "80 % of the target's words stand nowhere in the pool" in capsys.readouterr().err


def test_one_example_and_all_alike_are_scored(tmp_path: Path):
    frame = pl.DataFrame({"text": ["ship deck"], "kind": ["sea"]})
    write_world(tmp_path / "one", frame=frame)
    changes: dict[str, Any] = {"index": {"held_out": 0.0}}
    assert scored(tmp_path / "one", ["bm25"], **changes)["bm25"].is_finite().all()
    frame = pl.DataFrame({"text": ["the same words"] * 20, "kind": ["sea"] * 20})
    write_world(tmp_path / "alike", frame=frame, target=["the same words"])
    assert scored(tmp_path / "alike", ["bm25"], **changes)["bm25"].n_unique() == 1


def test_pairs_of_characters_stand_for_words(tmp_path: Path):
    sea = ["東京湾の船", "船と波と海", "海の風と波"] * 5
    law = ["法律と裁判", "裁判官の判決", "契約の法"] * 5
    frame = pl.DataFrame({"text": [f"{t}{n}" for n, t in enumerate(sea + law)],
                          "kind": ["sea"] * 15 + ["law"] * 15})  # fmt: skip
    write_world(tmp_path, target=["船と波", "東京湾", "風と波"], frame=frame)
    scores = scored(tmp_path, [{"bm25": {"words": "characters", "ngrams": [2, 2]}}])
    assert (scores.sort("bm25", descending=True)[:10]["kind"] == "sea").all()


def test_what_cannot_be_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_world(tmp_path, target=["-", "="])
    without = {k: v for k, v in values_of(tmp_path, ["bm25"]).items() if k != "target"}
    assert main(["score", str(write_config(tmp_path, without))]) == 2
    assert "scorer bm25 compares every example with a target" in capsys.readouterr().err
    config = str(write_config(tmp_path, values_of(tmp_path, ["bm25"])))
    assert main(["score", config]) == 3
    said = capsys.readouterr().err
    assert "the target has no words" in said
    assert "the option `ngrams` of the scorer bm25 under score.scorers" in " ".join(said.split())
    pl.DataFrame({"text": ["zzz yyy"]}).write_parquet(tmp_path / "target.parquet")
    assert main(["score", config]) == 3
    assert "no word of the target stands in the pool" in capsys.readouterr().err
