"""DoReMi, DoGE and DGA in small: is a model better on their mixture? Rows of docs/reproductions.md.

    CURATE_DATA=... pytest tests/benchmarks/test_reproduction_mixtures.py -s \\
        -o addopts=--import-mode=importlib

Five domains of domains_en at their natural proportions and 2 % of random printable bytes; code_java
is nobody's training data, but the target of DoGE and DGA. Byte-level models of 82,240 parameters
without embeddings. Each of five seeds has a mixture of its own, found by a mixer of that seed, and
a model of another seed trained on it at equal tokens; natural, uniform and importance sampling
likewise. `-k doremi`, `-k doge` and `-k dga` for one of them; `CURATE_BENCH_RUNS` keeps what was
trained, so that the next test does not train it again.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from proxy_runs import INLINE, MODEL, Result, data_set, done, importance, run_folder
from reproduction import SEEDS, Finding, judged, line, of_values, of_verdict

from jobs.index import index_run
from jobs.mix import mix_run
from jobs.proxy_work import proxy_base
from jobs.run import raise_failures, run_tasks
from jobs.settings import Settings, parse_settings
from jobs.tokenizer import tokenizer_run
from mixers.proxy_settings import Proxy

pytestmark = pytest.mark.timeout(0)

POOL = ("code_csharp", "dialogue", "encyclopedic", "maths", "novels")
NAMES = (*POOL, "noise")
TARGET = "code_java"
PROXY = Proxy(steps=300, sequences=24, length=64, lr=2e-3, held_out=160, resume_every_seconds=600.0)
"""Of the mixers that look for a mixture."""
ARMS = replace(PROXY, steps=150)
"""Of the models that are compared; DGA's is one of them."""
MIXERS: dict[str, dict[str, Any]] = {
    "doremi": {"reference": {"seeds": list(SEEDS)}},
    "doge": {"seeds": list(SEEDS)},
}
DGA: dict[str, Any] = {
    "start": None,
    "every": 10,
    "sequences": 16,
    "target_sequences": 16,
    "basis": {name: {name: 1.0} for name in NAMES},
}
SETTING = "domains_en, 5 domains and noise; 0.08 M parameters, 150 steps of 24 x 64 bytes"


def rows() -> tuple[pl.DataFrame, pl.DataFrame]:
    """A fifth of each domain, noise, and 300 passages of the target to measure on; 600 others."""
    frame = data_set("domains_en").sample(fraction=1.0, shuffle=True, seed=0)
    part = pl.int_range(pl.len()).over("domain") < 0.2 * pl.len().over("domain")
    generator = np.random.default_rng(0)
    noise = [bytes(generator.integers(32, 127, 1000, dtype=np.uint8)).decode() for _ in range(150)]
    docs = [f"noise-{number}" for number in range(len(noise))]
    added = pl.DataFrame({"text": noise, "domain": "noise", "doc": docs})
    target = frame.filter(pl.col("domain") == TARGET)
    kept = frame.filter(pl.col("domain").is_in(POOL) & part)
    return pl.concat([kept, target.tail(300), added]), target.head(600)


class Work:
    """A folder in which everything is trained once."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.folder = folder
        self.pool, self.target = rows()
        if not (folder / "target.parquet").exists():
            self.pool.write_parquet(folder / "pool.parquet")
            self.pool.filter(pl.col("domain") != TARGET).write_parquet(folder / "mix.parquet")
            self.target.write_parquet(folder / "target.parquet")
        settings = self._settings("arms", "pool.parquet", held_out=0.3)
        self._base, phases = proxy_base(settings, "dga", ARMS, with_target=True)
        for phase in phases:
            raise_failures(phase.name, run_tasks(phase.name, phase.tasks, phase.work, pool=INLINE))

    def _settings(self, name: str, rows: str, *, held_out: float, **more: Any) -> Settings:
        source = {"text": "text", "domain": "domain", "document": "doc"}
        settings = parse_settings(
            {
                "run": str(self.folder / name),
                "sources": {"pool": {"path": str(self.folder / rows), **source}},
                "target": {"path": str(self.folder / "target.parquet"), "text": "text"},
                "task": {"kind": "causal-lm", "max_tokens": 64},
                "model": {"config": MODEL, "tokenizer": {"train": "bpe", "vocab_size": 260},
                          "device": "cpu"},
                "index": {"held_out": held_out},
                **more,
            }
        )  # fmt: skip
        index_run(settings, pool=INLINE)
        tokenizer_run(settings)
        return settings

    def mixtures(self, name: str) -> dict[int, dict[str, float]]:
        """The mixture that each seed of a mixer found."""
        proxy = {key: getattr(PROXY, key) for key in ("steps", "sequences", "length", "lr")}
        proxy["resume_every_seconds"] = 600.0
        mix = {"mixer": name, "proxy": proxy, **MIXERS[name]}
        settings = self._settings(f"mix-{name}", "mix.parquet", held_out=0.1, mix=mix)
        mix_run(settings, pool=INLINE)
        found = Path(settings.run) / "proxies" / name
        last = "round-1/proxy/result.json" if name == "doremi" else "result.json"
        return {
            seed: json.loads((found / f"seed-{seed}" / last).read_text())["mixture"]
            for seed in SEEDS
        }

    def train(self, name: str, shares: Mapping[int, Mapping[str, float]]) -> list[Result]:
        """A model for each seed, on the shares that it has."""
        return [self._run(name, seed, {"shares": dict(shares[seed])}) for seed in SEEDS]

    def train_dga(self) -> list[Result]:
        return [self._run("dga", seed, DGA, target=("target",)) for seed in SEEDS]

    def _run(
        self, name: str, seed: int, options: dict[str, Any], target: tuple[str, ...] = ()
    ) -> Result:
        task = self._base.task(
            f"{name}/seed-{seed}",
            rule="jobs.dga:make_rule" if target else "jobs.proxy_rules:plain",
            proxy=replace(ARMS, seed=10 + seed),
            options=options,
            target_parts=target,
        )
        done([task], name)
        return Result(Path(task.payload["folder"]))

    def plain(self, name: str) -> list[Result]:
        """Natural shares, uniform ones, or importance sampling with a tenth of uniform."""
        shares: dict[str, float] = dict.fromkeys(NAMES, 1.0)
        if name == "natural":
            size = pl.col("text").str.len_bytes().sum()
            sizes = self.pool.group_by("domain").agg(size)
            shares = {name: float(size) for name, size in sizes.iter_rows() if name in NAMES}
        if name == "importance sampling":
            near = importance(self.pool, self.target, NAMES)
            shares = {name: 0.9 * near[name] + 0.1 / len(NAMES) for name in NAMES}
        return self.train(name.replace(" ", "-"), dict.fromkeys(SEEDS, shares))


def on_target(result: Result) -> float:
    return result.held_out[TARGET]


def on_domains(result: Result) -> float:
    return fmean(result.held_out[name] for name in POOL)


def compared(
    work: Work,
    trained: Mapping[str, list[Result]],
    measure: Callable[[Result], float],
    *,
    arm: str,
    against: str,
) -> Finding:
    """One arm against another, corrected over all."""
    values: dict[str, dict[int, float]] = {
        name: dict(zip(SEEDS, map(measure, results), strict=True))
        for name, results in trained.items()
    }
    verdicts = judged(work.folder / arm, values, against=against, metric="loss", better="lower")
    for verdict in verdicts.values():
        print(f"{measure.__name__}, against {against}: {verdict['sentence']}", flush=True)
    return of_verdict(verdicts[arm], seeds=len(SEEDS))


def show(trained: Mapping[str, list[Result]], mixtures: Mapping[int, Mapping[str, float]]) -> None:
    names = (TARGET, *NAMES)
    for seed, own in mixtures.items():
        print(f"mixture, seed {seed}: " + ", ".join(f"{n} {own.get(n, 0):.3f}" for n in NAMES))
    print("\n| arm | " + " | ".join(names) + " |")
    for arm, results in trained.items():
        means = [fmean(result.held_out[name] for result in results) for name in names]
        print(f"| {arm} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |", flush=True)


def test_doremi_against_the_natural_mixture(tmp_path: Path):
    work = Work(run_folder("mixtures", tmp_path))
    found = work.mixtures("doremi")
    trained = {name: work.plain(name) for name in ("natural", "uniform")}
    trained["doremi"] = work.train("doremi", found)
    show(trained, found)
    figure = "mean loss of the five domains, nats per byte, DoReMi's mixture minus"
    for against in ("natural", "uniform"):
        finding = compared(work, trained, on_domains, arm="doremi", against=against)
        print(line("lowers the mean loss", SETTING, f"{figure} {against}", finding))
    noise = of_values([own["noise"] for own in found.values()], against=1 / 6, claimed="below")
    figure = "weight of random bytes"
    print(line("noise gets less than uniform", SETTING, figure, noise, signed=False))
    better = [
        sum(own.held_out[name] < other.held_out[name] for name in POOL)
        for own, other in zip(trained["doremi"], trained["natural"], strict=True)
    ]
    print(f"domains better than natural, of five, each seed: {better}")


def test_doge_against_uniform(tmp_path: Path):
    work = Work(run_folder("mixtures", tmp_path))
    found = work.mixtures("doge")
    trained = {name: work.plain(name) for name in ("uniform", "importance sampling")}
    trained["doge"] = work.train("doge", found)
    show(trained, found)
    figure = "loss on code_java, nats per byte, DoGE's mixture minus"
    for against in ("uniform", "importance sampling"):
        finding = compared(work, trained, on_target, arm="doge", against=against)
        print(line("lowers the target's loss", SETTING, f"{figure} {against}", finding))


def test_dga_against_uniform_and_importance_sampling(tmp_path: Path):
    work = Work(run_folder("mixtures", tmp_path))
    trained = {name: work.plain(name) for name in ("uniform", "importance sampling")}
    trained["dga"] = work.train_dga()
    show(trained, dict(enumerate(result.facts["mixture"] for result in trained["dga"])))
    figure = "loss on code_java, nats per byte, DGA's model minus"
    for against in ("uniform", "importance sampling"):
        finding = compared(work, trained, on_target, arm="dga", against=against)
        print(line("lowers the target's loss", SETTING, f"{figure} {against}", finding))
