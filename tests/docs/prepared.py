"""A small run and what else the blocks of the pages take for given, made once for all of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import torch
from docs.blocks import ROOT

from curate.cli import main
from curate.config import to_yaml

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
FILES = 24
"""Shards of each domain: one of the pages names as many."""


def make(root: Path) -> Path:
    """A run with scores, a gradient index, a mixture and shards of every format, in `root`."""
    (root / "data").mkdir(parents=True)
    words = (ROOT / "LICENSE").read_text(encoding="utf-8").split()[:400]
    rows = [
        {
            "text": " ".join(words[(row * step) % len(words)] for step in range(1, 8 + row % 5)),
            "domain": "web" if row % 3 else "code",
        }
        for row in range(180)
    ]
    pl.DataFrame(rows).write_parquet(root / "data" / "rows.parquet")
    pl.DataFrame(rows[:8]).write_parquet(root / "data" / "target.parquet")
    settings: dict[str, Any] = {
        "run": str(root / "run"),
        "sources": {
            "news": {"path": str(root / "data/rows.parquet"), "text": "text", "domain": "domain"}
        },
        "target": {"path": str(root / "data/target.parquet"), "text": "text"},
        "task": {"kind": "causal-lm", "max_tokens": 32},
        "model": {"config": LLAMA, "tokenizer": {"train": "bpe", "vocab_size": 300}},
        "checkpoints": {"train": {"epochs": 1, "max_steps": 4}},
        "score": {"scorers": ["el2n", "loss", "length", "random", "influence"]},
        "mix": {"mixer": "unimax"},
        "plan": {"keep": 0.8},
        "shards": {
            "format": ["parquet", "arrow", "jsonl", "webdataset", "mds"],
            "weights": "domains",
            "min_files": FILES,
        },
    }
    path = root / "settings.yaml"
    path.write_text(to_yaml(settings))
    assert main(["run", str(path), "-q"]) == 0
    return root


def place(made: Path, folder: Path, page: str) -> None:
    """What pages call by name, in the folder where the blocks of a page run."""
    run = made / "run"
    (folder / "runs").mkdir()
    (folder / "models").mkdir()
    checkpoint = next((run / "checkpoints").glob("seed-*/step-*"))
    for name in ("run", "runs/news", "runs/java"):
        (folder / name).symlink_to(run)
    for name in ("models/small", "DIR"):
        (folder / name).symlink_to(checkpoint)
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "data").mkdir()
    frame = pl.read_parquet(made / "data" / "rows.parquet")
    column = "body" if page == "docs/python.md" else "text"
    frame.select(pl.col("text").alias(column)).write_parquet(folder / "data.parquet")
    texts = [json.dumps({"text": text}) + "\n" for text in frame["text"][:20]]
    for name in ("data/texts.jsonl", "wanted.jsonl", "failures.jsonl"):
        (folder / name).write_text("".join(texts))
    labelled = frame.select("text").head(200).with_row_index("label")
    labelled.with_columns(pl.format("{}", pl.col("label") % 2)).write_csv(folder / "texts.csv")
    plan = sorted((run / "plan").glob("part-*.parquet"))[0]
    stands = run / "plan" / "part-0123456789-00000.parquet"
    if not stands.exists():
        stands.symlink_to(plan)


def language_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=300, **LLAMA))


def tokenize(row: dict[str, Any]) -> dict[str, Any]:
    ids = list(row["text"].encode())[:16]
    ids += [0] * (16 - len(ids))
    return {"input_ids": ids, "labels": ids}


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}


def short(*given: Any, **options: Any) -> Any:
    """`TrainingArguments` of two steps on the CPU, whatever the page says."""
    from transformers import TrainingArguments

    few = {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": []}
    return TrainingArguments(*given, **options | few, disable_tqdm=True, save_strategy="no")


Names = Callable[[], dict[str, Any]]

NAMES: dict[str, Names] = {
    "docs/recipes.md": lambda: {
        "tokenize": tokenize,
        "model": language_model(),
        "collator": collate,
        "TrainingArguments": short,
    },
}
"""Page -> names that its blocks take for given."""

INSTEAD: dict[str, list[tuple[str, str]]] = {
    "docs/recipes.md": [("from transformers import TrainingArguments\n", "")],
}
"""Page -> what is left out of its Python, since `NAMES` has it in small."""
