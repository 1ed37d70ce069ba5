r"""What `leakage` finds in real data, what it does not, and what it costs.

    CURATE_DATA=... python -m pytest tests/benchmarks/test_leakage.py -s \
        -o addopts=--import-mode=importlib
"""

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from curate.models.overlap import Index, matches_in
from curate.models.sought import sought_in
from curate.models.text_pieces import Pieces, blocks_of, pieces_of
from scorers.leakage import Leakage

DATA = os.environ.get("CURATE_DATA")
pytestmark = pytest.mark.skipif(DATA is None, reason="needs real data: set CURATE_DATA")
PAIR = {"instruction": "prompt", "output": "response"}
ROWS = 5000


def read(name: str, part: str) -> pl.DataFrame:
    return pl.read_parquet(Path(DATA or "") / name / f"{part}.parquet")


def pieces(fields: pl.DataFrame) -> Pieces:
    found = pieces_of(fields)
    assert found is not None
    return found


def some(fields: pl.DataFrame) -> Iterator[Pieces]:
    for start in range(0, fields.height, ROWS):
        yield pieces(fields[start : start + ROWS])


def questions() -> pl.DataFrame:
    """The test part of GSM8K."""
    test = read("instruct_mix", "test").filter(pl.col("source") == "maths")
    return test.select(*PAIR).rename(PAIR)


def pools() -> dict[str, pl.DataFrame]:
    train, domains = read("instruct_mix", "train"), read("domains_en", "train")
    maths, other = pl.col("source") == "maths", pl.col("domain") == "maths"
    return {
        "gsm8k_solutions, train and test": pl.concat(
            [read("gsm8k_solutions", part).select(*PAIR).rename(PAIR) for part in ("train", "test")]
        ),
        "domains_en test, maths": read("domains_en", "test").filter(other).select("text"),
        "instruct_mix train, maths": train.filter(maths).select(*PAIR).rename(PAIR),
        "domains_en train, maths": domains.filter(other).select("text"),
        "instruct_mix train, the rest": train.filter(~maths).select(*PAIR).rename(PAIR),
        "domains_en train, the rest": domains.filter(~other).select("text"),
    }


@pytest.mark.parametrize("ngrams", [13, 8])
def test_gsm8k_in_three_sets(ngrams: int):
    rules = Leakage(ngrams=ngrams)
    index = Index.of({"gsm8k": sought_in(iter([pieces(questions())]), rules)})
    print(f"\nruns of {ngrams}: rows, with any run, 0.5 and more, equal; questions found")
    for name, pool in pools().items():
        found = pl.concat(
            matches_in(own, index, rules, found_from=0.5).with_columns(pl.col("row") + ROWS * n)
            for n, own in enumerate(some(pool))
        )
        half, equal = found.filter(pl.col("share") >= 0.5), found.filter("exact")
        counts = [table["row"].n_unique() for table in (found, half, equal)]
        print(f"{name:32} {pool.height:6} {counts} {half['example'].n_unique()}")


def test_edited_questions():
    """Share of the test questions that are found after words have been replaced."""
    asked = questions().select(text="prompt")
    words = [text.split() for text in asked["text"].to_list()]
    kinds = {"replaced": 1, "left out": 0}
    for kind, keep in kinds.items():
        for rate in (0.02, 0.05, 0.1, 0.2):
            draw = random.Random(0)
            changed = [
                " ".join(w if draw.random() >= rate else "other" * keep for w in own)
                for own in words
            ]
            shares: list[str] = []
            for ngrams in (13, 8):
                rules = Leakage(ngrams=ngrams)
                index = Index.of({"gsm8k": sought_in(iter([pieces(asked)]), rules)})
                own = pieces(pl.DataFrame({"text": changed}))
                found = matches_in(own, index, rules, found_from=0.5)
                hit = found.filter((pl.col("row") == pl.col("example")) & (pl.col("share") >= 0.5))
                shares.append(f"{ngrams}: {100 * hit.height / len(words):.1f} %")
            print(f"{100 * rate:g} % of the words {kind}: {', '.join(shares)}")


@pytest.mark.parametrize("copies", [0, 1, 4])
def test_time_and_memory(copies: int):
    """Pool: domains_en. Sets: GSM8K, or the test part of domains_en, once or in four variants."""
    rules, pool = Leakage(), read("domains_en", "train").select("text")
    own = questions() if copies == 0 else read("domains_en", "test").select("text")
    variants = own if copies < 2 else pl.concat(
        own.with_columns(pl.col("text").str.replace_all(" ", f" {'x' * n} ")) if n else own
        for n in range(copies)
    )  # fmt: skip
    started = time.process_time()
    sought = sought_in(some(variants), rules)
    index = Index.of({"set": sought})
    spent = time.process_time() - started
    arrays = [getattr(index, name) for name in index.__slots__]
    arrays += [array for table in index.tables for array in table]
    size = sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))
    num_words = sum(len(b.words.is_letter) for p in some(pool) for b in blocks_of(p))
    rounds: list[float] = []
    for _ in range(3):
        started = time.process_time()
        for each in some(pool):
            matches_in(each, index, rules, found_from=0.5)
        rounds.append(time.process_time() - started)
    print(
        f"\n{len(sought.runs):,} runs looked for: {size / 1e6:.0f} MB"
        f" ({size / max(1, len(sought.runs)):.0f} bytes each), made in {spent:.1f} s;"
        f" {sorted(rounds)[1] / num_words * 1e6:.2f} s per million of {num_words:,} words"
    )
