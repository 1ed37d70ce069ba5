"""`duplicates` from settings to groups, shards and restarts, against plain loops."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from killed import is_killed, run_to_end
from safetensors.numpy import load_file

import curate
from curate.config import plain, to_yaml
from curate.data.example import KEY
from curate.data.layout import RunFolder
from curate.errors import ConfigError, InputError
from jobs.cluster import Cluster, InlineExecutor, Pool, open_pool
from jobs.duplicates import num_cells
from jobs.duplicates_texts import normalised_hashes
from jobs.embedding import embed_run
from jobs.index import index_run
from jobs.plan import plan_run
from jobs.score import plan_score, score_run
from jobs.score_check import check_scores
from jobs.settings import Settings, parse_settings
from scorers.duplicates import Duplicates

INLINE = Pool(InlineExecutor(), 1)
WORDS = [f"word{number}" for number in range(300)]


def sentence(seed: int, words: int = 12) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def write(path: Path, texts: Sequence[str], **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame({"text": texts, **columns}).write_parquet(path)


def settings_of(root: Path, run: str = "run", *, more: Any = None, **options: Any) -> Settings:
    """Two sources, `a` and `b`, in folders of their names; nothing is held out."""
    sources = {
        name: {"path": str(root / name), "text": "text"}
        for name in ("a", "b")
        if (root / name).is_dir()
    }
    values: dict[str, Any] = {
        "run": str(root / run),
        "sources": sources,
        "index": {"held_out": 0.0, "partition_rows": 7},
        "score": {"scorers": [{"duplicates": options}]},
        **(more or {}),
    }
    return parse_settings(values)


def scored(settings: Settings, pool: Pool = INLINE) -> pl.DataFrame:
    """Scores beside the index, in the order of the run."""
    index_run(settings, pool=pool)
    if settings.score.named["duplicates"].get("method") == "semantic":
        embed_run(settings, pool=pool)
    score_run(settings, pool=pool)
    opened = curate.open(settings.run)
    names = opened.examples.select(*KEY, "split", "num_chars", "content")
    return opened.scores.join(names, on=list(KEY)).sort(KEY).collect()


def groups_of(settings: Settings) -> pl.DataFrame:
    paths = Path(settings.run).glob("duplicates/groups/*.parquet")
    return pl.concat([pl.read_parquet(path) for path in paths]).sort(KEY)


def summary_of(settings: Settings) -> dict[str, Any]:
    return json.loads((Path(settings.run) / "duplicates" / "summary.json").read_text())


def by_content(texts: Sequence[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for place, text in enumerate(texts):
        found.setdefault(text, []).append(place)
    return found


@pytest.fixture
def copies(tmp_path: Path) -> list[str]:
    """60 texts in three files of two sources, in canonical order; some stand there again."""
    texts = [sentence(seed) for seed in range(60)]
    for place, original in ((9, 2), (33, 2), (59, 2), (20, 19), (45, 44), (58, 30)):
        texts[place] = texts[original]
    write(tmp_path / "a" / "one.parquet", texts[:25])
    write(tmp_path / "a" / "two.parquet", texts[25:40])
    write(tmp_path / "b" / "one.parquet", texts[40:])
    return texts


def test_the_first_of_equal_contents_stays_across_files_and_sources(
    tmp_path: Path, copies: list[str]
):
    settings = settings_of(tmp_path)
    found = scored(settings)
    places = by_content(copies)
    for place, text in enumerate(copies):
        own = places[text]
        row = found.row(place, named=True)
        assert row["duplicate_keep"] == (place == own[0])
        assert row["duplicate_size"] == len(own)
        assert row["duplicate_weight"] == pytest.approx(1 / len(own))
        assert row["duplicate_similarity"] == (place != own[0])
        assert row["duplicate_held_out"] == 0
    groups = groups_of(settings)
    assert groups.height == sum(len(own) for own in places.values() if len(own) > 1)
    assert groups["group"].dtype == pl.Int64
    first = found.with_row_index("place").filter(duplicate_size=4)["place"][0]
    assert groups.filter(group=first)["keep"].to_list() == [True, False, False, False]
    facts = summary_of(settings)
    assert (facts["removed"], facts["groups"], facts["largest"]) == (6, 4, 4)


def test_partitions_do_not_matter(tmp_path: Path, copies: list[str]):
    for options in ({}, {"method": "near"}, {"method": "semantic"}):
        one = scored(settings_of(tmp_path, f"one{len(options)}", **options))
        index = {"held_out": 0.0, "partition_rows": 1000}
        two = scored(settings_of(tmp_path, f"two{len(options)}", more={"index": index}, **options))
        assert one.equals(two)


def test_normalised_texts_differ_by_their_words_only(tmp_path: Path):
    texts = [
        "The cat, the DOG.", "the cat the dog", "  The cat\n\tthe dog!! ", "the cat the dogs",
        "catthe dog", "!!!", "???", "ﬁne", "Fine",
    ]  # fmt: skip
    write(tmp_path / "a" / "one.parquet", texts)
    plain_run = scored(settings_of(tmp_path))
    assert plain_run["duplicate_size"].to_list() == [1] * 9
    found = scored(settings_of(tmp_path, normalize=True))
    assert found["duplicate_size"].to_list() == [3, 3, 3, 1, 1, 1, 1, 2, 2]
    assert found["duplicate_keep"].to_list() == [1, 0, 0, 1, 1, 1, 1, 1, 0]


def test_fields_and_turns_keep_their_borders():
    pairs = pl.DataFrame({"prompt": ["a b", "a", "A b."], "response": ["c", "b c", "c"]})
    keys = normalised_hashes(pairs)
    assert [tuple(key) == tuple(keys[0]) for key in keys.tolist()] == [True, False, True]

    def chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
        return [{"role": role, "content": said} for role, said in turns]

    chats = pl.DataFrame(
        {
            "messages": [
                chat(("user", "Hi there"), ("assistant", "Yes")),
                chat(("user", "hi, there!"), ("assistant", "yes.")),
                chat(("user", "hi"), ("assistant", "yes")),
                chat(("assistant", "hi there"), ("user", "yes")),
            ]
        }
    )
    keys = normalised_hashes(chats)
    assert [tuple(key) == tuple(keys[0]) for key in keys.tolist()] == [True, True, False, False]


def shingles(text: str, size: int = 3) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    size = size if len(words) >= size else 1
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def jaccard(left: str, right: str) -> float:
    a, b = shingles(left), shingles(right)
    return len(a & b) / len(a | b) if a | b else 0.0


def test_near_duplicates_are_those_with_many_ngrams_in_common(tmp_path: Path):
    texts = [sentence(seed, 60) for seed in range(40)]
    texts[12] = texts[3].upper() + "!"  # the same words
    texts[20] = texts[3] + " one two"
    texts[31] = texts[5].replace(texts[5].split()[30], "another")
    texts[33] = " ".join(texts[6].split()[:30] + texts[7].split()[:30])  # half of two others
    texts += ["short text", "Short text.", "!!!", "..."]
    write(tmp_path / "a" / "one.parquet", texts)
    settings = settings_of(tmp_path, method="near")
    found = scored(settings)
    for place in range(42):
        best = max((jaccard(texts[place], texts[b]) for b in range(place)), default=0)
        value = found["duplicate_similarity"][place]
        if best > 0.6:
            assert value == pytest.approx(best, abs=4 * (0.25 / 120) ** 0.5)
        assert found["duplicate_keep"][place] == (best <= 0.7)
    assert found["duplicate_keep"].sum() == 44 - 4
    # Without a word there is nothing to compare.
    assert found["duplicate_similarity"][42:].to_list() == [None, None]
    assert found["duplicate_keep"][42:].to_list() == [1, 1]
    assert summary_of(settings)["not_compared"] == 2


def test_near_duplicates_of_long_chains_of_copies(tmp_path: Path):
    """More rows in a bucket than are compared with each other."""
    base = sentence(1, 80)
    texts = [base + f" tail{number}" for number in range(60)] + [sentence(2, 80)]
    write(tmp_path / "a" / "one.parquet", texts)
    found = scored(settings_of(tmp_path, method="near"))
    assert found["duplicate_keep"].to_list() == [1] + [0] * 59 + [1]
    assert found["duplicate_size"].to_list() == [60] * 60 + [1]


def test_characters_serve_languages_without_spaces(tmp_path: Path):
    base = "今日は天気がとても良いので散歩に行きま"
    texts = [base + "しょう", base + "す", "機械学習のためのデータを選ぶ道具です"]
    write(tmp_path / "a" / "one.parquet", texts)
    options: dict[str, Any] = {"method": "near", "threshold": 0.6, "ngrams": 2}
    words = scored(settings_of(tmp_path, "words", **options))
    assert words["duplicate_keep"].to_list() == [1, 1, 1]
    found = scored(settings_of(tmp_path, words="characters", **options))
    assert found["duplicate_keep"].to_list() == [1, 0, 1]


def published(vectors: np.ndarray, order: Sequence[int]) -> dict[int, float]:
    """Row -> largest cosine with any row before it: SemDeDup's code, every pair in float64."""
    ordered = list(order)
    wide = vectors[ordered].astype(np.float64)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    products = np.triu(wide @ wide.T, k=1)
    return dict(zip(ordered, products.max(axis=0).tolist(), strict=True))


@pytest.fixture
def clouds(tmp_path: Path) -> np.ndarray:
    """90 vectors in 30 clouds of three, some rows copied whole, two without a direction."""
    generator = np.random.default_rng(5)
    centres = np.repeat(generator.standard_normal((30, 6)), 3, axis=0)
    vectors = (centres + 0.12 * generator.standard_normal((90, 6))).astype(np.float32)
    texts = [sentence(seed) for seed in range(90)]
    for place, original in ((50, 4), (88, 4), (70, 69)):
        vectors[place], texts[place] = vectors[original], texts[original]
    vectors[10], vectors[11] = 0, np.nan
    write(tmp_path / "a" / "one.parquet", texts[:60], v=vectors[:60])
    write(tmp_path / "b" / "one.parquet", texts[60:], v=vectors[60:])
    return vectors


COLUMN = {"embed": {"given": {"kind": "column", "column": "v"}}}


@pytest.mark.parametrize("keep_by", [None, "first", "central", "num_chars"])
@pytest.mark.parametrize("threshold", [0.99, 0.95, 0.8])
def test_similar_rows_give_way_as_published(
    tmp_path: Path, clouds: np.ndarray, keep_by: str | None, threshold: float
):
    settings = settings_of(
        tmp_path, more=COLUMN, method="semantic", threshold=threshold, keep_by=keep_by
    )
    found = scored(settings)
    rows = [row for row in range(90) if row not in (10, 11)]
    wide = clouds[rows].astype(np.float64)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    centre = wide.mean(axis=0) / np.linalg.norm(wide.mean(axis=0))
    distance = dict(zip(rows, (-(wide @ centre)).tolist(), strict=True))
    chars = found["num_chars"].to_list()
    before: Callable[[int], Any] = {
        None: lambda row: (-round(distance[row], 5), row),
        "first": lambda row: row,
        "central": lambda row: (round(distance[row], 5), row),
        "num_chars": lambda row: (-chars[row], row),
    }[keep_by]
    largest = published(clouds, sorted(rows, key=before))
    similarity = found["duplicate_similarity"].to_list()
    assert [similarity[row] for row in rows] == pytest.approx(
        [max(0, largest[row]) for row in rows], abs=1e-5
    )
    assert similarity[10:12] == [None, None]
    keep = found["duplicate_keep"].to_list()
    assert [keep[row] for row in rows] == [largest[row] <= threshold for row in rows]
    assert keep[10:12] == [1, 1]
    groups = groups_of(settings)
    sizes = groups.group_by("group").agg(pl.len(), pl.col("keep").sum())
    assert (sizes["keep"] == 1).all()
    stays = found.filter((pl.col("duplicate_keep") == 1) & (pl.col("duplicate_size") > 1))
    assert sorted(sizes["len"]) == sorted(stays["duplicate_size"].cast(pl.Int64))
    facts = summary_of(settings)
    assert facts["not_compared"] == 2
    assert facts["removed"] == keep.count(0)


def test_another_threshold_needs_no_other_pass(tmp_path: Path, clouds: np.ndarray):
    """The similarities of one run tell what any threshold removes, exact copies too."""
    loose = scored(settings_of(tmp_path, more=COLUMN, method="semantic", threshold=0.5))
    for threshold in (0.8, 0.9, 0.97):
        settings = settings_of(tmp_path, more=COLUMN, method="semantic", threshold=threshold)
        marks = [p.stat().st_mtime_ns for p in Path(settings.run).glob("duplicates/pairs/*.saf*")]
        strict = scored(settings)
        removed = (loose["duplicate_similarity"] > threshold).fill_null(False)
        assert (strict["duplicate_keep"] == 0).equals(removed.alias("duplicate_keep"))
        assert marks == [
            p.stat().st_mtime_ns for p in Path(settings.run).glob("duplicates/pairs/*.saf*")
        ]


def test_rows_are_compared_within_their_cells(tmp_path: Path, clouds: np.ndarray):
    settings = settings_of(tmp_path, more=COLUMN, method="semantic", cells=6, keep_by="first")
    found = scored(settings)
    run = RunFolder(Path(settings.run))
    cells = np.concatenate(
        [
            load_file(run.root / "duplicates" / "cells" / f"{part.name}.safetensors")["cells"]
            for part in run.partitions()
        ]
    )
    assert set(cells.tolist()) == {-1, 0, 1, 2, 3, 4, 5}
    assert np.flatnonzero(cells == -1).tolist() == [10, 11]
    for cell in range(6):
        rows = np.flatnonzero(cells == cell).tolist()
        largest = published(clouds, rows)
        assert [found["duplicate_similarity"][row] for row in rows] == pytest.approx(
            [max(0, largest[row]) for row in rows], abs=1e-5
        )


def test_more_cells_than_rows_and_a_single_row(tmp_path: Path, clouds: np.ndarray):
    found = scored(settings_of(tmp_path, more=COLUMN, method="semantic", cells=4000))
    assert found["duplicate_keep"].to_list()[50] == 0  # copies give way wherever they lie
    write(tmp_path / "one" / "a" / "x.parquet", ["a single row"], v=[[1.0, 0.0]])
    several: list[dict[str, Any]] = [{}, {"method": "near"}, {"method": "semantic", "cells": 3}]
    for options in several:
        settings = settings_of(
            tmp_path / "one", f"run{len(options)}", more=COLUMN if len(options) == 2 else None,
            **options,
        )  # fmt: skip
        found = scored(settings)
        assert found["duplicate_keep"].to_list() == [1]
        assert found["duplicate_similarity"].to_list() == [0]


def test_vectors_that_are_all_missing_leave_contents(tmp_path: Path):
    texts = [sentence(1), sentence(2), sentence(1)]
    write(tmp_path / "a" / "one.parquet", texts, v=[[0.0, 0.0]] * 3)
    for cells in (None, 2):
        settings = settings_of(tmp_path, more=COLUMN, method="semantic", cells=cells)
        found = scored(settings)
        assert found["duplicate_keep"].to_list() == [1, 1, 0]
        assert found["duplicate_similarity"].to_list() == [None, None, 1]


def test_cells_follow_the_size_of_the_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "a" / "one.parquet", ["x"])
    settings = settings_of(tmp_path)
    index_run(settings, pool=INLINE)
    run = RunFolder(Path(settings.run))
    for rows, cells in ((1, 1), (20_000, 1), (20_001, 2), (1_000_000, 100)):
        monkeypatch.setattr("jobs.duplicates.num_rows", lambda *_, rows=rows: rows)
        assert num_cells(run, Duplicates(method="semantic")) == cells
    assert num_cells(run, Duplicates(method="semantic", cells=7)) == 7


def held_out_pool(root: Path) -> list[str]:
    """100 documents; of each third one the text stands in a train and a held-out row or more."""
    texts = [sentence(seed % 70) for seed in range(100)]
    write(root / "a" / "one.parquet", texts, doc=[f"d{n}" for n in range(100)])
    return texts


def held_out_settings(root: Path, **options: Any) -> Settings:
    source = {"path": str(root / "a"), "text": "text", "document": "doc"}
    more = {"sources": {"a": source}, "index": {"held_out": 0.4, "partition_rows": 9}}
    return settings_of(root, f"run{options.get('method')}", more=more, **options)


@pytest.mark.parametrize("method", ["exact", "near", "semantic"])
def test_held_out_rows_neither_stay_for_training_rows_nor_give_way_to_them(
    tmp_path: Path, method: str
):
    texts = held_out_pool(tmp_path)
    settings = held_out_settings(tmp_path, method=method, keep_by="first")
    found = scored(settings)
    splits = found["split"].to_list()
    assert 20 < splits.count("held_out") < 60
    for split in ("train", "held_out"):
        rows = [row for row in range(100) if splits[row] == split]
        seen: set[str] = set()
        for row in rows:
            assert found["duplicate_keep"][row] == (texts[row] not in seen)
            seen.add(texts[row])
            same = sum(texts[other] == texts[row] for other in rows)
            assert found["duplicate_size"][row] == same
    held = {text for text, split in zip(texts, splits, strict=True) if split == "held_out"}
    leaked = [row for row in range(100) if splits[row] == "train" and texts[row] in held]
    assert leaked
    for row in range(100):
        value = found["duplicate_held_out"][row]
        if splits[row] == "held_out":
            assert value is None
        else:
            assert (value == 1) == (row in leaked)
            assert 0 <= value <= 1
    facts = summary_of(settings)
    assert facts["like_held_out"] == len(leaked)
    assert f"{len(leaked)} repeat a held-out one" in facts["says"]


def test_a_similar_held_out_row_is_reported(tmp_path: Path):
    base = sentence(3, 60)
    texts = [base + " tail", *(sentence(seed, 60) for seed in range(10, 40)), base]
    write(tmp_path / "a" / "one.parquet", texts, doc=[f"d{n}" for n in range(32)])
    for method in ("near", "semantic"):
        settings = held_out_settings(tmp_path, method=method)
        for seed in range(50):
            settings = replace(settings, seed=seed, run=f"{tmp_path}/{method}-{seed}")
            index_run(settings, pool=INLINE)
            opened = curate.open(settings.run).examples.sort("row").collect()
            if (opened["split"][0], opened["split"][31]) == ("train", "held_out"):
                break
        found = scored(settings)
        assert found["duplicate_held_out"][0] > 0.9
        assert found["duplicate_keep"][0] == 1
        assert found["duplicate_similarity"][0] < 0.5
        assert (found["duplicate_held_out"][1:31].fill_null(0) < 0.8).all()


def test_the_best_of_a_group_by_other_scores_stays(tmp_path: Path, copies: list[str]):
    quality = [float(n * 37 % 60) for n in range(60)]
    files = ["one.parquet"] * 25 + ["two.parquet"] * 15 + ["one.parquet"] * 20
    rows = [*range(25), *range(15), *range(20)]
    pl.DataFrame(
        {"source": ["a"] * 40 + ["b"] * 20, "file": files, "row": rows, "quality": quality}
    ).filter(pl.col("quality") != quality[2]).write_parquet(tmp_path / "quality.parquet")
    places = by_content(copies)

    def best(value: Callable[[int], float]) -> list[bool]:
        found = [max(own, key=lambda row: (value(row), -row)) for own in places.values()]
        return [place in found for place in range(60)]

    def known(row: int) -> float:
        return -1.0 if quality[row] == quality[2] else quality[row]

    for order, value in (
        ("quality", known),
        ("-quality", lambda row: -100.0 if row == 2 else -quality[row]),
        ("rank(quality) + 0*length.num_chars", known),
        (
            "quality > 30 and num_chars > 10",
            lambda row: -1 if row == 2 else float(quality[row] > 30),
        ),
    ):
        scorers = [
            {"duplicates": {"keep_by": order}},
            "length",
            {"external": {"outside": str(tmp_path / "quality.parquet")}},
        ]
        settings = settings_of(tmp_path, more={"score": {"scorers": scorers}})
        check_scores(settings)
        index_run(settings, pool=INLINE)
        assert plan_score(settings).done < plan_score(settings).total  # before there are scores
        found = scored(settings)
        assert found["duplicate_keep"].to_list() == best(value), order
        assert score_run(settings, pool=INLINE)["done"] == 0
        assert plan_score(settings).done == plan_score(settings).total


def test_other_scores_of_the_same_run_change_the_choice(tmp_path: Path, copies: list[str]):
    table = pl.DataFrame({"id": [str(n) for n in range(60)], "q": np.arange(60.0)})
    for name, start, end in (("a/one", 0, 25), ("a/two", 25, 40), ("b/one", 40, 60)):
        write(
            tmp_path / f"{name}.parquet", copies[start:end], n=[str(n) for n in range(start, end)]
        )
    sources = {n: {"path": str(tmp_path / n), "text": "text", "id": "n"} for n in ("a", "b")}
    scorers = [{"duplicates": {"keep_by": "q"}}, {"external": {"x": str(tmp_path / "x.parquet")}}]
    settings = settings_of(tmp_path, more={"sources": sources, "score": {"scorers": scorers}})
    places = by_content(copies)
    for pick in (max, min):
        table.with_columns(q=pl.col("q") * (1 if pick is max else -1)).write_parquet(
            tmp_path / "x.parquet"
        )
        found = scored(settings)
        stays = {pick(own) for own in places.values()}
        assert found["duplicate_keep"].to_list() == [row in stays for row in range(60)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep_by": "longst"}, ConfigError, "no score column longst"),
        ({"keep_by": "num_tokens + 1"}, ConfigError, "counted for the plan only"),
        ({"keep_by": "1 +"}, ConfigError, "is not an expression"),
        ({"method": "semantic", "vectors": "other"}, ConfigError, "no representation 'other'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_read(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
):
    write(tmp_path / "a" / "one.parquet", ["a"])
    settings = settings_of(tmp_path, **options)
    with pytest.raises(error, match=message):
        check_scores(settings)
    assert not Path(settings.run).exists()


def test_numbers_have_contents_and_vectors_but_no_words(tmp_path: Path):
    (tmp_path / "a").mkdir()
    vectors = [[1.0, 2.0], [1.0, 2.0], [2.0, 4.1], [5.0, -1.0]]
    pl.DataFrame({"x": vectors}).write_parquet(tmp_path / "a" / "n.parquet")
    more = {"sources": {"a": {"path": str(tmp_path / "a"), "features": "x"}}}
    several: list[dict[str, Any]] = [{"method": "near"}, {"normalize": True}]
    for options in several:
        with pytest.raises(ConfigError, match="a source has none"):
            check_scores(settings_of(tmp_path, more=more, **options))
    assert scored(settings_of(tmp_path, more=more))["duplicate_keep"].to_list() == [1, 0, 1, 1]
    settings = settings_of(tmp_path, more=more, method="semantic", threshold=0.99, keep_by="first")
    assert scored(settings)["duplicate_keep"].to_list() == [1, 0, 0, 1]


def test_vectors_that_are_not_normalised_are_refused(tmp_path: Path):
    write(tmp_path / "a" / "one.parquet", ["a"])
    more = {"embed": {"raw": {"kind": "ngrams", "normalize": False}}}
    with pytest.raises(ConfigError, match="raw are not normalised"):
        check_scores(settings_of(tmp_path, more=more, method="semantic"))


def test_without_vectors_the_user_is_sent_to_embed(tmp_path: Path):
    write(tmp_path / "a" / "one.parquet", ["a"])
    settings = settings_of(tmp_path, method="semantic")
    index_run(settings, pool=INLINE)
    with pytest.raises(InputError) as caught:
        score_run(settings, pool=INLINE)
    assert "curate embed" in caught.value.fix


def test_groups_of_several_labels_are_counted(tmp_path: Path):
    texts = [sentence(n % 4) for n in range(12)]
    write(tmp_path / "a" / "one.parquet", texts, label=[0, 1, 0, 1, 0, 1, 1, 1, 0, 1, 0, 1])
    source = {"path": str(tmp_path / "a"), "text": "text", "label": "label"}
    settings = settings_of(tmp_path, more={"sources": {"a": source}})
    scored(settings)
    assert summary_of(settings)["groups_of_several_labels"] == 1
    assert "1 group of more than one label" in summary_of(settings)["says"]


def test_a_run_goes_on_where_it_stopped_and_redoes_what_changed(
    tmp_path: Path, copies: list[str], monkeypatch: pytest.MonkeyPatch
):
    settings = settings_of(tmp_path, method="near")
    whole = scored(settings_of(tmp_path, "whole", method="near"))
    index_run(settings, pool=INLINE)
    from jobs import duplicates_groups

    def broken(_: Any) -> Any:
        raise InputError("the power fails", fix="wait")

    monkeypatch.setattr(duplicates_groups, "groups_work", broken)
    with pytest.raises(InputError, match="power fails"):
        score_run(settings, pool=INLINE)
    assert not list(Path(settings.run).glob("scores/duplicates/*.parquet"))
    monkeypatch.undo()
    times = {p: p.stat().st_mtime_ns for p in Path(settings.run).glob("duplicates/*/*")}
    assert scored(settings).equals(whole)
    assert all(path.stat().st_mtime_ns == when for path, when in times.items())
    assert bytes_below(Path(settings.run)) == bytes_below(tmp_path / "whole")
    # A new file: texts of the others are not read again.
    write(tmp_path / "b" / "two.parquet", [copies[0], sentence(999)])
    found = scored(settings)
    assert found["duplicate_keep"].to_list() == [*whole["duplicate_keep"], 0, 1]
    kept = [p for p in times if "texts/part" in p.as_posix()]
    assert kept
    assert all(path.stat().st_mtime_ns == times[path] for path in kept)
    for folder in ("duplicates/texts", "duplicates"):  # may be removed once the scores are there
        shutil.rmtree(Path(settings.run) / folder)
        assert score_run(settings, pool=INLINE)["done"] == 0


def bytes_below(run: Path) -> dict[str, bytes]:
    paths = [*run.glob("scores/*/*.parquet"), *run.glob("quantities/*/*.parquet"),
             *run.glob("duplicates/**/*.safetensors"), *run.glob("duplicates/**/*.npy"),
             *run.glob("duplicates/**/*.parquet"), *run.glob("duplicates/*.json")]  # fmt: skip
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in paths}


def test_soft_weights_count_a_group_as_one_example(tmp_path: Path, copies: list[str]):
    plan = {"weights": {"score": "duplicate_weight"}}
    settings = settings_of(tmp_path, more={"plan": plan})
    scored(settings)
    plan_run(settings, pool=INLINE)
    run = RunFolder(Path(settings.run))
    table = pl.concat([pl.read_parquet(run.planned(p).path) for p in run.partitions()]).sort(KEY)
    assert table["keep"].all()
    totals = {text: sum(table["weight"][row] for row in own)
              for text, own in by_content(copies).items()}  # fmt: skip
    assert len(totals) == 54
    assert list(totals.values()) == pytest.approx([60 / 54] * 54, rel=1e-5)


def command_of(root: Path, settings: dict[str, Any], *, name: str = "run") -> list[str]:
    config = root / "c.yaml"
    config.write_text(to_yaml(settings))
    return [sys.executable, "-m", "curate", name, str(config)]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def shard_texts(run: Path) -> list[str]:
    return sorted(t for p in run.glob("shards/**/*.parquet") for t in pl.read_parquet(p)["text"])


@pytest.mark.slow
def test_the_command_line_leaves_planted_copies_out(tmp_path: Path, copies: list[str]):
    values = {
        "run": str(tmp_path / "run"),
        "sources": {n: {"path": str(tmp_path / n), "text": "text"} for n in ("a", "b")},
        "index": {"held_out": 0.0, "partition_rows": 8},
        "score": {"scorers": ["duplicates"]},
        "plan": {"drop": "duplicate_keep == 0"},
    }
    done = subprocess.run(
        command_of(tmp_path, values), check=True, capture_output=True, text=True, env=ENVIRONMENT
    )
    assert "6 of 60 training examples repeat another one, in 4 groups" in done.stdout + done.stderr
    assert "6 were dropped first" in done.stdout
    assert shard_texts(tmp_path / "run") == sorted(set(copies))
    summary = json.loads((tmp_path / "run" / "plan" / "summary.json").read_text())
    assert summary["dropped"]["rows"] == summary["reasons"]["dropped"] == 6


@pytest.mark.slow
def test_a_table_of_another_tool_drops_its_duplicates(tmp_path: Path, copies: list[str]):
    """A tool that names only what it would remove, by the user's own ids."""
    for name, start, end in (("a/one", 0, 25), ("a/two", 25, 40), ("b/one", 40, 60)):
        write(
            tmp_path / f"{name}.parquet", copies[start:end], n=[str(n) for n in range(start, end)]
        )
    places = by_content(copies)
    removed = [str(row) for own in places.values() for row in own[1:]]
    table = pl.DataFrame({"id": removed, "is_duplicate": [True] * len(removed)})
    table.write_parquet(tmp_path / "theirs.parquet")
    values = {
        "run": str(tmp_path / "run"),
        "sources": {n: {"path": str(tmp_path / n), "text": "text", "id": "n"} for n in ("a", "b")},
        "index": {"held_out": 0.0},
        "score": {"scorers": [{"external": {"theirs": str(tmp_path / "theirs.parquet")}}]},
        "plan": {"drop": "is_duplicate"},
    }
    subprocess.run(command_of(tmp_path, values), check=True, capture_output=True, env=ENVIRONMENT)
    assert shard_texts(tmp_path / "run") == sorted(set(copies))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["near", "semantic"])
def test_two_workers_write_the_bytes_of_one_process(
    tmp_path: Path, clouds: np.ndarray, method: str
):
    options: dict[str, Any] = {"method": method, "cells": 4}
    scored(settings_of(tmp_path, more=COLUMN, **options))
    settings = settings_of(tmp_path, "dask", more=COLUMN, **options)
    with open_pool(Cluster(kind="local", workers=2)) as workers:
        scored(settings, workers)
    assert bytes_below(tmp_path / "dask") == bytes_below(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["texts", "pairs"])
def test_a_run_that_is_killed_and_started_again_gives_the_same_bytes(
    tmp_path: Path, copies: list[str], moment: str
):
    settings = settings_of(tmp_path, "whole", method="near")
    scored(settings)
    killed = tmp_path / "killed"
    values = plain(replace(settings, run=str(killed)))
    command = command_of(tmp_path, values, name="score")
    assert is_killed(command, (killed / "duplicates" / moment).exists)
    assert not list(killed.glob("scores/duplicates/*.parquet"))
    run_to_end(command)
    assert bytes_below(killed) == bytes_below(tmp_path / "whole")
