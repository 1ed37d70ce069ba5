"""TracIn and LESS in small: does self-influence find wrong labels, does influence choose well?
Rows of docs/reproductions.md; the table of attributions is test_lds.py's.

    CURATE_DATA=... pytest tests/benchmarks/test_reproduction_influence.py -s \\
        -o addopts=--import-mode=importlib

TracIn: scikit-learn's digits, a fifth of the labels wrong, a network 64-64-10, four checkpoints,
five draws. LESS: 3,000 texts of nine domains without Java, a Llama of two layers of width 64
trained on them for an epoch, 100 Java texts as the target; that model then learns from the best
tenth by influence (cosines with Adam's updates), or from a random one, with five seeds, and is
measured on 200 other Java texts.
"""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from evaluate.compared_digits import compare, digits_settings, write_digits
from reproduction import SEEDS, data_folder, line, of_values, of_verdict
from sklearn.metrics import roc_auc_score

import curate
from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.measurers import measurers
from jobs.score import score_run
from jobs.settings import parse_settings
from jobs.tokenizer import tokenizer_run
from jobs.train import train_run

pytestmark = pytest.mark.timeout(0)

INLINE = Pool(InlineExecutor(), 1)
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LESS = "domains_en, 3,000 texts of 128 tokens without Java; 0.08 M parameters, vocabulary 2,048"


def test_wrong_labels_have_a_high_self_influence(tmp_path: Path):
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {"self_influence": [], "loss": []}
    for seed in SEEDS:
        folder = tmp_path / str(seed)
        folder.mkdir()
        pool, _ = write_digits(folder, rows=1000, flipped=0.2, seed=seed)
        train = {"epochs": 8, "save_every_epochs": 2, "seeds": [seed], "lr": 3e-3}
        settings = digits_settings(
            folder / "run",
            pool,
            model={"config": {"model_type": "mlp", "hidden": [64]}, "device": "cpu"},
            checkpoints={"train": {**train, "batch_tokens": 64}},
            index={"held_out": 0.0},
            score={"scorers": ["self_influence", "loss"], "checkpoints": "all"},
        )
        index_run(settings, pool=INLINE)
        train_run(settings, pool=INLINE)
        score_run(settings, pool=INLINE)
        wrong = (pl.read_parquet(pool)["domain"] == "noise").to_numpy()
        scores = curate.open(settings.run).scores.sort("row").collect()
        for name, own in found.items():
            own.append(float(roc_auc_score(wrong, scores[name].to_numpy())))
    print({name: np.round(own, 4).tolist() for name, own in found.items()})
    setting = "scikit-learn's digits, 1,000, a fifth of the labels wrong, 4,810 parameters"
    figure = "AUROC of wrong labels by TracIn's self-influence"
    above = of_values(found["self_influence"], against=0.5, claimed="above")
    print("\n" + line("wrong labels are high", setting, figure, above, signed=False))
    beyond = [a - b for a, b in zip(*found.values(), strict=True)]
    figure = "AUROC, self-influence minus mean loss of the same checkpoints"
    print(line("better than the loss", setting, figure, of_values(beyond, claimed="above")))


def texts(folder: Path) -> None:
    """pool, wanted and test."""
    frame = pl.read_parquet(data_folder("domains_en") / "train.parquet").select("text", "domain")
    frame = frame.sample(fraction=1, shuffle=True, seed=0)
    java = frame.filter(pl.col("domain") == "code_java")
    kin = frame.filter(pl.col("domain") == "code_csharp")[:300]
    others = frame.filter(~pl.col("domain").is_in(["code_java", "code_csharp"]))[:2700]
    pool = pl.concat([kin, others]).sample(fraction=1, shuffle=True, seed=1)
    pool.write_parquet(folder / "pool.parquet")
    java[:100].write_parquet(folder / "wanted.parquet")
    java[100:300].write_parquet(folder / "test.parquet")


def test_the_best_tenth_by_influence_against_a_random_one(tmp_path: Path):
    torch.set_num_threads(1)
    texts(tmp_path)
    values: dict[str, Any] = {
        "run": str(tmp_path / "run"),
        "sources": {"pool": {"path": str(tmp_path / "pool.parquet"), "text": "text"}},
        "target": {"path": str(tmp_path / "wanted.parquet"), "text": "text"},
        "index": {"held_out": 0.0},
        "task": {"kind": "causal-lm", "max_tokens": 128},
        "model": {"config": LLAMA, "tokenizer": {"train": "bpe", "vocab_size": 2048},
                  "device": "cpu"},
        "checkpoints": {
            "train": {"epochs": 1, "lr": 3e-3, "batch_tokens": 2048, "save_moments": True}
        },
        "score": {"scorers": [{"influence": {"metric": "cosine", "adam": "exact"}}]},
    }  # fmt: skip
    settings = parse_settings(values)
    index_run(settings, pool=INLINE)
    tokenizer_run(settings)
    train_run(settings, pool=INLINE)
    score_run(settings, pool=INLINE)
    model = str(measurers(settings)[-1].folder)
    scores = curate.open(settings.run).scores.sort("row").collect()
    scores.select("file", "row", "influence").write_parquet(tmp_path / "scores.parquet")
    domains = pl.read_parquet(tmp_path / "pool.parquet")["domain"]
    best = domains.gather(scores["influence"].arg_sort(descending=True)[:300])
    print("best tenth:", best.value_counts(sort=True).rows())
    rules = {"within": "all", "keep": {"token_share": 0.1}}
    values |= {
        "run": str(tmp_path / "compared"),
        "target": {"path": str(tmp_path / "test.parquet"), "text": "text"},
        "model": {"name": model, "device": "cpu"},
        "checkpoints": {"train": {"epochs": 2, "lr": 1e-3, "batch_tokens": 2048}},
        "score": {"scorers": [{"external": {"chosen": str(tmp_path / "scores.parquet")}}]},
        "plan": {"score": "chosen.influence", "order": "hardest", **rules},
        "compare": {"seeds": list(SEEDS), "arms": ["plan", "random"], "held_out_examples": 200},
    }
    (verdict,) = compare(parse_settings(values))["verdicts"]
    print(verdict["sentence"], flush=True)
    figure = "loss on unseen Java, nats per token, the best tenth by influence minus a random tenth"
    found = of_verdict(verdict, seeds=len(SEEDS))
    print("\n" + line("what influence chooses helps the target", LESS, figure, found))
