"""N-grams of whole columns of texts against a loop over each text."""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.models.text_ngrams import Places, Unit, buckets_of, ngram_blocks

TEXTS = [
    "The cat, the cat!",
    "",
    "a",
    "  ",
    "x y z x y z",
    "Straße 東京 東京タワー",
    "...",
    "A b\nc\t d",
]


def parts(text: str, unit: Unit, *, punctuation: bool = True) -> list[str]:
    if unit == "characters":
        return list(re.sub(r"\s+", " ", text.lower()).strip())
    return re.findall(r"\w+|[^\w\s]+" if punctuation else r"\w+", text.lower())


def by_loop(texts: list[str], low: int, high: int, unit: Unit) -> list[Counter[tuple[str, ...]]]:
    found: list[Counter[tuple[str, ...]]] = []
    for text in texts:
        own = parts(text, unit)
        runs = [
            tuple(own[i : i + n]) for n in range(low, high + 1) for i in range(len(own) - n + 1)
        ]
        found.append(Counter(runs))
    return found


def by_hash(
    texts: list[str], low: int, high: int, unit: Unit, block_chars: int = 4000
) -> list[Counter[int]]:
    found: list[Counter[int]] = [Counter() for _ in texts]
    for block in ngram_blocks(texts, ngrams=(low, high), unit=unit, block_chars=block_chars):
        for text, value in zip(block.texts.tolist(), block.hashes.tolist(), strict=True):
            found[block.first + text][value] += 1
    return found


@pytest.mark.parametrize("unit", ["words", "characters"])
@pytest.mark.parametrize(("low", "high"), [(1, 1), (1, 2), (2, 3), (3, 5)])
def test_every_run_has_one_hash_and_every_hash_one_run(unit: Unit, low: int, high: int):
    expected, found = by_loop(TEXTS, low, high, unit), by_hash(TEXTS, low, high, unit)
    names: dict[tuple[str, ...], int] = {}
    for wanted, got in zip(expected, found, strict=True):
        assert sorted(wanted.values()) == sorted(got.values())
    for run in {run for counter in expected for run in counter}:
        sep = "" if unit == "characters" else " "
        alone = by_hash([sep.join(run)], len(run), len(run), unit)[0]
        if sum(alone.values()) == 1:  # a blank at the end is cut off
            names[run] = next(iter(alone))
    assert len(set(names.values())) == len(names)
    for wanted, got in zip(expected, found, strict=True):
        for run, count in wanted.items():
            if run in names:
                assert got[names[run]] == count


@given(st.lists(st.text(alphabet="aB1_ .,-é東\n\t", max_size=12), max_size=8), st.integers(1, 30))
def test_blocks_change_nothing(texts: list[str], block_chars: int):
    whole = by_hash(texts, 1, 3, "words")
    assert by_hash(texts, 1, 3, "words", block_chars=block_chars) == whole
    assert [sum(c.values()) for c in whole] == [
        sum(max(0, len(parts(text, "words")) - n) for n in range(3)) for text in texts
    ]


def test_hashes_are_the_same_on_every_machine():
    block = next(iter(ngram_blocks(["a b"], ngrams=(1, 2))))
    assert block.texts.tolist() == [0, 0, 0]
    # xxh3 of "a" and of "b", as the reference implementation gives them
    assert [f"{h:016x}" for h in block.hashes[:2].tolist()] == [
        "e6c632b61e964e1f", "575a0b1c44d8843f"
    ]  # fmt: skip
    fold = (0xE6C632B61E964E1F * 0x9E3779B97F4A7C15 + 0x575A0B1C44D8843F) % 2**64
    fold = ((fold ^ (fold >> 32)) * 0xD6E8FEB86659FD93) % 2**64
    assert int(block.hashes[2]) == fold ^ (fold >> 29)


def test_punctuation_is_left_out_on_demand():
    block = next(iter(ngram_blocks(["a, b!"], ngrams=(1, 1), punctuation=False)))
    assert len(block.hashes) == 2
    assert len(next(iter(ngram_blocks(["a, b!"], ngrams=(1, 1)))).hashes) == 4


def test_buckets_are_even_and_pairs_of_words_fall_apart():
    """Runs that begin alike must not collide just because their last words do."""
    words = [f"w{i}" for i in range(400)]
    block = next(iter(ngram_blocks([" ".join(words)], ngrams=(1, 1))))
    buckets = buckets_of(block.hashes, 20)
    assert buckets.min() >= 0
    assert np.bincount(buckets, minlength=20).max() < 45
    last = buckets_of(block.hashes, 20)
    pairs: list[Places] = []
    for first in ("one", "two"):
        block = next(iter(ngram_blocks([f"{first} {w}" for w in words], ngrams=(2, 2))))
        pairs.append(buckets_of(block.hashes, 20))
    alike = last[:, None] == last[None, :]
    np.fill_diagonal(alike, False)
    for pair in pairs:
        assert (pair[:, None] == pair[None, :])[alike].mean() < 0.1
