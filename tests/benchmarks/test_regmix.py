"""Do laws fitted to small runs foretell other mixtures, and is the mixture that they propose good?

    python -m pytest tests/benchmarks/test_regmix.py -s -o addopts=--import-mode=importlib

Five domains of domains_en, byte models of 0.1 million parameters, 32 mixtures and the one found,
150 steps each; about four minutes of CPU time. Prints the tables of docs/benchmarks.md.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tiny_models import byte_tokenizer

from curate.data.files import read_json
from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.mix import mix_run
from jobs.settings import Settings, parse_settings
from mixers import mixing_law
from mixers.laws import Floats, spearman
from mixers.mixing_law import MixingLaw
from mixers.mixture_results import Runs, read_runs

DATA = Path(os.environ.get("CURATE_DATA", "no-data"))
KEPT = os.environ.get("CURATE_BENCH_RUN")
"""A folder that keeps the runs, to go on from."""
pytestmark = [
    pytest.mark.timeout(7200),
    pytest.mark.skipif(not DATA.is_dir(), reason="needs real data: set CURATE_DATA to its folder"),
]

DOMAINS = ["abstracts", "code_csharp", "dialogue", "maths", "novels"]
PARTS = 8
"""One row in so many is taken."""
MODEL = {
    "model_type": "llama", "hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip
PROXY = {"steps": 150, "sequences": 16, "length": 128, "lr": 3e-3, "held_out": 64, "model": MODEL}
TESTED = 8
POOL = Pool(InlineExecutor(), 1)


def settings_of(root: Path, *, mixer: str = "regmix", **mix: Any) -> Settings:
    table = pl.read_parquet(DATA / "domains_en" / "train.parquet", columns=["text", "domain"])
    table = table.filter(pl.col("domain").is_in(DOMAINS))
    table.filter(pl.int_range(pl.len()) % PARTS == 0).write_parquet(root / "pool.parquet")
    byte_tokenizer(merges=False).save_pretrained(root / "tokenizer")
    pool = {"path": str(root / "pool.parquet"), "text": "text", "domain": "domain"}
    return parse_settings(
        {
            "run": str(root / "run"),
            "sources": {"pool": pool},
            "task": {"kind": "causal-lm", "max_tokens": 128},
            "model": {"tokenizer": str(root / "tokenizer"), "device": "cpu"},
            "index": {"held_out": 0.15},
            "plan": {"keep": {"tokens": 300_000}},
            "mix": {"mixer": mixer, "proxy": PROXY, **mix},
        }
    )


def test_held_out_mixtures_are_ranked_and_the_proposed_one_is_good(tmp_path: Path):
    root = Path(KEPT) if KEPT else tmp_path
    root.mkdir(exist_ok=True)
    folder = root / "run" / "mixtures" / "regmix"
    free = settings_of(root, runs=32, penalty=0.0)
    index_run(free, pool=POOL)
    proposed = {"proposed, no penalty": mix_run(free, pool=POOL)}
    facts = {"proposed, no penalty": read_json(folder / "fits.json")}
    runs = read_runs([folder / "runs.parquet"])
    law = mixing_law.fit(runs.mixtures[:-TESTED], runs.losses[:-TESTED])
    ranks = show_law(runs, law)
    show_fits(facts["proposed, no penalty"]["fits"])
    proposed["proposed, penalty 0.05"] = mix_run(settings_of(root, runs=32), pool=POOL)
    facts["proposed, penalty 0.05"] = read_json(folder / "fits.json")
    show_mixtures(runs, law, proposed, facts)

    own = [law.slopes[at].argmin() == at for at in range(len(DOMAINS))]
    measured, mean = facts["proposed, no penalty"]["measured"], runs.losses.mean(1)
    assert (ranks > 0.8).all()
    assert sum(own) >= 4
    assert measured["mixture"] <= mean.min() + 0.02
    assert measured["mixture"] < measured["uniform"]


def test_dmo_foretells_its_runs_and_proposes_a_good_mixture(tmp_path: Path):
    root = Path(KEPT) if KEPT else tmp_path
    root.mkdir(exist_ok=True)
    settings = settings_of(root, mixer="dmo")
    index_run(settings, pool=POOL)
    summary = mix_run(settings, pool=POOL)
    facts = read_json(root / "run" / "mixtures" / "dmo" / "fits.json")
    shares = " ".join(f"{entry['weight']:.3f}" for entry in summary["domains"])
    print(f"\ndmo, {facts['num_runs']} runs, from equal amounts: {shares}")
    print("| domain | rank correlation | mean error, nats | beta | alpha | E |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, told in facts["held_out"].items():
        law = facts["laws"][name]
        numbers = (law["decays"], law["growths"], law["floors"])
        shown = " | ".join(f"{number:.2f}" for number in numbers)
        print(f"| {name} | {told['spearman']:.3f} | {told['error']:.3f} | {shown} |")
    print({name: round(value, 4) for name, value in facts["measured"].items()})
    assert facts["measured"]["mixture"] < facts["measured"]["uniform"]


def show_law(runs: Runs, law: MixingLaw) -> Floats:
    """The law on the runs that it was not fitted to; gives the rank correlations."""
    foretold, losses = law.losses(runs.mixtures[-TESTED:]), runs.losses[-TESTED:]
    ranks, errors = spearman(foretold, losses), np.abs(foretold - losses).mean(0)
    print(f"\nlog-linear on {len(runs.names) - TESTED} runs, tested on {TESTED}")
    print("| loss | rank correlation | mean error, nats | most lowered by |")
    print("| --- | ---: | ---: | --- |")
    lowered = [runs.domains[row.argmin()] for row in law.slopes]
    for name, rank, error, most in zip(runs.targets, ranks, errors, lowered, strict=True):
        print(f"| {name} | {rank:.3f} | {error:.3f} | {most} |")
    return ranks


def show_fits(fits: dict[str, Any]) -> None:
    print("\nleft out in turn, all losses and their mean: rank correlation (mean error)")
    for name, fit in fits.items():
        each = [*fit["losses"].values(), fit["target"]]
        told = " | ".join(f"{one['spearman']:.3f} ({one['error']:.3f})" for one in each)
        print(f"| {name} | {told} |")


def show_mixtures(
    runs: Runs, law: MixingLaw, proposed: dict[str, Any], facts: dict[str, Any]
) -> None:
    print("\n| mixture | shares | foretold | measured |")
    print("| --- | --- | ---: | ---: |")
    for name, summary in proposed.items():
        shares = " ".join(f"{entry['weight']:.3f}" for entry in summary["domains"])
        told, seen = facts[name]["foretold"]["mixture"], facts[name]["measured"]["mixture"]
        print(f"| {name} | {shares} | {told:.4f} | {seen:.4f} |")
    mean = runs.losses.mean(1)
    foretold = law.losses(runs.mixtures).mean(1)
    rows = {"natural": 0, "uniform": 1, "best": int(mean.argmin()), "worst": int(mean.argmax())}
    for name, row in rows.items():
        shares = " ".join(f"{share:.3f}" for share in runs.mixtures[row])
        print(f"| {name} | {shares} | {foretold[row]:.4f} | {mean[row]:.4f} |")
