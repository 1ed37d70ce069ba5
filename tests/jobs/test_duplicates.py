"""`duplicates` by contents and by words, against plain loops."""

import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from jobs.duplicates_texts import normalised_hashes
from tests.jobs.duplicates_pool import (
    by_content,
    groups_of,
    scored,
    sentence,
    settings_of,
    summary_of,
    write,
    write_copies,
)


@pytest.fixture
def copies(tmp_path: Path) -> list[str]:
    return write_copies(tmp_path)


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
