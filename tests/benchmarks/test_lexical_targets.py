"""Of the rows that a score puts first, how many are of the target's own domain.

    pytest tests/benchmarks/test_lexical_targets.py -s -o addopts=--import-mode=importlib

The pool holds many domains; the target is a few held-out examples of one of them. As many rows are
taken as the domain has, at most 500. Printed is the share of them that is of the domain, the mean
over the domains, for the largest values of each column, and for one of the keys' random draws.
`CURATE_DATA` names the data sets. `CURATE_VECTORS` names a folder with `<set>/{train,test}.npy`
and the rows they belong to beside them, `.parquet`; with it density_ratio reads vectors too.
"""

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file

import curate
from curate.data.example import KEY
from curate.models.text_ngrams import buckets_of, ngram_blocks
from jobs.cluster import InlineExecutor, Pool
from jobs.embedding import embed_run
from jobs.index import index_run
from jobs.score import score_run
from jobs.settings import parse_settings

DATA, VECTORS = os.environ.get("CURATE_DATA"), os.environ.get("CURATE_VECTORS")
INLINE = Pool(InlineExecutor(), 1)
SETS = {"clinc150": ("label_name", 15_100), "domains_en": ("domain", 3_000)}
SIZES = (20, 100)
MOST = 500
DOMAINS = 10

PASSES: tuple[tuple[list[Any], dict[str, str]], ...] = (
    (
        ["random", "length", "dsir", "bm25", {"density_ratio": {"on": "ngrams", "force": True}}],
        {
            "random": "random",
            "length": "num_tokens",
            "dsir": "dsir",
            "dsir, a draw": "dsir_key",
            "dsir per n-gram": "dsir_per_ngram",
            "bm25, mean": "bm25",
            "density_ratio, n-grams": "density_ratio_log",
        },
    ),
    (
        [
            {"dsir": {"prior": "uniform", "smoothing": 1.0}},
            {"bm25": {"combine": "max"}},
            {"density_ratio": {"force": True}},
        ],
        {
            "dsir, even prior, 1": "dsir",
            "dsir, even prior, 1, per n-gram": "dsir_per_ngram",
            "bm25, max": "bm25",
            "density_ratio, vectors": "density_ratio_log",
        },
    ),
)


@pytest.mark.timeout(7200)
@pytest.mark.skipif(DATA is None, reason="needs real data: set CURATE_DATA to its folder")
@pytest.mark.parametrize("name", SETS)
def test_the_targets_own_domain_comes_first(name: str, tmp_path: Path):
    key, most = SETS[name]
    pool, targets = (frame_of(name, split) for split in ("train", "test"))
    if pool.height > most:
        pool = pool.sample(n=most, seed=0)
    pool.write_parquet(tmp_path / "pool.parquet")
    sizes = targets.group_by(key).len().filter(pl.col("len") >= min(SIZES), pl.col(key) != "oos")
    domains = sizes[key].sort().sample(n=min(DOMAINS, sizes.height), seed=0).to_list()
    for size in SIZES:
        found: dict[str, list[float]] = defaultdict(list)
        for domain in domains:
            target = targets.filter(pl.col(key) == domain)
            if target.height < size:
                continue
            target.head(size).write_parquet(tmp_path / "target.parquet")
            for scorers, columns in PASSES:
                if "bm25, max" in columns and size == max(SIZES):
                    continue
                scores = scored(tmp_path, scorers, key, "vector" in pool.columns)
                own = (scores["domain"] == f"{domain}").to_numpy()
                wanted = min(MOST, int(own.sum()))
                values = {label: scores[column] for label, column in columns.items()}
                if "random" in columns:
                    texts = pool["text"].gather(scores["row"]).to_list()
                    values["dsir, as the authors' code"] = as_published(tmp_path / "run", texts)
                for label, column in values.items():
                    order = np.argsort(-column.fill_null(-1e9).to_numpy(), kind="stable")
                    found[label].append(float(own[order[:wanted]].mean()))
        if not found:
            continue
        print(f"\n{name}, {size} target rows, {len(found['random'])} domains")
        for label, shares in found.items():
            print(f"{label} | {100 * np.mean(shares):.1f} % | least {100 * min(shares):.0f} %")


def as_published(run: Path, texts: list[str]) -> pl.Series:
    """Log weights with 1e-8 added to each share and no smoothing, from the same counts."""
    counts = load_file(run / "dsir" / "model.safetensors")
    target, pool = (counts[name] / counts[name].sum() for name in ("target", "pool"))
    ratios = np.log(target + 1e-8) - np.log(pool + 1e-8)
    found = np.zeros(len(texts))
    for block in ngram_blocks(texts, ngrams=(1, 2)):
        own = slice(block.first, block.first + block.num_texts)
        buckets = buckets_of(block.hashes, len(ratios))
        found[own] = np.bincount(block.texts, ratios[buckets], minlength=block.num_texts)
    return pl.Series(found)


def frame_of(name: str, split: str) -> pl.DataFrame:
    if VECTORS is not None:
        rows = Path(VECTORS) / name / split
        vectors = np.load(rows.with_suffix(".npy"))
        frame = pl.read_parquet(rows.with_suffix(".parquet"))
        return frame.with_columns(pl.Series("vector", vectors.astype(np.float32).tolist()))
    return pl.read_parquet(Path(str(DATA)) / name / f"{split}.parquet")


def scored(root: Path, scorers: list[Any], key: str, has_vectors: bool) -> pl.DataFrame:
    embed = {"given": {"kind": "column", "column": "vector"}} if has_vectors else {}
    settings = parse_settings(
        {
            "run": str(root / "run"),
            "sources": {"pool": {"path": str(root / "pool.parquet"), "text": "text",
                                 "domain": key}},
            "target": {"path": str(root / "target.parquet"), "text": "text"},
            "index": {"held_out": 0.0, "partition_rows": 20_000},
            "embed": embed,
            "score": {"scorers": scorers},
        }
    )  # fmt: skip
    index_run(settings, pool=INLINE)
    embed_run(settings, pool=INLINE)
    score_run(settings, pool=INLINE)
    opened = curate.open(root / "run")
    examples = opened.examples.select(*KEY, "domain", "num_chars")
    joined = opened.scores.join(examples, on=list(KEY)).collect()
    return joined.with_columns(pl.col("domain").str.replace(r"^pool/", ""))
