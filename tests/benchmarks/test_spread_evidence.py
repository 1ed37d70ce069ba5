"""How much of a score's order survives when it is spread from a core set, and what is saved.

    pytest tests/benchmarks/test_spread_evidence.py -s -o addopts=--import-mode=importlib

Small models are trained from scratch and score all training examples; then the same scores are
spread from core sets of 1, 5 and 20 %. Printed are, for the examples outside the core set, the
rank correlation of spread and measured scores, in brackets what cross-validation in the core set
had promised, the share of the highest tenth of all examples that is among the highest tenth spread,
and the time of spreading over that of measuring all. In one set a tenth of the labels is wrong:
there the area under the ROC curve says how well each score finds them. The gate is off.

`CURATE_DATA` names the data sets. `CURATE_VECTORS` names a folder with `<set>/train.npy` and the
rows they belong to in `train.parquet`; without it vectors are hashed n-grams.
"""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from curate.data.example import KEY
from curate.data.layout import RunFolder
from curate.evaluate.agreement import roc_auc
from curate.evaluate.fidelity import fidelity
from jobs.cluster import InlineExecutor, Pool
from jobs.embedding import embed_run
from jobs.index import index_run
from jobs.score import score_run
from jobs.settings import Settings, parse_settings
from jobs.tokenizer import tokenizer_run
from jobs.train import train_run

INLINE = Pool(InlineExecutor(), 1)
CORES = (0.01, 0.05, 0.2)
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
         "num_attention_heads": 4}  # fmt: skip
TRAIN: dict[str, Any] = {"epochs": 4, "lr": 1e-3, "batch_tokens": 1024, "save_every_epochs": 1}

SETS: dict[str, dict[str, Any]] = {
    "clinc150": {"scorers": ("el2n", "grand", "vog"), "num_classes": 151},
    "rt_polarity": {"scorers": ("el2n", "grand", "vog"), "num_classes": 2},
    "rt_polarity, labels wrong": {"scorers": ("el2n",), "num_classes": 2, "wrong": 0.1},
    "domains_en": {"scorers": ("loss", "grand"), "epochs": 1},
}


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", SETS)
def test_how_well_scores_spread(name: str, tmp_path: Path):
    facts = SETS[name]
    wrong = write_rows(name.partition(",")[0], tmp_path, facts.get("wrong", 0.0))
    settings = settings_of(tmp_path, facts, [])
    index_run(settings, pool=INLINE)
    tokenizer_run(settings)
    started = time.process_time()
    train_run(settings, pool=INLINE)
    embed_run(settings, pool=INLINE)
    print(f"\n{name}: {time.process_time() - started:.0f} s of training and vectors")
    for scorer in facts["scorers"]:
        whole, seconds = scored(settings_of(tmp_path, facts, [scorer]), scorer)
        truth = whole[scorer].to_numpy().astype(np.float64)
        print(f"{name} | {scorer} | all | {seconds:.0f} s |{area(truth, wrong)}")
        for core in CORES:
            options = {"scorer": scorer, "core": core, "force": True}
            given = settings_of(tmp_path, facts, [{"spread": options}])
            table, own = scored(given, "spread")
            assert table.select(KEY).equals(whole.select(KEY))
            spread = table[scorer].to_numpy().astype(np.float64)
            rest = (table["spread_measured"] == 0).to_numpy() & np.isfinite(truth)
            rho = fidelity(truth[rest], spread[rest]).rank_correlation
            recall = fidelity(truth[np.isfinite(truth)], spread[np.isfinite(truth)]).top_recall
            mark = (gate_of(given, scorer)).mark() or {}
            print(
                f"{name} | {scorer} | {100 * core:.0f} % | {mark['method']} | {rho:.2f}"
                f" ({mark['rank_correlation']:.2f}) | {100 * recall:.0f} %"
                f" | {own / seconds:.2f} |{area(spread, wrong)}",
                flush=True,
            )


def gate_of(settings: Settings, scorer: str) -> Any:
    from curate.data.partitions import Output

    return Output(Path(settings.run) / "spread" / scorer / "gate.json")


def area(scores: np.ndarray, wrong: np.ndarray) -> str:
    there = np.isfinite(scores)
    if not wrong.any():
        return ""
    return f" AUC {roc_auc(scores[there].tolist(), wrong[there].tolist()):.2f}"


def write_rows(name: str, folder: Path, share: float) -> np.ndarray:
    """The training rows, vectors beside them; which labels were changed."""
    if "CURATE_DATA" not in os.environ:
        pytest.skip("CURATE_DATA does not say where the shared data sets are")
    place = Path(os.environ.get("CURATE_VECTORS", "")) / name
    if (place / "train.npy").exists():
        rows = pl.read_parquet(place / "train.parquet")
        rows = rows.with_columns(pl.Series("vector", np.load(place / "train.npy")))
    else:
        rows = pl.read_parquet(Path(os.environ["CURATE_DATA"]) / name / "train.parquet")
    wrong = np.random.default_rng(0).random(rows.height) < share
    if share:
        flipped = np.where(wrong, 1 - rows["label"].to_numpy(), rows["label"].to_numpy())
        rows = rows.with_columns(pl.Series("label", flipped))
    rows.write_parquet(folder / "rows.parquet")
    return wrong


def settings_of(folder: Path, facts: dict[str, Any], scorers: list[Any]) -> Settings:
    classes = facts.get("num_classes")
    has_vectors = "vector" in pl.read_parquet_schema(folder / "rows.parquet")
    task: dict[str, Any] = {"kind": "causal-lm", "max_tokens": 128}
    shape: dict[str, Any] = {**SHAPE, "model_type": "llama"}
    source = {"path": str(folder / "rows.parquet"), "text": "text"}
    if classes is not None:
        task = {"kind": "text-classification", "num_classes": classes, "max_tokens": 64}
        shape = {**SHAPE, "model_type": "bert"}
        source["label"] = "label"
    made = {"kind": "column", "column": "vector"} if has_vectors else {"kind": "ngrams"}
    return parse_settings(
        {
            "run": str(folder / "run"),
            "sources": {"rows": source},
            "task": task,
            "model": {
                "config": shape,
                "tokenizer": {"train": "bpe", "vocab_size": 4096},
                "device": "cpu",
            },
            "checkpoints": {"train": {**TRAIN, "epochs": facts.get("epochs", TRAIN["epochs"])}},
            "embed": {"vectors": made},
            "score": {"scorers": scorers, "checkpoints": "all"},
        }
    )


def scored(settings: Settings, scorer: str) -> tuple[pl.DataFrame, float]:
    """The table of a scorer, and the processor's seconds: others may be at work."""
    started = time.process_time()
    score_run(settings, pool=INLINE)
    seconds = time.process_time() - started
    run = RunFolder(Path(settings.run))
    found = [pl.read_parquet(run.scores(part, scorer).path) for part in run.partitions()]
    return pl.concat(found), seconds
