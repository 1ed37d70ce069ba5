"""Which weights wrong, hard and repeated text gets from its losses, and what that does to the rest.

    CURATE_DATA=... pytest tests/benchmarks/test_loss_reweighting.py -s \\
        -o addopts=--import-mode=importlib

Two domains of English and byte-level models of width 64, 32 sequences of 32 bytes in a step. In the
first pool a fifth of the sequences are of texts whose characters were shuffled. In the second a
twentieth of the texts, those that zlib compresses best or any, come ten times as often as others.
`CURATE_BENCH_RUNS` names a folder in which runs are kept, for going on later, and
`CURATE_BENCH_SEEDS` the seeds, `0 1 2` by default. `-k paper` prints rows of docs/reproductions.md,
which has five.
"""

import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import polars as pl
import pytest
from proxy_runs import Result, Runs, data_set, open_runs, run_folder
from reproduction import judged, line, of_verdict

from mixers.proxy_settings import Proxy

SEEDS = tuple(map(int, os.environ.get("CURATE_BENCH_SEEDS", "0 1 2").split()))
STEPS, UNIFORM_SHARE = 800, 0.1
DOMAINS = ("novels", "abstracts")
PROXY = Proxy(steps=STEPS, sequences=32, length=32, lr=3e-3, held_out=256)
STRATEGIES = ("linupper", "quadratic", "extremes")


def texts(megabytes: float) -> pl.DataFrame:
    """So much plain text of each domain: ASCII, so that a character is a byte."""
    rows = data_set("domains_en").sample(fraction=1.0, shuffle=True, seed=0)
    is_plain = rows["text"].str.contains(r"^[\x00-\x7f]*$")
    rows = rows.filter(is_plain & pl.col("domain").is_in(DOMAINS))
    size = pl.col("text").str.len_bytes().cum_sum().over("domain")
    return rows.filter(size <= megabytes * 1e6)


def with_shuffled() -> pl.DataFrame:
    """A fifth of the texts of each domain become a domain of their own, characters in any order."""
    rows = texts(1.0)
    generator = np.random.default_rng(0)
    is_chosen = pl.Series(generator.random(len(rows)) < 0.2)
    shuffled = [
        "".join(generator.permutation(list(text))) for text in rows.filter(is_chosen)["text"]
    ]
    wrong = rows.filter(is_chosen).with_columns(
        pl.Series("text", shuffled), pl.lit("shuffled").alias("domain")
    )
    return pl.concat([rows.filter(~is_chosen), wrong])


def with_repeated(which: str) -> pl.DataFrame:
    """A twentieth of the texts as a domain of its own."""
    rows = texts(0.6)
    ratios = [len(zlib.compress(text.encode(), 9)) / len(text) for text in rows["text"]]
    order = (
        np.argsort(ratios) if which == "easy" else np.random.default_rng(0).permutation(len(rows))
    )
    is_chosen = np.zeros(len(rows), dtype=bool)
    is_chosen[order[: round(len(rows) / 20)]] = True
    chosen = pl.Series(is_chosen)
    return pl.concat(
        [
            rows.filter(~chosen),
            rows.filter(chosen).with_columns(pl.lit("repeated").alias("domain")),
        ]
    )


def trained(runs: Runs, shares: Mapping[str, float], strategy: str | None) -> list[Result]:
    """One run for each seed; None trains with plain losses."""
    options: dict[str, Any] = {"shares": dict(shares)}
    if strategy is not None:
        options["reweight"] = {"strategy": strategy, "uniform_share": UNIFORM_SHARE}
    return [runs.run(strategy or "plain", seed, options) for seed in SEEDS]


def held_out(found: list[Result]) -> list[float]:
    """Mean loss of each run on the domains that nothing was done to, nats per byte."""
    return [fmean(result.held_out[name] for name in DOMAINS) for result in found]


def mean_weights(found: list[Result]) -> dict[str, list[float]]:
    """Domain -> its mean weight over the steps after the uniform phase, run by run."""
    each = [
        dict(
            result.trajectory.filter(pl.col("step") > UNIFORM_SHARE * STEPS)
            .group_by("domain")
            .agg(pl.col("factor").mean())
            .iter_rows()
        )
        for result in found
    ]
    return {name: [own[name] for own in each] for name in sorted(each[0])}


def told(name: str, found: list[Result], plain: list[Result]) -> list[float]:
    """A row of the table, and the change of the held-out loss against plain losses, run by run."""
    change = [own / other - 1 for own, other in zip(held_out(found), held_out(plain), strict=True)]
    weights = mean_weights(found)
    cells = [" to ".join(f"{x:.2f}" for x in (min(own), max(own))) for own in weights.values()]
    losses = " ".join(f"{loss:.3f}" for loss in held_out(found))
    moved = " ".join(f"{100 * one:+.2f}" for one in change)
    print(f"| {name} | {' | '.join(cells)} | {losses} | {moved} |")
    return change


@pytest.mark.timeout(7200)
def test_linupper_and_extremes_favour_shuffled_text_and_quadratic_does_not(tmp_path: Path):
    folder = run_folder("shuffled", tmp_path)
    runs = open_runs(folder, with_shuffled(), PROXY, held_out=0.1)
    plain = trained(runs, SHUFFLED, None)
    print(f"\nplain: {' '.join(f'{loss:.3f}' for loss in held_out(plain))}")
    found = {name: trained(runs, SHUFFLED, name) for name in STRATEGIES}
    changes = {name: told(name, own, plain) for name, own in found.items()}
    weights = {name: mean_weights(own)["shuffled"] for name, own in found.items()}
    assert min(weights["linupper"]) > 1
    assert min(weights["extremes"]) > 1
    assert max(weights["quadratic"]) < 1
    # What goes to noise is lost to the rest: 3.4 % were seen, where at most 2 had been expected.
    for name, change in changes.items():
        assert max(map(abs, change)) < 0.06, name


SHUFFLED = {"novels": 0.4, "abstracts": 0.4, "shuffled": 0.2}
# Of what is seen, 95 parts come once and 5 ten times.
REPEATED = {"novels": 95 / 2, "abstracts": 95 / 2, "repeated": 50.0}


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("pool", ["repeated-easy", "shuffled"])
def test_linupper_against_plain_losses_as_the_paper_has_it(pool: str, tmp_path: Path):
    rows = with_shuffled() if pool == "shuffled" else with_repeated("easy")
    runs = open_runs(run_folder(pool, tmp_path), rows, PROXY, held_out=0.1)
    shares = SHUFFLED if pool == "shuffled" else REPEATED
    values = {
        name: dict(zip(SEEDS, held_out(trained(runs, shares, strategy)), strict=True))
        for name, strategy in (("plain", None), ("linupper", "linupper"))
    }
    verdict = judged(tmp_path, values, against="plain", metric="loss", better="lower")["linupper"]
    figure = "held-out loss, nats per byte, LinUpper minus plain losses"
    finding = of_verdict(verdict, seeds=len(SEEDS))
    print("\n" + line("lowers the loss", pool, figure, finding), flush=True)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("which", ["easy", "any"])
def test_linupper_leaves_repeated_text_behind(which: str, tmp_path: Path):
    folder = run_folder(f"repeated-{which}", tmp_path)
    runs = open_runs(folder, with_repeated(which), PROXY, held_out=0.1)
    plain = trained(runs, REPEATED, None)
    found = trained(runs, REPEATED, "linupper")
    epochs = plain[0].facts["epochs"]
    print(f"\n{which}: epochs {epochs}")
    told(f"linupper, {which}", found, plain)
    if which == "easy":
        assert max(mean_weights(found)["repeated"]) < 1
