"""Proxy runs of experiments: a run folder, its sequences, and many small byte-level models."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest

from curate.models import sequences as store
from curate.plan.mixture import DomainSize
from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.proxy_work import ProxyBase, proxy_base, train_proxy
from jobs.run import Task, raise_failures, run_tasks
from jobs.sequences import open_sequences
from jobs.settings import parse_settings
from jobs.tokenizer import tokenizer_run
from mixers.proxy_settings import Proxy

INLINE = Pool(InlineExecutor(), 1)
MODEL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def data_set(name: str) -> pl.DataFrame:
    """All rows of a data set, or a skipped test."""
    if "CURATE_DATA" not in os.environ:
        pytest.skip("set CURATE_DATA to the folder of the data sets")
    folder = Path(os.environ["CURATE_DATA"]) / name
    parts = [pl.read_parquet(folder / f"{part}.parquet") for part in ("train", "test")]
    return pl.concat(parts).select("text", "domain", "doc")


def run_folder(name: str, given: Path) -> Path:
    """`CURATE_BENCH_RUNS/name` where that is set: what is done there is not done again."""
    root = os.environ.get("CURATE_BENCH_RUNS")
    folder = given if root is None else Path(root) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@dataclass(frozen=True, slots=True)
class Runs:
    """Runs on the same sequences."""

    base: ProxyBase
    proxy: Proxy

    @property
    def sequences(self) -> store.Sequences:
        key = str(self.base.payload["sequences"])
        return open_sequences(self.base.settings, key, ("reference", "proxy"))

    def sizes(self) -> dict[str, DomainSize]:
        """What is trained on, by domain."""
        own = self.sequences
        rows = zip(own.domains, own.sizes, own.num_tokens, strict=True)
        return {name: DomainSize(int(size), int(tokens)) for name, size, tokens in rows}

    @property
    def budget(self) -> float:
        """Counted tokens of a run."""
        own = self.sequences
        return (
            self.proxy.steps * self.proxy.sequences * float(own.num_tokens.sum() / own.sizes.sum())
        )

    def run(self, name: str, seed: int, options: Mapping[str, Any], *,
            rule: str = "jobs.proxy_rules:plain") -> "Result":  # fmt: skip
        """Train one, unless that was done."""
        proxy = replace(self.proxy, seed=seed)
        task = self.base.task(f"{name}/seed-{seed}", rule=rule, proxy=proxy, options=options)
        done([task], name)
        return Result(Path(task.payload["folder"]))


@dataclass(frozen=True, slots=True)
class Result:
    """What a run left."""

    folder: Path

    @property
    def facts(self) -> dict[str, Any]:
        return json.loads((self.folder / "result.json").read_text())

    @property
    def held_out(self) -> dict[str, float]:
        """Domain -> loss at the end, nats per token."""
        return self.facts["held_out"]

    @property
    def curve(self) -> pl.DataFrame:
        """step, domain, loss on held-out sequences."""
        return pl.read_parquet(self.folder / "held_out.parquet")

    @property
    def trajectory(self) -> pl.DataFrame:
        return pl.read_parquet(self.folder / "trajectory.parquet")


def open_runs(folder: Path, rows: pl.DataFrame, proxy: Proxy, *, held_out: float) -> Runs:
    """Index rows of text, domain and doc, train a tokenizer of bytes, cut sequences."""
    pool = folder / "pool.parquet"
    if not pool.exists():
        rows.write_parquet(pool)
    settings = parse_settings(
        {
            "run": str(folder / "run"),
            "sources": {
                "pool": {"path": str(pool), "text": "text", "domain": "domain", "document": "doc"}
            },
            "task": {"kind": "causal-lm", "max_tokens": 64},
            "model": {"config": MODEL, "tokenizer": {"train": "bpe", "vocab_size": 260},
                      "device": "cpu"},
            "index": {"held_out": held_out},
        }
    )  # fmt: skip
    index_run(settings, pool=INLINE)
    tokenizer_run(settings)
    base, phases = proxy_base(settings, "runs", proxy)
    for phase in phases:
        raise_failures(phase.name, run_tasks(phase.name, phase.tasks, phase.work, pool=INLINE))
    return Runs(base, proxy)


def done(tasks: list[Task], name: str) -> None:
    raise_failures(name, run_tasks(name, tasks, train_proxy, pool=INLINE))


def importance(
    pool: pl.DataFrame, target: pl.DataFrame, domains: Sequence[str]
) -> dict[str, float]:
    """How many target examples lie nearest to each domain, by their frequencies of byte pairs."""

    def pairs(texts: list[str]) -> npt.NDArray[np.float64]:
        counts = np.zeros(65536)
        for text in texts:
            for pair, number in Counter(pairwise(text.encode())).items():
                counts[256 * pair[0] + pair[1]] += number
        return counts / np.linalg.norm(counts)

    centres = np.stack(
        [pairs(pool.filter(pl.col("domain") == name)["text"].to_list()[:300]) for name in domains]
    )
    nearest = [int((centres @ pairs([text])).argmax()) for text in target["text"]]
    return {name: nearest.count(place) / len(nearest) for place, name in enumerate(domains)}
