"""What DGA costs beside plain training, in time and in memory; whether it leads to the target.

    pytest tests/benchmarks/test_dga.py -s -o addopts=--import-mode=importlib

Cost: a step that measures, one that does not and a plain one take turns; a time is user CPU seconds
on one thread. Memory is the highest resident memory of a step above what the model and AdamW hold.

Outcome: five domains of text and random bytes, code_java as the target, whose held-out loss is
that of the very model that DGA has trained. The target is a domain of the pool that no arm draws
from: DGA has the other domains for a basis. CURATE_BENCH_RUNS keeps what was done.
"""

import os
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from gradient_ways import peak_mb, seconds
from proxy_case import make_task
from proxy_runs import INLINE, MODEL, Result, data_set, done, importance, run_folder
from transformers import LlamaConfig, LlamaForCausalLM

from curate.models.optimiser import Optimiser
from curate.models.sequence_files import write_sequences
from curate.models.sequences import PARTS, Sequences
from curate.models.tasks.protocol import Encoded
from jobs.index import index_run
from jobs.proxy_work import ProxyBase, proxy_base
from jobs.run import raise_failures, run_tasks
from jobs.settings import parse_settings
from jobs.tokenizer import tokenizer_run
from mixers.dga import DGA
from mixers.dga_rule import DGARule
from mixers.plain import PlainRule
from mixers.proxy_draws import stratified_counts
from mixers.proxy_settings import Proxy
from mixers.proxy_step import Data, Feed, LoopStep
from mixers.rules import Rule

ROUNDS = int(os.environ.get("CURATE_BENCH_ROUNDS", "7"))
VOCABULARY, NUM_DOMAINS = 260, 6
MEASURED, BETWEEN, PLAIN = "a step that measures", "a step between", "a plain step"


def random_data(folder: Path, length: int) -> Data:
    """Random bytes, 64 sequences a domain; of the target too."""
    made: list[Path] = []
    for name, domains, part in (("pool", NUM_DOMAINS, "proxy"), ("target", 1, "target")):
        num = 64 * domains
        encoded = Encoded(
            lengths=np.full(num, length),
            num_scored=np.full(num, length - 1),
            truncated=np.zeros(num, dtype=np.bool_),
            arrays={
                "tokens": np.random.default_rng(0).integers(1, 256, num * length).astype(np.int32),
                "starts": np.arange(num + 1) * length,
                "counted": np.tile(np.arange(length) > 0, num),
            },
            problems={},
        )
        made.append(folder / f"{name}-{length}.safetensors")
        write_sequences(
            made[-1],
            encoded,
            domain=np.repeat(np.arange(domains, dtype=np.int32), 64),
            part=np.full(num, PARTS.index(part), dtype=np.uint8),
            names=[f"domain-{number}" for number in range(domains)],
        )
    pool = Sequences.open(made[:1], parts=("proxy",))
    return Data(pool, None, Sequences.open(made[1:], parts=("target",)))


class Way:
    """A model in training by one rule, step by step."""

    def __init__(self, name: str, data: Data, *, sequences: int, width: int, layers: int) -> None:
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
        device, self._settings = torch.device("cpu"), Proxy(sequences=sequences, warmup=0.0)
        self.optimiser = Optimiser(
            model, self._settings.train, seed=0, total_steps=10_000, device=device
        )
        uniform = torch.full((1, NUM_DOMAINS), 1 / NUM_DOMAINS, dtype=torch.float64)
        every = DGA(warm_share=0.0, every=1 if name == MEASURED else 10_000)
        names, sizes = data.sequences.domains, torch.from_numpy(data.sequences.sizes)
        self._rule: Rule = (
            PlainRule(uniform, torch.ones(1), total_steps=10_000)
            if name == PLAIN
            else DGARule(every, names, sizes)
        )
        self._task = make_task()
        self._feed = Feed(self._task, data, seed=0, device=device, piece_tokens=None)

    def step(self) -> None:
        number = self.optimiser.step_number + 1
        counts = stratified_counts(self._rule.shares().numpy(), self._settings.sequences, number)
        pieces = self._feed.batch(counts, number, by_domain=False)
        lr = self.optimiser.begin()
        step = LoopStep(
            self.optimiser, self._task, self._feed, pieces=pieces, lr=lr, num_domains=NUM_DOMAINS
        )
        self._rule.step(step)
        self.optimiser.finish()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("sequences", "length"), [(64, 128), (24, 128), (64, 256)])
def test_at_the_settings_of_the_page_it_costs_little(tmp_path: Path, sequences: int, length: int):
    torch.set_num_threads(1)
    data = random_data(tmp_path, length)
    ways = {
        name: Way(name, data, sequences=sequences, width=256, layers=4)
        for name in (MEASURED, BETWEEN, PLAIN)
    }
    for way in ways.values():
        way.step()
        way.step()
    times = [{name: seconds(way.step) for name, way in ways.items()} for _ in range(ROUNDS)]
    found = {
        name: statistics.median(row[name] / row[PLAIN] for row in times)
        for name in (MEASURED, BETWEEN)
    }
    # Measured once in 100 steps: 8 sequences of each of 6 domains, and 32 of the target.
    whole = found[BETWEEN] + (found[MEASURED] - found[BETWEEN]) / DGA().every
    print(
        f"\n{sequences} sequences of {length} bytes, 4 layers of 256: measuring"
        f" {found[MEASURED]:.2f}, between {found[BETWEEN]:.3f}, together {whole:.3f}"
    )
    assert whole <= 1.1


@pytest.mark.timeout(1200)
def test_it_needs_two_gradients_more_at_most(tmp_path: Path):
    torch.set_num_threads(1)
    data = random_data(tmp_path, 32)
    peaks: dict[str, float] = {}
    size = 0.0
    for name in (PLAIN, BETWEEN, MEASURED):
        way = Way(name, data, sequences=32, width=512, layers=6)
        size = sum(4 * parameter.numel() for parameter in way.optimiser.trained) / 2**20
        way.step()
        way.step()
        peaks[name] = max(peak_mb(way.step) for _ in range(3))
    print(f"\none gradient {size:.0f} MB; 32 sequences of 32 bytes")
    for name, peak in peaks.items():
        print(f"| {name} | {peak:.0f} MB | {(peak - peaks[PLAIN]) / size:+.2f} gradients |")
    assert peaks[MEASURED] <= peaks[PLAIN] + 2.15 * size


POOL = ("code_csharp", "dialogue", "encyclopedic", "maths", "novels", "noise")
TARGET = "code_java"
SEEDS = (0, 1, 2)
PROXY = Proxy(steps=400, sequences=18, length=64, lr=2e-3, held_out=400, resume_every_seconds=600.0)
SETTINGS: dict[str, Any] = {
    "every": 10,
    "sequences": 16,
    "target_sequences": 16,
    "basis": {name: {name: 1.0} for name in POOL},
}


def pool_and_target(limited: bool) -> tuple[pl.DataFrame, pl.DataFrame]:
    """1,200 passages a domain, 300 of random printable bytes and 300 of the target, of which half
    are held out; and 600 others of the target."""
    frame = data_set("domains_en")
    generator = np.random.default_rng(0)
    noise = [bytes(generator.integers(32, 127, 1000, dtype=np.uint8)).decode() for _ in range(300)]
    docs = [f"noise-{number}" for number in range(len(noise))]
    few = frame.filter(
        pl.col("domain").is_in(POOL)
        & (pl.int_range(pl.len()).shuffle(seed=0).over("domain") < 1200)
    )
    if limited:
        # Half of the rows are held out: 40 kB leave about 20 kB to train on.
        size = pl.col("text").str.len_bytes().cum_sum().over("domain")
        few = few.filter((pl.col("domain") != "code_csharp") | (size < 40_000))
    target = frame.filter(pl.col("domain") == TARGET)
    added = pl.DataFrame({"text": noise, "domain": "noise", "doc": docs})
    return pl.concat([few, target.tail(300), added]), target.head(600)


def natural(pool: pl.DataFrame) -> dict[str, float]:
    """Bytes of each domain in the whole data set; noise as it stands."""
    sizes = pl.concat([data_set("domains_en"), pool.filter(pl.col("domain") == "noise")])
    found = sizes.group_by("domain").agg(pl.col("text").str.len_bytes().sum())
    return {name: float(size) for name, size in found.iter_rows() if name in POOL}


class Arms:
    """Models of the same sequences, trained in different ways."""

    def __init__(self, folder: Path, *, limited: bool = False) -> None:
        self.pool, self.target = pool_and_target(limited)
        paths = [folder / "pool.parquet", folder / "target.parquet"]
        if not paths[1].exists():
            self.pool.write_parquet(paths[0])
            self.target.write_parquet(paths[1])
        source = {"path": str(paths[0]), "text": "text", "domain": "domain", "document": "doc"}
        settings = parse_settings(
            {
                "run": str(folder / "run"),
                "sources": {"pool": source},
                "target": {"path": str(paths[1]), "text": "text"},
                "task": {"kind": "causal-lm", "max_tokens": 64},
                "model": {"config": MODEL, "tokenizer": {"train": "bpe", "vocab_size": 260},
                          "device": "cpu"},
                "index": {"held_out": 0.5},
            }
        )  # fmt: skip
        index_run(settings, pool=INLINE)
        tokenizer_run(settings)
        phases: list[Any]
        self.base: ProxyBase
        self.base, phases = proxy_base(settings, "dga", PROXY, with_target=True)
        for phase in phases:
            raise_failures(phase.name, run_tasks(phase.name, phase.tasks, phase.work, pool=INLINE))

    def run(self, name: str, seed: int, given: Mapping[str, Any], **proxy: Any) -> Result:
        """Shares to train at, or options of DGA."""
        is_plain = "shares" in given
        options = given if is_plain else {"start": None, **SETTINGS, **given}
        task = self.base.task(
            f"{name}/seed-{seed}",
            rule="jobs.proxy_rules:plain" if is_plain else "jobs.dga:make_rule",
            proxy=replace(PROXY, seed=seed, **proxy),
            options=options,
            target_parts=() if is_plain else ("target",),
        )
        done([task], name)
        return Result(Path(task.payload["folder"]))


def mean(values: list[float]) -> float:
    return statistics.fmean(values)


def told(name: str, results: list[Result]) -> list[float]:
    """Prints a row; the losses on the target."""
    losses = [result.held_out[TARGET] for result in results]
    each = ", ".join(f"{loss:.3f}" for loss in losses)
    rest = " | ".join(f"{mean([r.held_out[n] for r in results]):.3f}" for n in POOL)
    print(f"| {name} | {mean(losses):.3f} ({each}) | {rest} |", flush=True)
    return losses


def last_shares(result: Result) -> dict[str, float]:
    table = result.trajectory
    last = table.filter(pl.col("step") == pl.col("step").max())
    return dict(last.select("domain", "weight").iter_rows())


@pytest.mark.timeout(0)
def test_it_leads_to_the_domain_like_the_target(tmp_path: Path):
    torch.set_num_threads(1)
    arms = Arms(run_folder("dga", tmp_path))
    near = importance(arms.pool, arms.target, POOL)
    print("\nimportance sampling", {name: round(share, 3) for name, share in near.items()})
    plain: dict[str, Any] = {
        "uniform": dict.fromkeys(POOL, 1.0),
        "natural": natural(arms.pool),
        "importance": {n: 0.9 * near[n] + 0.1 / len(POOL) for n in POOL},
        "only-csharp": {"code_csharp": 1.0},
    }
    print("| arm | code_java | " + " | ".join(POOL) + " |")
    losses = {
        name: told(name, [arms.run(name, seed, {"shares": shares}) for seed in SEEDS])
        for name, shares in plain.items()
    }
    for name, beta in (("DGA", 1.0), ("DGA-beta-0.1", 0.1)):
        results = [arms.run(name, seed, {} if beta == 1 else {"beta": beta}) for seed in SEEDS]
        for seed, result in zip(SEEDS, results, strict=True):
            ends, means = last_shares(result), result.facts["mixture"]
            shown = " | ".join(f"{means[n]:.3f}, {ends[n]:.3f}" for n in POOL)
            print(f"| {name}, seed {seed}: mean, last share | | {shown} |", flush=True)
            if beta == 1:
                assert max(POOL, key=lambda n: means[n]) == "code_csharp"
                assert means["code_csharp"] > 0.5
                assert min(POOL, key=lambda n: means[n]) == "noise"
        losses[name] = told(name, results)
    assert mean(losses["uniform"]) - mean(losses["DGA"]) > 0.15


@pytest.mark.timeout(0)
def test_a_small_domain_is_learned_by_heart_unless_it_is_capped(tmp_path: Path):
    torch.set_num_threads(1)
    arms = Arms(run_folder("dga-limited", tmp_path), limited=True)
    ways: dict[str, dict[str, Any]] = {
        "only-csharp": {"shares": {"code_csharp": 1.0}},
        "DGA-capped": {"max_epochs": 4.0},
        "DGA": {},
        "uniform": {"shares": dict.fromkeys(POOL, 1.0)},
    }
    curves: dict[str, list[list[float]]] = {}
    for name, options in ways.items():
        results = [arms.run(name, seed, options, evaluate_every=80) for seed in SEEDS]
        told(name, results)
        curves[name] = []
        for result in results:
            own = result.curve.filter(pl.col("domain") == TARGET).sort("step")
            curves[name].append(own["loss"].to_list())
        shown = [round(mean(list(row)), 3) for row in zip(*curves[name], strict=True)]
        often = mean([result.facts["epochs"]["code_csharp"] for result in results])
        print(f"  {name}: code_java after each fifth {shown}; {often:.1f} epochs of code_csharp")
    rise = {name: mean([own[-1] - min(own) for own in found]) for name, found in curves.items()}
    print("  above the lowest at the end", {name: round(value, 3) for name, value in rise.items()})
    assert rise["only-csharp"] > 0.05
    assert rise["DGA-capped"] < 0.02
