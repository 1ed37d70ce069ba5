"""Which score finds wrong labels? Random flips in real text, and errors that are real.

    python -m pytest tests/benchmarks/test_noisy_labels.py -s -o addopts=--import-mode=importlib

Prints the tables of docs/noisy_labels.md; five to six minutes of CPU time. Everything goes through
the command line: one run for each set and seed, all scores in it. The second test asks such runs
for self-influence: by gradient lengths, by EK-FAC, and in a whitened index of projected gradients,
with influence on the trusted target. CURATE_BENCH_SETS names the sets by how they begin.
"""

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pytest
from e2e.small_run import curate as command
from e2e.small_run import write_config
from sklearn.metrics import average_precision_score, roc_auc_score

import curate

DATA = Path(os.environ.get("CURATE_DATA", "no-data"))
pytestmark = [
    pytest.mark.timeout(7200),
    pytest.mark.skipif(not DATA.is_dir(), reason="needs real data: set CURATE_DATA to its folder"),
]

SEEDS = range(3)
WANTED = tuple(os.environ.get("CURATE_BENCH_SETS", "film,bank,messages,maths").split(","))
SUSPICIOUS = {
    "label_issue_margin": -1,
    "self_confidence": -1,
    "aum": -1,
    "confidence": -1,
    "forgetting_ordered": 1,
    "variability": 1,
    "el2n": 1,
    "grand": 1,
    "loss": 1,
    "dvgs": -1,
    "dvgs_target_loss": 1,
    "num_tokens": 1,
    "random": 1,
}
"""Column -> the sign that puts what is suspicious at the top."""
CLASSIFYING = ["label_issues", "aum", "confidence", "forgetting", "variability", "el2n", "grand",
               "loss", "length", "random", {"dvgs": {"epochs": 20, "every": 10}}]  # fmt: skip
# Without classes there is nothing for label_issues; gradients of long answers take too long here.
WRITING = ["aum", "confidence", "forgetting", "variability", "el2n", "loss", "length", "random"]
BERT = {
    "model_type": "bert",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 192,
}


class Pool(NamedTuple):
    """A pool in which it is known what is wrong, a trusted target, and what differs in settings."""

    rows: pl.DataFrame
    """The fields, and `wrong`."""
    target: pl.DataFrame
    changes: dict[str, Any]


def flipped_reviews(seed: int) -> Pool:
    """2,000 sentences about films, a fifth of the labels flipped."""
    frame = pl.read_parquet(DATA / "rt_polarity" / "train.parquet").select("text", "label")
    frame = frame.sample(2300, seed=seed, shuffle=True)
    rows, target = frame[:2000], frame[2000:]
    wrong = np.zeros(2000, dtype=bool)
    wrong[np.random.default_rng(seed).permutation(2000)[:400]] = True
    given = np.where(wrong, 1 - rows["label"].to_numpy(), rows["label"].to_numpy())
    rows = rows.with_columns(pl.Series("label", given), pl.Series("wrong", wrong))
    return Pool(rows, target, {})


def flipped_intents(seed: int) -> Pool:
    """2,000 questions to a bank of the 20 most frequent intents, a fifth of them another's."""
    frame = pl.read_parquet(DATA / "banking77" / "train.parquet").select("text", "label")
    largest = frame["label"].value_counts(sort=True)["label"][:20].sort().to_list()
    frame = frame.filter(pl.col("label").is_in(largest))
    frame = frame.with_columns(
        pl.col("label").replace_strict({old: new for new, old in enumerate(largest)})
    ).sample(2300, seed=seed, shuffle=True)
    rows, target = frame[:2000], frame[2000:]
    generator = np.random.default_rng(seed)
    wrong = np.zeros(2000, dtype=bool)
    wrong[generator.permutation(2000)[:400]] = True
    other = (rows["label"].to_numpy() + generator.integers(1, 20, 2000)) % 20
    given = np.where(wrong, other, rows["label"].to_numpy())
    rows = rows.with_columns(pl.Series("label", given), pl.Series("wrong", wrong))
    task = {"kind": "text-classification", "num_classes": 20, "max_tokens": 64}
    return Pool(rows, target, {"task": task})


def ruled_messages(seed: int) -> Pool:
    """1,983 messages labelled by regular expressions, 62 wrongly; the same for every seed."""
    frame = pl.read_parquet(DATA / "sms_spam" / "train.parquet")
    ruled = frame.filter(pl.col("rule_label") >= 0)
    rows = ruled.select("text", label="rule_label", wrong=pl.col("rule_wrong").cast(pl.Boolean))
    others = frame.filter(pl.col("rule_label") < 0)
    return Pool(rows, others.select("text", "label").sample(300, seed=seed), {})


def solutions(seed: int) -> Pool:
    """400 answers of models to maths problems, of which a language model is to find the wrong."""
    frame = pl.read_parquet(DATA / "gsm8k_solutions" / "train.parquet")
    frame = frame.select("source", prompt="instruction", response="output", wrong=~pl.col(
        "is_correct").cast(pl.Boolean))  # fmt: skip
    rows = frame.filter(pl.col("source") != "human").sample(400, seed=seed, shuffle=True)
    target = frame.filter(pl.col("source") == "human").sample(300, seed=seed)
    changes = {
        "task": {"kind": "causal-lm", "max_tokens": 192},
        "model": {"config": LLAMA, "tokenizer": {"train": "bpe", "vocab_size": 2048},
                  "device": "cpu"},
        "score": {"scorers": WRITING, "checkpoints": "all"},
    }  # fmt: skip
    return Pool(rows.drop("source"), target.drop("source", "wrong"), changes)


SETS: dict[str, Callable[[int], Pool]] = {
    "film reviews, 20 % flipped": flipped_reviews,
    "bank questions, 20 % flipped": flipped_intents,
    "messages, labels by rules": ruled_messages,
    "maths answers, wrong ones": solutions,
}
NAMES = [name for name in SETS if name.startswith(WANTED)]
EPOCHS = {"bank questions, 20 % flipped": 12, "maths answers, wrong ones": 3}


def settings(folder: Path, pool: Pool, *, seed: int, epochs: float) -> dict[str, Any]:
    names = [name for name in ("text", "prompt", "response", "label") if name in pool.rows.columns]
    fields = {name: name for name in names}
    train = {"epochs": epochs, "seeds": [seed], "lr": 1e-3, "batch_tokens": 1024,
             "schedule": "constant", "save_every_epochs": epochs / 3}  # fmt: skip
    return {
        "run": str(folder / "run"),
        "seed": seed,
        "sources": {"pool": {"path": str(folder / "pool.parquet"), **fields}},
        "target": {"path": str(folder / "target.parquet"), **fields},
        "index": {"held_out": 0.0},
        "task": {"kind": "text-classification", "num_classes": 2, "max_tokens": 64},
        "model": {"config": BERT, "tokenizer": {"train": "bpe", "vocab_size": 4096},
                  "device": "cpu"},
        "checkpoints": {"train": train},
        "score": {"scorers": CLASSIFYING, "checkpoints": "all"},
        **pool.changes,
    }  # fmt: skip


def found_by_each_score(folder: Path, pool: Pool, *, seed: int, epochs: float) -> dict[str, float]:
    """AUROC of every column, and what the flag of `label_issues` finds."""
    folder.mkdir(parents=True)
    pool.rows.write_parquet(folder / "pool.parquet")
    pool.target.write_parquet(folder / "target.parquet")
    command("score", write_config(folder / "config.yaml",
                                  settings(folder, pool, seed=seed, epochs=epochs)))  # fmt: skip
    scores = curate.open(folder / "run").scores.sort("row").collect()
    wrong = pool.rows["wrong"].to_numpy()
    assert scores.height == len(wrong)
    found: dict[str, float] = {}
    for column, sign in SUSPICIOUS.items():
        if column not in scores.columns:
            continue
        values = scores[column].cast(pl.Float64)
        there = values.is_not_null().to_numpy()
        found[column] = float(roc_auc_score(wrong[there], sign * values.to_numpy()[there]))
        precision = average_precision_score(wrong[there], sign * values.to_numpy()[there])
        found[f"{column}: average precision"] = float(precision)
    if "label_issue" in scores.columns:
        flagged = scores["label_issue"].fill_null(0).to_numpy() == 1
        found["flagged"] = float(flagged.mean())
        found["flag: precision"] = float((flagged & wrong).sum() / max(1, flagged.sum()))
        found["flag: recall"] = float((flagged & wrong).sum() / wrong.sum())
    return found


def told(values: list[float]) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


@pytest.mark.parametrize("name", NAMES)
def test_how_well_each_score_finds_what_is_wrong(name: str, tmp_path: Path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    each = [
        found_by_each_score(
            tmp_path / f"seed-{seed}", SETS[name](seed), seed=seed, epochs=EPOCHS.get(name, 6)
        )
        for seed in SEEDS
    ]
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    print(f"\n{name}: mean ± sd over {len(each)} seeds, {seconds:.0f} s of CPU time")
    for key in each[0]:
        print(f"  {key:42} {told([found[key] for found in each])}")
    random = [found["random"] for found in each]
    assert abs(np.mean(random) - 0.5) < 0.1
    if "flipped" in name:
        assert np.mean([found["label_issue_margin"] for found in each]) > 0.65
        assert np.mean([found["aum"] for found in each]) > 0.6


SIGNS = {"label_issue_margin": -1, "influence": -1}
"""Columns of which the smallest are suspicious."""
GRADIENT_SCORES: dict[str, list[Any]] = {
    "self_influence, identity": ["self_influence", "el2n", "loss", "length", "random"],
    "self_influence, ekfac": [{"self_influence": {"metric": "ekfac"}}],
    "influence": [{"influence": {"layers": "all"}}],
}
GRADIENT_COLUMNS = {
    "self_influence, identity": ["el2n", "loss", "num_tokens", "random", "self_influence",
                                 "self_influence_residual"],
    "self_influence, ekfac": ["self_influence", "self_influence_residual"],
    "influence": ["influence_self", "influence"],
}  # fmt: skip


def found_by_gradients(folder: Path, pool: Pool, *, seed: int, epochs: float) -> dict[str, float]:
    """AUROC and average precision of every column."""
    folder.mkdir(parents=True)
    pool.rows.write_parquet(folder / "pool.parquet")
    pool.target.write_parquet(folder / "target.parquet")
    wrong = pool.rows["wrong"].to_numpy()
    results: dict[str, float] = {}
    for question, scorers in GRADIENT_SCORES.items():
        values = settings(folder, pool, seed=seed, epochs=epochs)
        is_classifying = "label" in pool.rows.columns
        extra = ["label_issues"] if is_classifying and question.endswith("identity") else []
        values["score"] = {"scorers": [*extra, *scorers], "checkpoints": "all"}
        command("score", write_config(folder / "config.yaml", values))
        scores = curate.open(folder / "run").scores.sort("row").collect()
        columns = GRADIENT_COLUMNS[question] + (["label_issue_margin"] if extra else [])
        for column in columns:
            label = f"{question}: {column}" if column.startswith("self_") else column
            given = scores[column].cast(pl.Float64)
            there = given.is_not_null().to_numpy()
            ranked = SIGNS.get(column, 1) * given.to_numpy()[there]
            results[label] = float(roc_auc_score(wrong[there], ranked))
            results[f"{label}: average precision"] = float(
                average_precision_score(wrong[there], ranked)
            )
    return results


@pytest.mark.parametrize("name", NAMES)
def test_how_well_self_influence_finds_what_is_wrong(name: str, tmp_path: Path):
    each = [
        found_by_gradients(
            tmp_path / f"seed-{seed}", SETS[name](seed), seed=seed, epochs=EPOCHS.get(name, 6)
        )
        for seed in SEEDS
    ]
    print(f"\n{name}: mean ± sd over {len(each)} seeds")
    for key in each[0]:
        print(f"  {key:62} {told([one[key] for one in each])}")
    identity = [one["self_influence, identity: self_influence"] for one in each]
    if not name.startswith("maths"):
        assert sum(identity) / len(identity) > 0.55
