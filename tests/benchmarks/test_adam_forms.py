"""How alike are rows of Adam's updates in its three forms? Rank correlation on a small real model.

    CURATE_DATA=... python -m pytest tests/benchmarks/test_adam_forms.py -s \
        -o addopts=--import-mode=importlib

Trains a small language model on `domains_en`, keeps the moments, builds the index of 800 examples
in each form, and asks with 40 examples of `code_java` as LESS does: the cosine of an example's row
and the mean of the target's, of unit length each. Prints the tables of docs/influence_index.md; ten
minutes. The last one is of CPU time and memory of a pass over `CURATE_BENCH_MODEL`, beside forward
and backward of all weights.
"""

import os
import time
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from gradient_ways import interleaved, language_model, losses, medians, ratios, tokens
from scipy.stats import spearmanr
from torch.nn import functional

from curate.models.adam import Moment, diagonal_update, exact_update
from curate.models.adam_pass import AdamProjector, scaled_sides
from curate.models.index_pass import IndexPass
from curate.models.projection import Projection, draw_sides
from curate.models.settings import CausalLM
from curate.models.tasks.causal_lm import CausalLMTask
from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.influence_build import (
    World,
    build_tasks,
    build_work,
    open_part,
    pool_world,
    target_world,
)
from jobs.influence_sides import IndexOptions
from jobs.measurers import Measurer, measurers
from jobs.run import raise_failures, run_tasks
from jobs.settings import Settings, parse_settings
from jobs.target import target_task, target_work
from jobs.train import tokenizer_run, train_run

DATA = Path(os.environ.get("CURATE_DATA", "no-data"))
pytestmark = pytest.mark.timeout(3600)
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="needs real data: set CURATE_DATA to its folder"
)
MODEL = os.environ.get("CURATE_BENCH_MODEL", "llama-4m")
ROUNDS = int(os.environ.get("CURATE_BENCH_ROUNDS", "5"))
BASE = "forward and backward"
POOL = Pool(InlineExecutor(), 1)
FORMS: list[Any] = ["none", "exact", "diagonal", "factored"]
TARGET = "code_java"
STEPS = int(os.environ.get("CURATE_BENCH_STEPS", "240"))
LENGTH = 96


def made(root: Path) -> Settings:
    """Ten domains in equal parts, each cut to a few hundred characters."""
    frame = pl.read_parquet(DATA / "domains_en" / "train.parquet").with_columns(
        pl.col("text").str.slice(0, 400)
    )
    picked = pl.concat(
        part.sample(80, seed=0) for part in frame.partition_by("domain") if part.height >= 80
    )
    picked.write_parquet(root / "pool.parquet")
    test = pl.read_parquet(DATA / "domains_en" / "test.parquet").filter(domain=TARGET)
    test.with_columns(pl.col("text").str.slice(0, 400)).sample(40, seed=0).write_parquet(
        root / "target.parquet"
    )
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128}
    train = {"epochs": 1000, "max_steps": STEPS, "batch_tokens": 2048, "lr": 2e-3}
    settings = parse_settings(
        {
            "run": str(root / "run"),
            "sources": {"pool": {"path": str(root / "pool.parquet"), "text": "text"}},
            "target": {"path": str(root / "target.parquet"), "text": "text"},
            "task": {"kind": "causal-lm", "max_tokens": LENGTH},
            "model": {
                "config": {"model_type": "llama", **shape, **heads},
                "tokenizer": {"train": "bpe", "vocab_size": 1024},
                "device": "cpu",
            },
            "checkpoints": {"train": {**train, "save_moments": True, "save_every_epochs": 0.5}},
            "index": {"held_out": 0.0, "partition_rows": 200},
        }
    )
    index_run(settings, pool=POOL)
    tokenizer_run(settings)
    train_run(settings, pool=POOL)
    raise_failures("target", run_tasks("t", [target_task(settings)], target_work, pool=POOL))
    return settings


def rows_of(world: World, measurer: Measurer, options: IndexOptions) -> tuple[torch.Tensor, float]:
    """Rows of unit length, and CPU seconds of the build."""
    tasks = build_tasks(world, [measurer], options)
    started = time.process_time()
    raise_failures("influence", run_tasks("influence", tasks, build_work, pool=POOL))
    seconds = time.process_time() - started
    parts = [open_part(world.folder, part, measurer.slug) for part in world.folder.partitions()]
    return functional.normalize(torch.cat([part.values() for part in parts])), seconds


@needs_data
def test_rank_correlation_of_the_forms(tmp_path: Path):
    settings = made(tmp_path)
    domains = pl.read_parquet(tmp_path / "pool.parquet")["domain"]
    every = measurers(settings)
    places = sorted({0, len(every) // 2, len(every) - 1})
    pairs = list(combinations(FORMS, 2))
    print("\n| step | p | " + " | ".join(f"{a}, {b}" for a, b in pairs) + " | CPU seconds |")
    print("| ---: | ---: |" + " ---: |" * (len(pairs) + 1))
    shares: list[str] = []
    for measurer in (every[place] for place in places):
        for dim in (16, 192):
            scores: dict[str, np.ndarray] = {}
            took: list[str] = []
            for form in FORMS:
                options = IndexOptions(projection=Projection(dim=dim), dtype="float32", adam=form)
                target, _ = rows_of(target_world(settings), measurer, options)
                rows, seconds = rows_of(pool_world(settings), measurer, options)
                scores[form] = (rows @ target.mean(0)).numpy()
                took.append(f"{seconds:.0f}")
            found = [_correlation(scores[a], scores[b]) for a, b in pairs]
            step = int(measurer.name.rsplit("-", 1)[-1])
            figures = " | ".join(f"{value:.3f}" for value in found)
            print(f"| {step} | {dim} | {figures} | {', '.join(took)} |", flush=True)
            top = {form: _share(scores[form], domains) for form in FORMS}
            shares.append(
                f"| {step} | {dim} | " + " | ".join(f"{top[form]:.0%}" for form in FORMS) + " |"
            )
            assert found[pairs.index(("diagonal", "factored"))] > 0.5
    print(f"\n| step | p | {' | '.join(FORMS)} |\n| ---: | ---: |" + " ---: |" * len(FORMS))
    print("\n".join(shares))


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    found: Any = spearmanr(one, other)
    return float(found.statistic)


def _share(scores: np.ndarray, domains: pl.Series) -> float:
    """Share of code in Java or C#, its translation, among the best twentieth."""
    best = np.argsort(-scores)[: len(scores) // 20]
    return float(domains[best.tolist()].is_in([TARGET, "code_csharp"]).mean() or 0)


def test_what_each_form_costs():
    torch.set_num_threads(1)
    model = language_model(MODEL)
    sides = draw_sides(model)
    draw = torch.Generator().manual_seed(0)
    moments: dict[str, Moment] = {}
    for name, (left, right) in sides.items():
        first = torch.randn(len(left), len(right), generator=draw) * 1e-3
        moments[name] = Moment(first, first.square() * 10, step=100)
    tokenizer: Any = SimpleNamespace(pad_token_id=0, eos_token_id=0, bos_token_id=None)
    task = CausalLMTask(CausalLM(max_tokens=128), tokenizer)
    ids = tokens(8, 128)
    batch = {"input_ids": ids, "targets": ids[:, 1:], "attention_mask": torch.ones_like(ids)}

    def plain() -> None:
        losses(model, {"input_ids": ids}).sum().backward()
        model.zero_grad(set_to_none=True)

    def passing(form: Any) -> Any:
        used, adam = sides, None
        if form == "factored":
            used = scaled_sides(moments, sides)
        elif form != "none":
            make = exact_update if form == "exact" else diagonal_update
            updates = {name: make(moment) for name, moment in moments.items()}
            adam = AdamProjector(updates, sides)
        index = IndexPass(model, task, used, reduction="mean", adam=adam)
        return lambda: index.measure(batch, len(ids))

    table: dict[str, Any] = {BASE: plain, **{form: passing(form) for form in FORMS}}
    for work in table.values():
        work()
    times, peaks = interleaved(table, ROUNDS)
    each = ratios(times, BASE)
    print(f"\n{MODEL}, T = 128, a batch of 8, p = 16, one thread, {ROUNDS} rounds\n")
    print("| what | ratio | range | peak MB |\n| --- | ---: | --- | ---: |")
    for label, middle in medians(each).items():
        spread = f"{min(each[label]):.2f} to {max(each[label]):.2f}"
        print(f"| {label} | {middle:.2f} | {spread} | {peaks[label]:.0f} |")
    assert medians(each)["factored"] < 1.2 * medians(each)["none"]
