"""`duplicates` with held-out rows, with other scores, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import curate
from curate.errors import ConfigError, InputError
from jobs.index import index_run
from jobs.score import plan_score, score_run
from jobs.score_check import check_scores
from jobs.settings import Settings
from tests.jobs.duplicates_pool import (
    INLINE,
    by_content,
    scored,
    sentence,
    settings_of,
    summary_of,
    write,
    write_clouds,
    write_copies,
)


@pytest.fixture
def copies(tmp_path: Path) -> list[str]:
    return write_copies(tmp_path)


@pytest.fixture
def clouds(tmp_path: Path) -> np.ndarray:
    return write_clouds(tmp_path)


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
