"""What temperature, its schedules and UniMax do to large and small domains, at equal steps.

    CURATE_DATA=... pytest tests/benchmarks/test_cooldown.py -s -o addopts=--import-mode=importlib

Two pools, byte-level models of width 64. `languages`: help pages in 38 languages, a natural long
tail, under a falling learning rate; few bytes come more than twice. `small`: English novels and
five languages of 1 to 2 kB each, under a constant rate, so that the small ones are over-fitted.
`CURATE_BENCH_RUNS` names a folder in which runs are kept, for going on later, and
`CURATE_BENCH_SEEDS` the seeds, `0 1 2` by default. The last lines are rows of
docs/reproductions.md, which has five.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, variance
from typing import Any

import polars as pl
import pytest
import torch
import xxhash
from proxy_runs import Result, Runs, data_set, open_runs, run_folder
from reproduction import judged, line, of_verdict

from curate.plan.mixture import Mixture
from mixers.cooldown import Cooldown
from mixers.proxy_settings import Proxy
from mixers.temperature import Temperature
from mixers.unimax import UniMax

SEEDS = tuple(map(int, os.environ.get("CURATE_BENCH_SEEDS", "0 1 2").split()))
LANGUAGES = ("deu", "fra", "nld", "swe", "swh")
ARMS: dict[str, Any] = {
    "tau 1": Temperature(tau=1.0),
    "tau 5": Temperature(tau=5.0),
    "uniform": Temperature(tau=100.0),
    "unimax": UniMax(),
    "cooldown 5 to 1": Cooldown(),
    "reverse 1 to 5": Cooldown(tau_hot=1.0, tau_cold=5.0),
}
WEIGHTED = "loss weights of tau 5"
PROXY = Proxy(steps=300, sequences=32, length=32, lr=3e-3, held_out=32, evaluate_every=100)


def part_of(name: str) -> float:
    """A number in [0, 1) that a page keeps in all languages."""
    return xxhash.xxh3_64_intdigest(name.encode()) / 2**64


def languages() -> pl.DataFrame:
    rows = data_set("tldr_multilingual")
    page = pl.col("doc").map_elements(part_of, return_dtype=pl.Float64)
    return rows.filter(page < 0.25)


def one_large_and_small_ones() -> pl.DataFrame:
    large = data_set("domains_en").filter(pl.col("domain") == "novels").sample(5000, seed=0)
    small = data_set("udhr").filter(pl.col("domain").is_in(LANGUAGES))
    # There are a few books only, too few to hold most of them out: passages are.
    rows = pl.concat([large, small]).with_row_index("place")
    return rows.select("text", "domain", pl.col("place").cast(pl.String).alias("doc"))


SMALL = replace(PROXY, schedule="constant", held_out=64, evaluate_every=25)
FIVE = tuple(ARMS)[:5]
POOLS: dict[str, tuple[Callable[[], pl.DataFrame], Proxy, float, float, Sequence[str]]] = {
    # Pool, proxy, the share that is held out, UniMax's limit of epochs, arms. Most
    # is held out, so that there are losses to measure, and so that small domains are small.
    "languages": (languages, PROXY, 0.6, 1.0, FIVE),
    "small": (one_large_and_small_ones, SMALL, 0.85, 4.0, (*ARMS, WEIGHTED)),
}


def options_of(mixture: Mixture) -> dict[str, Any]:
    phases = [{"share": phase.share, "weights": phase.weights} for phase in mixture.phases]
    return {"shares": phases}


def results(
    runs: Runs, max_epochs: float, arms: Sequence[str] = (*ARMS, WEIGHTED)
) -> dict[str, list[Result]]:
    """Arm -> one run for each seed."""
    sizes, budget = runs.sizes(), runs.budget
    mixtures = {
        name: (replace(mixer, max_epochs=max_epochs) if name == "unimax" else mixer).mixture(
            sizes, budget_tokens=budget
        )
        for name, mixer in ARMS.items()
    }
    hot, cold = (mixtures[name].mean() for name in ("tau 5", "tau 1"))
    # Those two are trained by the rule that also measures the length of each gradient.
    measured = {
        "tau 5": {"shares": hot},
        WEIGHTED: {"shares": cold, "weights": {name: hot[name] / cold[name] for name in sizes}},
    }
    found: dict[str, list[Result]] = {name: [] for name in arms}
    for seed in SEEDS:
        for name in found:
            options, rule = measured.get(name), "weighted_rule:make_rule"
            if options is None:
                options, rule = options_of(mixtures[name]), "jobs.proxy_rules:plain"
            found[name].append(runs.run(name.replace(" ", "-"), seed, options, rule=rule))
    return found


def end(found: list[Result]) -> dict[str, float]:
    """Domain -> loss at the end, mean over the seeds, nats per byte."""
    return {name: fmean(result.held_out[name] for result in found) for name in found[0].held_out}


def row(name: str, found: list[Result], large: str) -> str:
    losses = end(found)
    others = [loss for domain, loss in losses.items() if domain != large]
    means = [fmean(result.held_out.values()) for result in found]
    worst = max(losses, key=lambda domain: losses[domain])
    epochs = {d: fmean(r.facts["epochs"][d] for r in found) for d in losses}
    most = max(epochs, key=lambda domain: epochs[domain])
    return (
        f"| {name} | {losses[large]:.3f} | {fmean(others):.3f} | {fmean(means):.3f}"
        f" | {min(means):.3f} to {max(means):.3f} | {losses[worst]:.3f} ({worst})"
        f" | {epochs[large]:.2f} | {epochs[most]:.1f} ({most}) |"
    )


def curve(found: list[Result], large: str) -> dict[int, float]:
    """Step -> mean loss of all domains but the large one, mean over the seeds."""
    tables = pl.concat([result.curve for result in found]).filter(pl.col("domain") != large)
    means = tables.group_by("step").agg(pl.col("loss").mean()).sort("step")
    return dict(means.iter_rows())


def norm_variance(found: list[Result]) -> float:
    """Of the gradients' lengths after the warm-up, mean over the seeds."""
    own: list[float] = []
    for result in found:
        table = result.trajectory.filter(pl.col("step") > 0.1 * PROXY.steps)
        norms = table.group_by("step").agg(pl.col("gradient_norm").first())
        own.append(variance(norms["gradient_norm"].to_list()))
    return fmean(own)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("pool", POOLS)
def test_large_and_small_domains_at_equal_steps(pool: str, tmp_path: Path):
    torch.set_num_threads(1)
    rows, proxy, held_out, max_epochs, arms = POOLS[pool]
    runs = open_runs(run_folder(pool, tmp_path), rows(), proxy, held_out=held_out)
    found = results(runs, max_epochs, arms)
    sizes = runs.sizes()
    large = max(sizes, key=lambda name: sizes[name].num_tokens)
    print(
        f"\n{pool}: {len(sizes)} domains, {large} {sizes[large].num_tokens:,} bytes, the smallest"
    )
    print(f"{min(size.num_tokens for size in sizes.values()):,}; {runs.budget:,.0f} are seen")
    for name, own in found.items():
        print(row(name, own, large))
    for name, own in found.items():
        steps = curve(own, large).items()
        print(f"others, {name}: " + ", ".join(f"{step}: {loss:.3f}" for step, loss in steps))
    for result in found["unimax"]:
        assert max(result.facts["epochs"].values()) < max_epochs * 1.1
    check(found, large)
    rows_of_the_claim(tmp_path, pool, found, large)


def rows_of_the_claim(folder: Path, pool: str, found: dict[str, list[Result]], large: str) -> None:
    """Cooldown against the fixed schedules: the mean of all domains, then each end of it."""

    def small(result: Result) -> float:
        return fmean(loss for name, loss in result.held_out.items() if name != large)

    measures: dict[str, Callable[[Result], float]] = {
        "mean of all domains": lambda result: fmean(result.held_out.values()),
        large: lambda result: result.held_out[large],
        f"mean of all but {large}": small,
    }
    arms = [name for name in found if name != WEIGHTED]
    print("")
    for what, measure in measures.items():
        values = {name: dict(zip(SEEDS, map(measure, found[name]), strict=True)) for name in arms}
        for against in ("tau 1", "tau 5", "unimax"):
            verdicts = judged(folder / what, values, against=against, metric="loss", better="lower")
            finding = of_verdict(verdicts["cooldown 5 to 1"], seeds=len(SEEDS))
            figure = f"{what}, nats per byte, cooldown minus {against}"
            print(line("lowers the loss", pool, figure, finding), flush=True)


def check(found: dict[str, list[Result]], large: str) -> None:
    """What the method's page says must show."""
    ends = {name: end(own)[large] for name, own in found.items()}
    others = {name: list(curve(own, large).values()) for name, own in found.items()}
    to_cold = abs(ends["cooldown 5 to 1"] - ends["tau 1"])
    assert to_cold < abs(ends["cooldown 5 to 1"] - ends["tau 5"])
    assert others["cooldown 5 to 1"][-1] < others["tau 1"][-1]
    if WEIGHTED not in found:
        return
    # The small domains are over-fitted before the end where they come most often.
    assert min(others["uniform"]) < others["uniform"][-1] - 0.05
    norms = {name: norm_variance(found[name]) for name in ("tau 5", WEIGHTED)}
    print("variance of gradient lengths: ", norms)
    assert norms[WEIGHTED] > norms["tau 5"]
    assert others[WEIGHTED][-1] > others["tau 5"][-1]
