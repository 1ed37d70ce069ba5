"""What a step of DoGE costs beside a plain one, in time and in memory; whether its mixture helps.

    CURATE_DATA=... pytest tests/benchmarks/test_doge.py -s -o addopts=--import-mode=importlib

Both ways train a model of their own on the same sequences and take turns, step by step; a time is
user CPU seconds on one thread. Memory is the highest resident memory of a step above what the model
and AdamW hold, of a model so large and a batch so small that gradients are most of it.
"""

import json
import os
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from gradient_ways import peak_mb, seconds
from proxy_case import make_task
from proxy_runs import INLINE, MODEL, data_set, open_runs, run_folder
from transformers import LlamaConfig, LlamaForCausalLM

from curate.models.optimiser import Optimiser
from curate.models.sequence_files import write_sequences
from curate.models.sequences import PARTS, Sequences
from curate.models.tasks.protocol import Encoded
from jobs.index import index_run
from jobs.mix import mix_run
from jobs.settings import parse_settings
from jobs.tokenizer import tokenizer_run
from mixers.doge import DoGE, DoGERule
from mixers.plain import PlainRule
from mixers.proxy_draws import stratified_counts
from mixers.proxy_settings import Proxy
from mixers.proxy_step import Data, Feed, LoopStep
from mixers.rules import Rule

ROUNDS = int(os.environ.get("CURATE_BENCH_ROUNDS", "8"))
NUM_DOMAINS = 6
VOCABULARY = 260

PLAIN = "plain"
WAYS: dict[str, DoGE | None] = {
    PLAIN: None,
    "DoGE": DoGE(skip_share=0.0),
    "DoGE, raw": DoGE(skip_share=0.0, form="raw"),
    "DoGE, universal": DoGE(skip_share=0.0, mode="universal"),
    "DoGE, Adam": DoGE(skip_share=0.0, precondition="adam"),
    "DoGE, without lag": DoGE(skip_share=0.0, lag=False),
    "DoGE, forward mode": DoGE(skip_share=0.0, form="raw", lag=False, how="forward"),
}


def random_data(folder: Path, length: int) -> Data:
    """Random bytes, 64 sequences a domain; of the target too."""
    made: list[Path] = []
    for name, domains, part in (("pool", NUM_DOMAINS, "proxy"), ("target", 1, "target")):
        num = 64 * domains
        generator = np.random.default_rng(0)
        encoded = Encoded(
            lengths=np.full(num, length),
            num_scored=np.full(num, length - 1),
            truncated=np.zeros(num, dtype=np.bool_),
            arrays={
                "tokens": generator.integers(1, 256, num * length).astype(np.int32),
                "starts": np.arange(num + 1) * length,
                "counted": np.tile(np.arange(length) > 0, num),
            },
            problems={},
        )
        path = folder / f"{name}-{length}.safetensors"
        write_sequences(
            path,
            encoded,
            domain=np.repeat(np.arange(domains, dtype=np.int32), 64),
            part=np.full(num, PARTS.index(part), dtype=np.uint8),
            names=[f"domain-{number}" for number in range(domains)],
        )
        made.append(path)
    pool = Sequences.open(made[:1], parts=("proxy",))
    return Data(pool, None, Sequences.open(made[1:], parts=("target",)))


class Way:
    """A model in training by one rule, step by step."""

    def __init__(self, data: Data, rule: Rule, settings: Proxy, width: int, layers: int) -> None:
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=width // 64,
                pad_token_id=0,
                bos_token_id=None,
            )
        )
        device = torch.device("cpu")
        self.optimiser = Optimiser(
            model, settings.train, seed=0, total_steps=settings.steps, device=device
        )
        self._task, self._rule, self._settings = make_task(), rule, settings
        self._feed = Feed(self._task, data, seed=0, device=device, piece_tokens=None)

    def step(self) -> None:
        number = self.optimiser.step_number + 1
        counts = stratified_counts(self._rule.shares().numpy(), self._settings.sequences, number)
        pieces = self._feed.batch(counts, number, by_domain=self._rule.by_domain)
        lr = self.optimiser.begin()
        step = LoopStep(
            self.optimiser, self._task, self._feed, pieces=pieces, lr=lr, num_domains=NUM_DOMAINS
        )
        self._rule.step(step)
        self.optimiser.finish()

    @property
    def gradient_mb(self) -> float:
        """One copy."""
        return sum(4 * parameter.numel() for parameter in self.optimiser.trained) / 2**20


def make_way(name: str, data: Data, *, sequences: int, width: int, layers: int) -> Way:
    settings = Proxy(steps=10_000, sequences=sequences, warmup=0.0)
    doge = WAYS[name]
    uniform = torch.full((1, NUM_DOMAINS), 1 / NUM_DOMAINS, dtype=torch.float64)
    rule: Rule = (
        PlainRule(uniform, torch.ones(1), total_steps=settings.steps)
        if doge is None
        else DoGERule(doge, NUM_DOMAINS, peak_lr=settings.lr)
    )
    return Way(data, rule, settings, width, layers)


def turns(ways: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median over rounds of the ratio to a plain step of the same round."""
    for step in ways.values():
        step()
        step()
    times = [{name: seconds(step) for name, step in ways.items()} for _ in range(rounds)]
    return {name: statistics.median(row[name] / row[PLAIN] for row in times) for name in ways}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("sequences", "length"), [(24, 128), (48, 128), (24, 512)])
def test_a_step_takes_at_most_half_as_long_again(tmp_path: Path, sequences: int, length: int):
    torch.set_num_threads(1)
    data = random_data(tmp_path, length)
    ways = {
        name: make_way(name, data, sequences=sequences, width=256, layers=4).step for name in WAYS
    }
    found = turns(ways, ROUNDS)
    print(f"\n{sequences} sequences of {length} bytes, {NUM_DOMAINS} domains, 4 layers of 256")
    for name, ratio in found.items():
        print(f"| {name} | {ratio:.2f} |")
    assert found["DoGE"] <= 1.5
    assert found["DoGE, raw"] <= 1.5


@pytest.mark.timeout(1200)
def test_a_step_needs_two_gradients_more_at_most(tmp_path: Path):
    torch.set_num_threads(1)
    data = random_data(tmp_path, 32)
    peaks: dict[str, float] = {}
    size = 0.0
    for name in WAYS:
        way = make_way(name, data, sequences=6, width=768, layers=6)
        size = way.gradient_mb
        way.step()
        way.step()
        peaks[name] = max(peak_mb(way.step) for _ in range(3))
    print(f"\none gradient {size:.0f} MB; 6 sequences of 32 bytes")
    for name, peak in peaks.items():
        print(f"| {name} | {peak:.0f} MB | {(peak - peaks[PLAIN]) / size:+.2f} gradients |")
    for name in WAYS:
        assert peaks[name] <= peaks[PLAIN] + 2.15 * size, name


POOL = ("code_csharp", "dialogue", "encyclopedic", "maths", "novels")
TARGET = "code_java"
SEEDS = (0, 1, 2)
PROXY = Proxy(steps=400, sequences=24, length=64, lr=2e-3, held_out=160, resume_every_seconds=600.0)
FORMS: dict[str, dict[str, Any]] = {
    "normalised": {},
    "raw": {"form": "raw"},
    "universal": {"mode": "universal"},
}


def pool_and_target() -> tuple[pl.DataFrame, pl.DataFrame]:
    """1,200 passages a domain and 300 of random printable bytes, with the last 300 of the target to
    measure on; and 600 others of the target."""
    frame = data_set("domains_en")
    generator = np.random.default_rng(0)
    noise = [bytes(generator.integers(32, 127, 1000, dtype=np.uint8)).decode() for _ in range(300)]
    docs = [f"noise-{number}" for number in range(len(noise))]
    target = frame.filter(pl.col("domain") == TARGET)
    few = frame.filter(
        pl.col("domain").is_in(POOL)
        & (pl.int_range(pl.len()).shuffle(seed=0).over("domain") < 1200)
    )
    added = pl.DataFrame({"text": noise, "domain": "noise", "doc": docs})
    return pl.concat([few, target.tail(300), added]), target.head(600)


def found_mixtures(
    folder: Path, pool: pl.DataFrame, target: pl.DataFrame, name: str
) -> list[dict[str, float]]:
    """The mixture of each seed, by `curate mix`."""
    paths = [folder / "mix.parquet", folder / "target.parquet"]
    if not paths[1].exists():
        pool.filter(pl.col("domain") != TARGET).write_parquet(paths[0])
        target.write_parquet(paths[1])
    proxy = {key: getattr(PROXY, key) for key in ("steps", "sequences", "length", "lr")}
    settings = parse_settings(
        {
            "run": str(folder / f"run-{name}"),
            "sources": {
                "pool": {
                    "path": str(paths[0]), "text": "text", "domain": "domain", "document": "doc"
                }
            },
            "target": {"path": str(paths[1]), "text": "text"},
            "task": {"kind": "causal-lm", "max_tokens": 64},
            "model": {"config": MODEL, "tokenizer": {"train": "bpe", "vocab_size": 260},
                      "device": "cpu"},
            "index": {"held_out": 0.2},
            "mix": {
                "mixer": "doge",
                "proxy": {**proxy, "resume_every_seconds": 600.0},
                "seeds": list(SEEDS),
                **FORMS[name],
            },
        }
    )  # fmt: skip
    index_run(settings, pool=INLINE)
    tokenizer_run(settings)
    mix_run(settings, pool=INLINE)
    runs = Path(settings.run) / "proxies" / "doge"
    return [
        json.loads((runs / f"seed-{seed}" / "result.json").read_text())["mixture"] for seed in SEEDS
    ]


@pytest.mark.timeout(0)
def test_the_domain_like_the_target_comes_first_and_its_mixture_helps(tmp_path: Path):
    torch.set_num_threads(1)
    folder = run_folder("doge", tmp_path)
    pool, target = pool_and_target()
    names = [*POOL, "noise"]
    found = found_mixtures(folder, pool, target, "normalised")
    print("\n| form, seed | " + " | ".join(names) + " |")
    for seed, own in zip(SEEDS, found, strict=True):
        print(f"| normalised, {seed} | " + " | ".join(f"{own[n]:.3f}" for n in names) + " |")
    runs = open_runs(folder, pool, PROXY, held_out=0.2)
    arms: dict[str, dict[str, float]] = {
        "uniform": dict.fromkeys(names, 1.0),
        "DoGE": {n: statistics.fmean(own[n] for own in found) for n in names},
        "only code_csharp": {"code_csharp": 1.0},
    }
    losses: dict[str, list[float]] = {}
    for arm, shares in arms.items():
        folder_name = arm.replace(" ", "-")
        ends = [runs.run(folder_name, 10 + s, {"shares": shares}).held_out for s in SEEDS]
        losses[arm] = [end[TARGET] for end in ends]
        told = ", ".join(f"{n} {statistics.fmean(end[n] for end in ends):.3f}" for n in names)
        each = ", ".join(f"{loss:.3f}" for loss in losses[arm])
        print(f"| {arm} | {statistics.fmean(losses[arm]):.3f} ({each}) | {told} |", flush=True)
    for own in found:
        assert max(own, key=lambda n: own[n]) == "code_csharp"
        assert own["code_csharp"] > 1.5 / len(names)
        assert min(own, key=lambda n: own[n]) == "noise"
    assert max(losses["DoGE"]) < min(losses["uniform"])


@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", ["raw", "universal"])
def test_what_the_other_forms_find(tmp_path: Path, name: str):
    """Raw products go by the lengths of gradients; without a target only noise surely loses."""
    torch.set_num_threads(1)
    found = found_mixtures(run_folder("doge", tmp_path), *pool_and_target(), name)
    names = [*POOL, "noise"]
    for seed, own in zip(SEEDS, found, strict=True):
        print(f"| {name}, {seed} | " + " | ".join(f"{own[n]:.3f}" for n in names) + " |")
    if name == "universal":
        assert all(own["noise"] < 1 / len(names) for own in found)
