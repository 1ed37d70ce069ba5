"""Overlap with evaluation texts, against sets of tuples of words in plain Python."""

import random
import unicodedata
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import polars as pl
import pytest

from curate.models import overlap, text_runs
from curate.models.overlap import Index, matches_in
from curate.models.sought import covered_words, sought_in
from curate.models.text_pieces import pieces_of
from curate.models.text_runs import words_of

SPACELESS = ("CJK UNIFIED", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")


@dataclass
class Rules:
    ngrams: int = 3
    shortest: int = 2
    template: float = 0.01


def plain_words(text: str) -> list[str]:
    """Letter by letter."""
    found: list[str] = []
    before = ""  # what the last sign was part of
    for sign in unicodedata.normalize("NFKC", text).lower():
        kind = unicodedata.category(sign)[0]
        if kind not in "LMN":
            before = ""
        elif unicodedata.name(sign, "").startswith(SPACELESS) and not (kind == "M" and before):
            found.append(sign)
            before = "letter"
        elif before == "word" or (before == "letter" and kind == "M"):
            found[-1] += sign
        else:
            found.append(sign)
            before = "word"
    return found


def runs(words: list[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]


def is_spaceless(words: list[str]) -> bool:
    return 2 * sum(unicodedata.name(w[0], "").startswith(SPACELESS) for w in words) > len(words)


def by_sets(
    documents: list[str], sought: list[str], rules: Rules
) -> dict[tuple[int, int], tuple[float, bool]]:
    """(row, example) -> share and whether equal, of all that share anything."""
    own = [plain_words(text) for text in sought]
    sizes = [min(len(w), rules.ngrams * (1 + is_spaceless(w))) for w in own]
    holders: dict[tuple[str, ...], set[int]] = {}
    for example, (words, size) in enumerate(zip(own, sizes, strict=True)):
        for run in runs(words, size):
            holders.setdefault(run, set()).add(example)
    limit = max(10, rules.template * len(sought))
    found: dict[tuple[int, int], tuple[float, bool]] = {}
    for row, document in enumerate(documents):
        words = plain_words(document)
        for example, (text, size) in enumerate(zip(own, sizes, strict=True)):
            is_equal = bool(text) and words == text
            share = 0.0
            if len(text) >= rules.shortest * (1 + is_spaceless(text)):
                here, there = set(runs(words, size)), set[int]()
                coverable = set[int]()
                for place, run in enumerate(runs(text, size)):
                    if len(holders[run]) <= limit:
                        coverable.update(range(place, place + size))
                        if run in here:
                            there.update(range(place, place + size))
                share = len(there) / len(coverable) if coverable else 0.0
            if share or is_equal:
                found[row, example] = (1.0 if is_equal else share, is_equal)
    return found


def found_in(
    documents: list[str], sought: list[str], rules: Rules, *, found_from: float = 1e-9
) -> dict[tuple[int, int], tuple[float, bool]]:
    one = pieces_of(pl.DataFrame({"text": sought}))
    other = pieces_of(pl.DataFrame({"text": documents}))
    assert one is not None
    assert other is not None
    index = Index.of({"set": sought_in(iter([one]), rules)})
    table = matches_in(other, index, rules, found_from=found_from)
    return {(r["row"], r["example"]): (r["share"], r["exact"]) for r in table.to_dicts()}


def drawn(count: int, *, seed: int, letters: str = "ab c 東京 ไท") -> list[str]:
    draw = random.Random(seed)
    words = [*letters.split(), "D", "e,", "(f)", "ﬁ", "Über", "né", "g.h", "4"]
    texts = [" ".join(draw.choices(words, k=draw.randrange(16))) for _ in range(count)]
    return texts + [draw.choice(texts).upper() + "!" for _ in range(5)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rules", [Rules(), Rules(4, 4), Rules(1, 1, 0.3)])
def test_shares_are_those_of_sets_of_words(
    seed: int, rules: Rules, monkeypatch: pytest.MonkeyPatch
):
    documents, sought = drawn(30, seed=seed), drawn(25, seed=100 + seed)
    documents += [f"x {a} {b}" for a, b in pairwise(sought[:6])] + [sought[7].title() + " ?"]
    expected = by_sets(documents, sought, rules)
    found = found_in(documents, sought, rules)
    assert found.keys() == expected.keys()
    for pair, (share, is_equal) in expected.items():
        assert found[pair] == (pytest.approx(share), is_equal)
    assert any(0 < share < 1 for share, _ in expected.values())
    assert any(is_equal for _, is_equal in expected.values())
    monkeypatch.setattr(overlap, "_MATCHES", 3)
    monkeypatch.setattr(text_runs.row_blocks, "__kwdefaults__", {"block_chars": 40})
    assert found_in(documents, sought, rules) == found


@pytest.mark.parametrize(
    "text",
    [
        "Hello, WORLD_x ﬁn né don\u2019t",
        "東京タワー is カタ①",
        "ภาษาไทย กำ",
        "3.5 ½ ²",
        "--- !",
        "한국어 말",
        "",
    ],
)
def test_words_are_those_found_letter_by_letter(text: str):
    expected = plain_words(text)
    words = words_of(pl.Series([text, " ".join(expected)]))
    assert words.bounds.tolist() == [0, len(expected), 2 * len(expected)]
    first, second = words.runs(words.bounds[:-1], words.bounds[1:])
    assert first == second


def test_a_run_has_one_hash_wherever_it_stands_and_another_in_another_order():
    words = words_of(pl.Series(["a b c d a b c", "b a c", "c d"]))
    windows = words.windows(3)
    assert windows[0] == windows[4]
    assert len(set(windows.tolist())) == len(windows) - 1
    assert words.windows(2)[2] == words.windows(2)[-1]
    assert words.windows(99).tolist() == []
    starts = np.array([0, 0, 4])
    assert len(set(words.runs(starts, np.array([2, 3, 7])).tolist())) == 2


def test_different_runs_have_different_hashes():
    numbers = [i % 1999 * (i // 1999) for i in range(100_000)]
    words = words_of(pl.Series([" ".join(map(str, numbers))]))
    distinct = len(set(zip(numbers, numbers[1:], numbers[2:], strict=False)))
    assert len(np.unique(words.windows(3))) == distinct > 90_000


@pytest.mark.parametrize("far", [0, 1 << 62])
def test_overlapping_runs_are_counted_once(far: int):
    places = np.array([7, 0, 2, 0, 9]) + far  # so far that all three do not fit into one number
    texts = np.array([4, 4, 4, 1, 4])
    rows = np.array([0, 0, 0, 0, 1 << 50])
    found = covered_words(rows, texts, places, np.array([0, 5, 0, 0, 3]))
    assert found.rows.tolist() == [0, 0, 1 << 50]
    assert found.texts.tolist() == [1, 4, 4]
    assert found.words.tolist() == [5, 8, 3]


def test_planted_leaks_have_the_share_that_was_planted():
    words = [f"w{i}" for i in range(40)]
    sought = [" ".join(words)]
    noise = " ".join(f"n{i}" for i in range(5000))
    documents = [
        "W0, " + "; ".join(words[1:]).title() + "...",
        noise + " " + " ".join(words) + " " + noise,
        " ".join(words[10:30]),
        noise + " ".join([" ", *words[:13], "other", *words[20:39]]),
        " ".join(words[:12]),
        " ".join(words[::-1]),
        " ".join(w if i % 13 else "x" for i, w in enumerate(words)),
        noise,
    ]
    found = found_in(documents, sought, Rules(13, 8))
    shares = {row: share for (row, _), (share, _) in found.items()}
    assert shares == {0: 1.0, 1: 1.0, 2: 0.5, 3: 0.8}
    assert found[0, 0][1]
    assert not found[1, 0][1]


def test_what_stands_in_many_examples_of_a_set_is_its_template():
    head = "answer the following question with one of the letters given below it please now"
    sought = [f"{head} {' '.join(f'q{n}w{i}' for i in range(20))}" for n in range(12)]
    documents = [head, f"{head} something else", sought[3].split("now ")[1]]
    found = found_in(documents, sought, Rules(13, 8))
    assert set(found) == {(2, 3)}
    assert found[2, 3][0] == pytest.approx(20 / 32)  # runs that begin in the template are its own
    assert len({row for row, _ in found_in(documents, sought, Rules(13, 8, 1.0))}) == 3


def test_each_field_of_an_example_is_looked_for_and_no_system_message():
    system = {"role": "system", "content": "you are a kind and helpful assistant that never lies"}

    def chat(*said: str) -> list[dict[str, str]]:
        return [system, *({"role": "user", "content": text} for text in said)]

    question = "how many bones has the hand of a man or a woman"
    answer = "there are twenty seven of them in each hand of a person"
    sought = pl.DataFrame({"messages": [chat(question, "yes", answer), chat("hi", "yes")]})
    texts = [question, f"so {answer}", "yes", system["content"], "hi yes"]
    one, other = pieces_of(sought), pieces_of(pl.DataFrame({"text": texts}))
    assert one is not None
    assert other is not None
    rules = Rules(8, 5)
    index = Index.of({"chats": sought_in(iter([one]), rules)})
    found = matches_in(other, index, rules, found_from=0.5).to_dicts()
    assert [(r["row"], r["example"], r["exact"]) for r in found] == [
        (0, 0, True),
        (1, 0, False),
        (4, 1, True),  # too short for runs, but all of the example
    ]
    pairs = pl.DataFrame({"prompt": ["A b?"], "response": ["No"], "label": [1]})
    both = pieces_of(pairs)
    assert both is not None
    assert both.texts.to_list() == ["A b?", "No"]
    assert both.is_main.tolist() == [True, False]
    assert pieces_of(pl.DataFrame({"features": [[1.0, 2.0]], "label": [0]})) is None


def test_of_each_row_the_best_is_told_even_below_the_bound():
    sought = [" ".join(f"a{i}" for i in range(20)), " ".join(f"b{i}" for i in range(10))]
    documents = ["a3 a4 a5 b1 b2 b3", " ".join(f"b{i}" for i in range(9)) + " a0 a1 a2", "none"]
    found = found_in(documents, sought, Rules(3, 3), found_from=0.8)
    assert found == {(0, 1): (pytest.approx(0.3), False), (1, 1): (pytest.approx(0.9), False)}


def test_rows_without_a_text_keep_their_place_and_greetings_are_no_leak():
    only_system = [{"role": "system", "content": "be brief"}]
    greeting = "good morning to you all and to everybody else"
    said = [[{"role": "user", "content": text}] for text in ("first one here", "last one there")]
    hello = [
        [{"role": "user", "content": greeting}, {"role": "user", "content": f"number {n}"}]
        for n in range(12)
    ]
    one = pieces_of(pl.DataFrame({"messages": [said[0], only_system, *hello, only_system]}))
    two = pieces_of(pl.DataFrame({"messages": [only_system, said[1]]}))
    assert one is not None
    assert two is not None
    sought = sought_in(iter([one, two]), Rules(8, 8))
    assert (sought.num_examples, sought.num_template) == (17, 12)
    other = pieces_of(pl.DataFrame({"text": ["Last one; there", greeting, f"{greeting} number 7"]}))
    assert other is not None
    found = matches_in(other, Index.of({"s": sought}), Rules(8, 8), found_from=0.5)
    assert found.select("row", "example", "exact").rows() == [(0, 16, True), (2, 9, True)]


def test_an_equal_example_is_told_however_often_its_set_has_it():
    text = "said again and again by everyone here in just these words"
    found = found_in([text.upper(), f"it was {text}"], [text] * 12, Rules(8, 8))
    assert found == {(0, example): (1.0, True) for example in range(12)}
