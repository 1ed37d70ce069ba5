"""DoReMi, DoGE and DGA on the same data, beside the plain mixtures: cost, and what comes of it.

    pytest tests/benchmarks/test_mixers_together.py -s -o addopts=--import-mode=importlib

Five domains of text and random bytes, code_java as the target. Each mixer trains byte-level models
of three seeds; then models of three other seeds are trained on each mixture at equal tokens. Cost
is CPU time by that of one plain training of as many steps. CURATE_BENCH_RUNS keeps what was done.
"""

import re
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import polars as pl
from proxy_runs import INLINE, MODEL, Runs, data_set, importance, open_runs, run_folder

from curate.data.files import read_json, write_json
from jobs.index import index_run
from jobs.mix import mix_run
from jobs.settings import parse_settings
from jobs.tokenizer import tokenizer_run
from mixers.proxy_settings import Proxy
from mixers.unimax import UniMax

POOL = ("code_csharp", "dialogue", "encyclopedic", "maths", "novels")
TARGET = "code_java"
PROXY = Proxy(steps=400, sequences=24, length=64, lr=2e-3, held_out=160, resume_every_seconds=600.0)
SEEDS = (0, 1, 2)
MIXERS: dict[str, dict[str, Any]] = {
    "doremi": {"reference": {"seeds": list(SEEDS)}},
    "doge": {"seeds": list(SEEDS)},
    "dga": {"seeds": list(SEEDS), "every": 10},
}


def rows() -> pl.DataFrame:
    """At most 1,200 passages of a domain, and 300 of random printable bytes."""
    frame = data_set("domains_en").filter(pl.col("domain").is_in([*POOL, TARGET]))
    few = frame.filter(pl.int_range(pl.len()).shuffle(seed=0).over("domain") < 1200)
    generator = np.random.default_rng(0)
    noise = [bytes(generator.integers(32, 127, 1000, dtype=np.uint8)).decode() for _ in range(300)]
    docs = [f"noise-{number}" for number in range(len(noise))]
    return pl.concat([few, pl.DataFrame({"text": noise, "domain": "noise", "doc": docs})])


def find_mixture(folder: Path, name: str, frame: pl.DataFrame) -> dict[str, Any]:
    """`mixture.json` of a mixer, and the CPU seconds that its training took."""
    saved = folder / f"{name}.json"
    if saved.exists():
        return read_json(saved)
    pool, target = folder / "mix.parquet", folder / "target.parquet"
    frame.filter(pl.col("domain") != TARGET).write_parquet(pool)
    frame.filter(pl.col("domain") == TARGET).head(600).write_parquet(target)
    settings = parse_settings(
        {
            "run": str(folder / f"run-{name}"),
            "sources": {
                "pool": {"path": str(pool), "text": "text", "domain": "domain", "document": "doc"}
            },
            "target": {"path": str(target), "text": "text"},
            "task": {"kind": "causal-lm", "max_tokens": 64},
            "model": {"config": MODEL, "tokenizer": {"train": "bpe", "vocab_size": 260}},
            "index": {"held_out": 0.2},
            "mix": {
                "mixer": name,
                "proxy": {
                    "steps": PROXY.steps,
                    "sequences": PROXY.sequences,
                    "length": PROXY.length,
                    "lr": PROXY.lr,
                    "resume_every_seconds": 600.0,
                },
                **MIXERS[name],
            },
        }
    )
    index_run(settings, pool=INLINE)
    tokenizer_run(settings)
    started = time.process_time()
    mix_run(settings, pool=INLINE)
    seconds = time.process_time() - started
    found = read_json(Path(settings.run) / "mixtures" / name / "mixture.json")
    write_json(saved, {**found, "seconds": seconds})
    return read_json(saved)


def plain_seconds(folder: Path, runs: Runs) -> float:
    """CPU seconds of one plain training."""
    saved = folder / "plain.json"
    if not saved.exists():
        started = time.process_time()
        runs.run("plain", 0, {"shares": "natural"})
        write_json(saved, {"seconds": time.process_time() - started})
    return float(read_json(saved)["seconds"])


def arms(
    runs: Runs, found: Mapping[str, Mapping[str, Any]], near: Mapping[str, float]
) -> dict[str, Any]:
    """Arm -> shares of the tokens; the target gets none.

    Args:
        runs: gives the sizes.
        found: mixer -> its mixture.
        near: domain -> share of the target's examples that lie nearest to it.
    """
    sizes = {name: size for name, size in runs.sizes().items() if name != TARGET}
    tokens = {name: float(size.num_tokens) for name, size in sizes.items()}
    unimax = UniMax(max_epochs=1).mixture(sizes, budget_tokens=runs.budget)
    arms: dict[str, Any] = {
        "natural": tokens,
        "uniform": dict.fromkeys(sizes, 1.0),
        "unimax": unimax.phases[0].weights,
        "importance": {name: 0.9 * near[name] + 0.1 / len(near) for name in near},
        "only code_csharp": {"code_csharp": 1.0},
    }
    for name, mixture in found.items():
        arms[name] = mixture["mean"]
        if len(mixture["phases"]) > 1:
            arms[f"{name}, its schedule"] = mixture["phases"]
    return arms


def test_mixers_beside_each_other(tmp_path: Path):
    folder = run_folder("together", tmp_path)
    frame = rows()
    found = {name: find_mixture(folder, name, frame) for name in MIXERS}
    runs = open_runs(folder, frame, PROXY, held_out=0.2)
    plain = plain_seconds(folder, runs)
    target = frame.filter(pl.col("domain") == TARGET).head(600)
    near = importance(frame, target, [*POOL, "noise"])
    print(f"\nnearest: { {name: round(share, 3) for name, share in near.items()} }")
    results = {
        arm: [runs.run(re.sub(r"\W+", "-", arm), 10 + seed, {"shares": shares}) for seed in SEEDS]
        for arm, shares in arms(runs, found, near).items()
    }
    names = [*POOL, "noise"]
    print(f"\n{'arm':22} {'cost':>6} " + " ".join(f"{name[:12]:>12}" for name in names))
    for arm in results:
        mean = found.get(arm, {}).get("mean")
        if mean is not None:
            told = " ".join(f"{mean[name]:12.3f}" for name in names)
            print(f"{arm:22} {found[arm]['seconds'] / plain:6.1f} {told}")
    print(f"\n{'loss, nats per byte':22} {'target':>14} {'mean':>7} {'worst':>7}")
    for arm, own in results.items():
        losses = [result.held_out[TARGET] for result in own]
        means = [fmean(result.held_out[name] for name in POOL) for result in own]
        worst = [max(result.held_out[name] for name in POOL) for result in own]
        spread = f"{fmean(losses):7.3f} ± {np.std(losses, ddof=1):.3f}"
        print(f"{arm:22} {spread:>14} {fmean(means):7.3f} {fmean(worst):7.3f}")
        print("   " + ", ".join(
            f"{name} {fmean(result.held_out[name] for result in own):.3f}" for name in names
        ))  # fmt: skip
    assert set(found) == set(MIXERS)
