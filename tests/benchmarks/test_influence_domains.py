"""What influence takes of a pool of unlabelled texts when the target is code in Java.

    CURATE_DATA=... pytest tests/benchmarks/test_influence_domains.py -s \
        -o addopts=--import-mode=importlib

The pool is drawn from nine domains of domains_en, without the Java code and without any label. A
tenth is C#, whose functions are translations of those in Java. A language model is trained on the
pool from scratch. Printed is what is at the top 5 % of each score, by the domains that only this
file knows, and the CPU seconds of each score, where earlier ones in the table have not done the
work. Prints a part of docs/scorers/influence.md.
"""

import os
import resource
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from e2e.small_run import curate as command
from e2e.small_run import write_config
from sklearn.metrics import roc_auc_score

import curate
from jobs.measurers import measurers
from jobs.settings import parse_settings

DATA = Path(os.environ.get("CURATE_DATA", "no-data"))
pytestmark = [
    pytest.mark.timeout(7200),
    pytest.mark.skipif(not DATA.is_dir(), reason="needs real data: set CURATE_DATA to its folder"),
]

NUM_ROWS = int(os.environ.get("CURATE_BENCH_ROWS", "5000"))
NUM_TARGET = 100
WANTED, KIN = "code_java", "code_csharp"
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
EMBED: dict[str, Any] = {"words": {"kind": "ngrams"}}
ASKED: dict[str, tuple[str, int, Any]] = {
    "influence": ("influence", 1, {"influence": {}}),
    "influence, curvature: full": ("influence", 1, {"influence": {"curvature": "full"}}),
    "influence, metric: cosine": ("influence", 1, {"influence": {"metric": "cosine"}}),
    "influence, metric: dot": ("influence", 1, {"influence": {"metric": "dot"}}),
    "influence, dim: 4": ("influence", 1, {"influence": {"dim": 4}}),
    "influence, reduction: sum": ("influence", 1, {"influence": {"reduction": "sum"}}),
    "influence, layers: mlp": ("influence", 1, {"influence": {"layers": "mlp"}}),
    "rds, states of the model": ("rds_rank", -1, {"rds": {"vectors": "states"}}),
    "rds, hashed words": ("rds_rank", -1, {"rds": {"vectors": "words"}}),
    "dsir, per n-gram": ("dsir_per_ngram", 1, "dsir"),
    "bm25": ("bm25", 1, "bm25"),
    "loss": ("loss", 1, "loss"),
    "random": ("random", 1, "random"),
}
"""Row of the table -> column, the sign that puts what is wanted first, and the scorer."""
CHOSEN = os.environ.get("CURATE_BENCH_ASKED", ";".join(ASKED)).split(";")


def pool_and_target() -> tuple[pl.DataFrame, pl.DataFrame]:
    """Rows with their domains, which are not written to the pool."""
    frame = pl.read_parquet(DATA / "domains_en" / "train.parquet").select("text", "domain")
    frame = frame.sample(fraction=1, shuffle=True, seed=0)
    kin = frame.filter(pl.col("domain") == KIN)[: NUM_ROWS // 10]
    others = frame.filter(~pl.col("domain").is_in([WANTED, KIN]))[: NUM_ROWS - len(kin)]
    pool = pl.concat([kin, others]).sample(fraction=1, shuffle=True, seed=1)
    return pool, frame.filter(pl.col("domain") == WANTED)[:NUM_TARGET]


def settings(root: Path) -> dict[str, Any]:
    return {
        "run": str(root / "run"),
        "sources": {"pool": {"path": str(root / "pool.parquet"), "text": "text"}},
        "target": {"path": str(root / "target.parquet"), "text": "text"},
        "index": {"held_out": 0.0},
        "task": {"kind": "causal-lm", "max_tokens": 128},
        "model": {"config": LLAMA, "tokenizer": {"train": "bpe", "vocab_size": 2048},
                  "device": "cpu"},
        "checkpoints": {"train": {"epochs": 1, "lr": 3e-3, "batch_tokens": 2048}},
    }  # fmt: skip


def spent(name: str, config: Path) -> float:
    """CPU seconds of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    command(name, config)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def test_what_is_at_the_top_for_a_target_of_java(tmp_path: Path):
    root = Path(os.environ.get("CURATE_BENCH_FOLDER", tmp_path))
    pool, target = pool_and_target()
    pool.select("text").write_parquet(root / "pool.parquet")
    target.select("text").write_parquet(root / "target.parquet")
    values = settings(root)
    training = spent("train", write_config(root / "config.yaml", values))
    model = str(measurers(parse_settings(values))[-1].folder)
    values["embed"] = {
        **EMBED,
        "states": {"model": model, "pooling": "position_weighted", "max_tokens": 128},
    }
    shares = pool["domain"].value_counts(normalize=True)
    print(
        f"\n{len(pool):,} rows, {len(target)} of the target;"
        f" index and training {training:.0f} CPU s"
    )
    print(", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.sort("domain").rows()))
    print(f"\n| score | {KIN} in the top 5 % | others there | AUROC of {KIN} | CPU s |")
    print("| --- | ---: | --- | ---: | ---: |")
    reached: dict[str, float] = {}
    for label in CHOSEN:
        column, sign, scorer = ASKED[label]
        values["score"] = {"scorers": [scorer]}
        seconds = spent("score", write_config(root / "config.yaml", values))
        scores = curate.open(root / "run").scores.sort("row").collect()
        found = pool.with_columns(score=sign * scores[column].cast(pl.Float64))
        found = found.filter(pl.col("score").is_finite())
        top = found.sort("score", descending=True)[: round(0.05 * len(pool))]
        counts = top["domain"].value_counts(normalize=True, sort=True)
        reached[label] = len(top.filter(pl.col("domain") == KIN)) / len(top)
        others = ", ".join(
            f"{name} {100 * share:.0f} %"
            for name, share in counts.filter(pl.col("domain") != KIN)[:3].rows()
        )
        auroc = roc_auc_score((found["domain"] == KIN).to_numpy(), found["score"].to_numpy())
        print(f"| {label} | {100 * reached[label]:.0f} % | {others} | {auroc:.3f} |"
              f" {seconds:.0f} |", flush=True)  # fmt: skip
    if "influence" in reached:
        assert reached["influence"] > 0.5
