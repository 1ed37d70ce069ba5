"""How much of what was planted does each method of `duplicates` find, and what does it cost?

    CURATE_DATA=... CURATE_ENCODER=folder-of-a-sentence-encoder OMP_NUM_THREADS=1 \
        python -m pytest tests/benchmarks/test_duplicates.py -s

Pools of real text: passages of `domains_en`, cut to at most 600 characters, and the short questions
of `banking77`. Passages that have half of their runs of three words in common with another one are
left out first, so that what is not planted repeats nothing by letter. Behind the originals stand
edited copies of some of them, as many of each kind, and, as translations, functions in C# whose
originals are in Java. An edit that is removed is found; an original that is removed is a false
alarm. Precision is over both: edits / (edits + originals) among all that is removed.
"""

import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from sklearn.feature_extraction.text import CountVectorizer

import curate
from curate.data.example import KEY
from jobs.cluster import InlineExecutor, Pool
from jobs.duplicates import passes
from jobs.embedding import embed_run
from jobs.index import index_run
from jobs.own_passes import run_phases
from jobs.run import ignore
from jobs.score import score_run
from jobs.settings import Settings, parse_settings
from scorers.duplicates import Duplicates

pytestmark = pytest.mark.timeout(3600)

INLINE = Pool(InlineExecutor(), 1)
PROSE = ("abstracts", "medical_qa", "novels", "encyclopedic", "maths", "speeches", "dialogue")
ORIGINALS, EDITS, TRANSLATED = 2_000, 150, 150
PAIRS = [
    ("big", "large"), ("show", "demonstrate"), ("use", "employ"), ("get", "obtain"),
    ("help", "assist"), ("begin", "start"), ("many", "numerous"), ("also", "in addition"),
    ("however", "nevertheless"), ("because", "since"), ("good", "fine"), ("new", "novel"),
    ("important", "significant"), ("people", "persons"), ("about", "regarding"),
    ("often", "frequently"), ("small", "little"), ("method", "approach"), ("need", "require"),
    ("want", "would like"), ("money", "funds"), ("payment", "transaction"), ("card", "bank card"),
    ("can't", "cannot"), ("don't", "do not"), ("i'm", "i am"), ("it's", "it is"),
    ("what is", "what's"), ("how do i", "how can i"), ("why is", "for what reason is"),
    ("is not", "isn't"), ("did not", "didn't"), ("the", "this"), ("and", "as well as"),
    ("with", "using"), ("such as", "for example"), ("different", "various"), ("find", "discover"),
    ("make", "create"), ("said", "stated"), ("very", "quite"), ("may", "might"),
]  # fmt: skip
"""Words and what may stand in their place, both ways: a rough paraphrase."""

Edit = Callable[[str, random.Random], str]


def case_and_marks(text: str, _: random.Random) -> str:
    """Capitals, and no marks at the end of words."""
    return re.sub(r"[.,;:!?]+(?=\s|$)", "", text).upper()


def typos(text: str, draw: random.Random) -> str:
    """One letter in 50 is replaced, or swapped with the next."""
    letters = list(text)
    places = [i for i in range(len(letters) - 1) if letters[i].isalpha()]
    for place in draw.sample(places, max(1, len(places) // 50)):
        if draw.random() < 0.5:
            letters[place] = draw.choice("abcdefghijklmnopqrstuvwxyz")
        else:
            letters[place], letters[place + 1] = letters[place + 1], letters[place]
    return "".join(letters)


def fewer_words(text: str, draw: random.Random) -> str:
    """One word in ten is left out."""
    words = text.split()
    out = set(draw.sample(range(len(words)), max(1, len(words) // 10)))
    return " ".join(word for place, word in enumerate(words) if place not in out)


def cut(text: str, _: random.Random) -> str:
    """The last 30 % are missing."""
    words = text.split()
    return " ".join(words[: max(2, round(0.7 * len(words)))])


def shuffled(text: str, draw: random.Random) -> str:
    """Sentences, or halves of a single one, in another order."""
    parts = re.split(r"(?<=[.!?])\s+", text)
    if len(parts) < 2:
        words = text.split()
        parts = [" ".join(words[len(words) // 2 :]), " ".join(words[: len(words) // 2])]
    else:
        draw.shuffle(parts)
    return " ".join(parts)


def reworded(text: str, draw: random.Random) -> str:
    """Words of the list above are replaced wherever they stand."""
    for left, right in PAIRS:
        first, second = (left, right) if draw.random() < 0.7 else (right, left)
        text = re.sub(rf"\b{re.escape(first)}\b", second, text, flags=re.IGNORECASE)
    return text


KINDS: dict[str, Edit] = {
    "copy": lambda text, _: text,
    "case, marks": case_and_marks,
    "typos, 2 %": typos,
    "10 % of words out": fewer_words,
    "last 30 % cut": cut,
    "sentences shuffled": shuffled,
    "reworded": reworded,
}


def data() -> Path:
    if "CURATE_DATA" not in os.environ:
        pytest.skip("set CURATE_DATA to the folder of real data sets")
    return Path(os.environ["CURATE_DATA"])


def without_repeats(texts: list[str], count: int) -> list[str]:
    """Texts of which no two have half of their runs of three words in common."""
    texts = list(dict.fromkeys(texts))
    grams: Any = CountVectorizer(ngram_range=(3, 3), binary=True, token_pattern=r"\w+")
    try:
        table = grams.fit_transform(texts).astype(np.int32).tocsr()
    except ValueError:
        return texts[:count]
    sizes = np.asarray(table.sum(axis=1)).ravel()
    kept: list[str] = []
    out = np.zeros(len(texts), dtype=bool)
    for start in range(0, len(texts), 500):
        common = (table[start : start + 500] @ table.T).tocoo()
        left, right = common.row + start, common.col
        either = sizes[left] + sizes[right] - common.data
        out[left[(left > right) & (common.data > 0.5 * either)]] = True
    kept = [text for text, is_out in zip(texts, out, strict=True) if not is_out]
    return kept[:count]


def passages() -> tuple[list[str], list[tuple[str, str]]]:
    """Originals, and functions of two languages that are translations of each other."""
    frame = pl.read_parquet(data() / "domains_en" / "train.parquet")
    draw = random.Random(0)
    short: list[str] = []
    for domain in PROSE:
        texts = frame.filter(domain=domain)["text"].to_list()
        for text in draw.sample(texts, 450):
            found = re.match(r"(?s).{250,600}?(?=[.!?]\s|$)|.{1,600}", text)
            assert found is not None
            short.append(found[0])
    draw.shuffle(short)
    java = dict(frame.filter(domain="code_java").select("doc", "text").iter_rows())
    sharp = dict(frame.filter(domain="code_csharp").select("doc", "text").iter_rows())
    both = sorted(java.keys() & sharp.keys())[:TRANSLATED]
    first = [(java[name].split("\n\n")[:3], sharp[name].split("\n\n")[:3]) for name in both]
    return without_repeats(short, ORIGINALS), [("\n".join(a), "\n".join(b)) for a, b in first]


def questions() -> tuple[list[str], list[tuple[str, str]]]:
    texts = pl.read_parquet(data() / "banking77" / "train.parquet")["text"].to_list()
    random.Random(0).shuffle(texts)
    return without_repeats(texts[:4000], ORIGINALS), []


def planted(
    originals: list[str], pairs: list[tuple[str, str]]
) -> tuple[pl.DataFrame, dict[str, int]]:
    """Originals, then edits, with the kind of each; how many of each kind there are."""
    draw = random.Random(1)
    rows = [(text, "original") for text in originals + [left for left, _ in pairs]]
    for kind, edit in KINDS.items():
        rows += [(edit(text, draw), kind) for text in draw.sample(originals, EDITS)]
    rows += [(right, "Java in C#") for _, right in pairs]
    frame = pl.DataFrame(rows, schema=["text", "kind"], orient="row")
    return frame, dict(frame["kind"].value_counts().iter_rows())


def settings_of(root: Path, options: dict[str, Any]) -> Settings:
    encoder = os.environ.get("CURATE_ENCODER")
    embed: dict[str, Any] = {"words": {"kind": "ngrams"}}
    if encoder:
        embed["sentences"] = {"kind": "model", "model": encoder, "max_tokens": 160}
    return parse_settings(
        {
            "run": str(root / "run"),
            "sources": {"pool": {"path": str(root / "pool.parquet"), "text": "text"}},
            "index": {"held_out": 0.0},
            "embed": embed,
            "score": {"scorers": [{"duplicates": {"keep_by": "first", **options}}]},
        }
    )


def similarities(root: Path, options: dict[str, Any]) -> pl.DataFrame:
    settings = settings_of(root, options)
    index_run(settings, pool=INLINE)
    if options["method"] == "semantic":
        embed_run(settings, pool=INLINE)
    score_run(settings, pool=INLINE)
    scores = curate.open(settings.run).scores.sort(KEY).collect()
    kinds = pl.read_parquet(root / "pool.parquet").select("kind")
    return scores.hstack(kinds)


VARIANTS: list[tuple[str, dict[str, Any], tuple[float, ...]]] = [
    ("exact", {"method": "exact"}, (0.5,)),
    ("exact, normalize", {"method": "exact", "normalize": True}, (0.5,)),
    ("near", {"method": "near"}, (0.7, 0.8, 0.9)),
    ("near, threshold 0.5", {"method": "near", "threshold": 0.5}, (0.5, 0.6)),
    ("semantic, hashed words", {"method": "semantic", "vectors": "words"}, (0.7, 0.8, 0.9, 0.95)),
    (
        "semantic, sentence encoder",
        {"method": "semantic", "vectors": "sentences"},
        (0.8, 0.85, 0.9, 0.95, 0.97, 0.99),
    ),
]


@pytest.mark.parametrize("pool", [passages, questions])
def test_what_each_method_finds_of_what_was_planted(
    tmp_path: Path, pool: Callable[[], tuple[list[str], list[tuple[str, str]]]]
):
    frame, counts = planted(*pool())
    frame.write_parquet(tmp_path / "pool.parquet")
    kinds = [kind for kind in counts if kind != "original"]
    kinds.sort(key=lambda kind: [*KINDS, "Java in C#"].index(kind))
    print(f"\n{pool.__name__}: {counts['original']} originals, {EDITS} edits of each kind")
    print("| method | above | precision | recall | " + " | ".join(kinds) + " | originals |")
    print("| --- |" + " ---: |" * (4 + len(kinds)))
    for name, options, limits in VARIANTS:
        if options.get("vectors") == "sentences" and "CURATE_ENCODER" not in os.environ:
            continue
        table = similarities(tmp_path, options)
        for limit in limits:
            removed = table.filter(pl.col("duplicate_similarity") > limit)
            found = dict(removed["kind"].value_counts().iter_rows())
            wrong = found.get("original", 0)
            right = removed.height - wrong
            total = sum(counts[kind] for kind in kinds)
            precision = f"{right / removed.height:.3f}" if removed.height else "-"
            cells = [f"{found.get(kind, 0) / counts[kind]:.2f}" for kind in kinds]
            share = f"{100 * wrong / counts['original']:.1f} %"
            print(f"| {name} | {limit:g} | {precision} | {right / total:.2f} | "
                  f"{' | '.join(cells)} | {share} |")  # fmt: skip
            if name == "exact":
                assert found["copy"] == counts["copy"]
            if name == "near":
                assert found["case, marks"] == counts["case, marks"]


def seconds_of(settings: Settings) -> float:
    """Of the scorer's own passes, in CPU time: the machine may be busy with other things."""
    options = Duplicates(**settings.score.named["duplicates"])
    own = passes(settings, options)
    start = time.process_time()
    outcomes = run_phases({"duplicates": own}, pool=INLINE, listener=ignore)
    assert not any(outcome.failures for outcome in outcomes.values())
    return time.process_time() - start


@pytest.mark.parametrize("method", ["exact", "normalize", "near"])
def test_what_texts_cost(tmp_path: Path, method: str):
    frame = pl.read_parquet(data() / "domains_en" / "train.parquet").select("text")
    print(f"\n{method}: rows, megabytes, seconds, seconds for each million rows")
    options: dict[str, Any] = {
        "exact": {"method": "exact"},
        "normalize": {"method": "exact", "normalize": True},
        "near": {"method": "near"},
    }[method]
    for rows in (6_250, 12_500, 25_000, 50_000):
        root = tmp_path / str(rows)
        root.mkdir()
        frame.head(rows).write_parquet(root / "pool.parquet")
        settings = settings_of(root, options)
        index_run(settings, pool=INLINE)
        seconds = seconds_of(settings)
        size = int(frame.head(rows)["text"].str.len_bytes().sum()) / 1e6
        print(f"{rows:>8} {size:8.1f} {seconds:8.2f} {seconds / rows * 1e6:10.1f}")


def test_what_vectors_cost(tmp_path: Path):
    """Gaussian clouds of 384 numbers: the cost depends on numbers, not on what they mean."""
    generator = np.random.default_rng(0)
    print("\nsemantic, 384 numbers a row: rows, cells, seconds, seconds for each million rows")
    for rows in (12_500, 25_000, 50_000, 100_000):
        root = tmp_path / str(rows)
        root.mkdir()
        centres = generator.standard_normal((200, 384)).astype(np.float32)
        vectors = centres[generator.integers(0, 200, rows)]
        vectors += generator.standard_normal((rows, 384)).astype(np.float32)
        texts = [str(number) for number in range(rows)]
        pl.DataFrame({"text": texts, "v": vectors}).write_parquet(root / "pool.parquet")
        settings = parse_settings(
            {
                "run": str(root / "run"),
                "sources": {"pool": {"path": str(root / "pool.parquet"), "text": "text"}},
                "index": {"held_out": 0.0},
                "embed": {"given": {"kind": "column", "column": "v"}},
                "score": {"scorers": [{"duplicates": {"method": "semantic"}}]},
            }
        )
        index_run(settings, pool=INLINE)
        embed_run(settings, pool=INLINE)
        seconds = seconds_of(settings)
        run = Path(settings.run) / "duplicates" / "cells" / "centroids.npy"
        print(f"{rows:>8} {len(np.load(run)):5} {seconds:8.1f} {seconds / rows * 1e6:10.1f}")


def test_what_is_missed_at_the_borders_of_cells(tmp_path: Path):
    """Real documents as vectors: of what one cell removes, how much do more cells?"""
    frame = pl.read_parquet(data() / "domains_en" / "train.parquet").select("text")
    frame = frame.sample(20_000, seed=0, shuffle=True).with_columns(kind=pl.lit("original"))
    frame.write_parquet(tmp_path / "pool.parquet")
    print("\ncells, then removed above 0.95, 0.9, 0.8, and the share of it that one cell removes")
    whole: pl.Series | None = None
    for cells in (1, 2, 4, 16, 64):
        options = {"method": "semantic", "vectors": "words", "cells": cells}
        found = similarities(tmp_path, options)["duplicate_similarity"].fill_null(0)
        whole = found if whole is None else whole
        counts = [(int((found > t).sum()), int((whole > t).sum())) for t in (0.95, 0.9, 0.8)]
        print(f"{cells:>4}", "  ".join(f"{own:>6} {own / all_:.4f}" for own, all_ in counts))
