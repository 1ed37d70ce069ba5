"""Making the sets of a comparison: cuts by the planner, then a table for each set and partition.

One task for each partition writes the plans of all sets and a description: digests, sizes, and how
much the sets of an arm have in common, which is what their luck shares.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import xxhash

from curate.config import parse, resolve
from curate.data.example import TRAIN
from curate.data.files import discard, read_json
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.data.tables import meet, read_table, write_table
from curate.errors import ConfigError
from curate.plan.mixture import DomainSize, Mixture, Phase, load_mixture
from curate.plan.plan import Arm, apply_plan, make_plans
from curate.plan.rules import Thresholds
from curate.plan.settings import Keep, Plan
from curate.plan.stored import from_values, to_values
from jobs.compare_arms import (
    PLAN,
    Making,
    Spec,
    columns_of,
    described_output,
    draw_seed,
    folder_of,
    is_given,
)
from jobs.compare_settings import ArmSettings, is_random
from jobs.mix import mixer_for, mixture_output
from jobs.plan_tables import open_tables, read_frame
from jobs.run import Task
from jobs.settings import Settings
from mixers.catalog import MIXERS
from mixers.unimax import UniMax


def make_sets(making: Making) -> list[Task]:
    """Find the cuts of every set, unless that was done; the tasks that write the tables."""
    run = making.run
    output = _thresholds_output(run)
    if not output.is_done(making.fingerprint):
        plans = _plans(making)
        values, ranks = to_values(plans)
        discard(output.mark_path)
        Output(_ranks_path(run)).write(lambda path: _save(path, ranks), making.fingerprint)
        text = json.dumps(values, ensure_ascii=False) + "\n"
        output.write(lambda path: path.write_text(text, encoding="utf-8"), making.fingerprint)
    for name in making.sets:
        _link(run, folder_of(run, name))
    return set_tasks(making)


def set_tasks(making: Making) -> list[Task]:
    """One task for each partition."""
    run = making.run
    columns = sorted({c for spec in making.specs for c in columns_of(spec, making.settings, run)})
    given = {
        spec.name: str(run.root if spec.own is None or spec.own.run is None else spec.own.run)
        for spec in making.specs
        if is_given(spec)
    }
    arms = {spec.name: spec.sets(making.compare.seeds) for spec in making.specs}
    tasks: list[Task] = []
    for part in run.partitions():
        payload = {
            "run": str(run.root),
            "partition": asdict(part),
            "lengths": making.lengths,
            "columns": columns,
            "given": given,
            "arms": arms,
            "fingerprint": making.fingerprint,
        }
        tasks.append(Task(part.name, payload, described_output(run, part), making.fingerprint))
    return tasks


def write_sets(payload: dict[str, Any]) -> dict[str, Any]:
    """Write the plans of all sets for one partition, and what they hold."""
    run, part = RunFolder(Path(payload["run"])), Partition(**payload["partition"])
    made_from: str = payload["fingerprint"]
    frame = read_frame(run, part, payload["lengths"], payload["columns"])
    plans = _load(str(_thresholds_output(run).path), made_from)
    training = (frame["split"] == TRAIN).to_numpy()
    sets: dict[str, Any] = {}
    arms: dict[str, Any] = {}
    for arm, names in payload["arms"].items():
        counts = np.zeros(frame.height, np.int64)
        for name in names:
            if arm in payload["given"]:
                other = RunFolder(Path(payload["given"][arm]))
                table = read_table(other.planned(part).path)
                meet(frame, table)
            else:
                table = apply_plan(frame, plans[name]).table
            own = folder_of(run, name).planned(part)
            own.write(lambda path, table=table: write_table(table, path), made_from,
                      rows=table.height)  # fmt: skip
            counts += (table["copies"] > 0).to_numpy()
            sets[name] = _described(frame, table)
        arms[arm] = _in_common(frame, counts)
    sizes = frame.filter(pl.Series(training)).group_by("domain").len().sort("domain")
    value = {"sets": sets, "arms": arms, "domains": dict(sizes.iter_rows())}
    text = json.dumps(value, ensure_ascii=False) + "\n"
    described_output(run, part).write(
        lambda path: path.write_text(text, encoding="utf-8"), made_from, rows=frame.height
    )
    return {"rows": frame.height}


def _plans(making: Making) -> dict[str, Thresholds]:
    """Set -> its cuts, of all sets that are not given."""
    tables = open_tables(making.run, making.lengths)
    budgets: dict[float | None, int] = {None: making.plan.kept_tokens}
    found: dict[str, Thresholds] = {}
    # Shares first: their random arms get the tokens that these came to.
    for spec in making.specs:
        if spec.share is not None and spec.name.startswith(PLAN):
            made = make_plans(tables, {spec.name: _arm(making, spec, 0)},
                              seed=making.settings.seed)[spec.name]  # fmt: skip
            budgets[spec.share] = made.kept_tokens
            if not spec.redrawn:
                found[spec.name] = made
    due = [spec for spec in making.specs if not is_given(spec) and spec.name not in found]
    fixed = {spec.name: _arm(making, spec, budgets[spec.share]) for spec in due if not spec.redrawn}
    if fixed:
        found |= make_plans(tables, fixed, seed=making.settings.seed)
    for seed in making.compare.seeds:
        drawn = {
            spec.set_of(seed): _arm(making, spec, budgets[spec.share])
            for spec in due
            if spec.redrawn
        }
        if drawn:
            found |= make_plans(tables, drawn, seed=draw_seed(making.settings, seed))
    return found


def _arm(making: Making, spec: Spec, budget: int) -> Arm:
    """What the planner is asked for.

    All arms of a seed draw by the same random numbers, so that arms that are the same by their
    rules are the same sets, and others differ in what their rules make of it only.
    """
    plan, rules = making.plan, making.settings.plan
    keep = Keep(tokens=float(max(1, budget)))
    plain_rules = Plan(keep=keep, within="all", max_repeats=rules.max_repeats, force=True)
    if spec.own is not None:
        assert spec.own.rules is not None
        return Arm(spec.own.rules, _own_mixture(making, spec.own), label=plan.label)
    mixture = _run_mixture(making.settings)
    same = replace(rules, keep=keep, force=True)
    label = plan.label if spec.draw == 1 else f"{plan.label}/{spec.draw}"
    match spec.name.partition("@")[0]:
        case name if is_random(name):
            return Arm(plain_rules, repeat=True, label=label)
        case "longest":
            return Arm(replace(plain_rules, score="num_tokens"), repeat=True, label=plan.label)
        case "everything":
            return Arm(replace(plain_rules, keep=1.0), label=plan.label)
        case "shuffled":
            loose = replace(
                same, score=None, order="hardest", drop_first=0.0, draw="top", weights=None
            )
            return Arm(loose, mixture, label=plan.label)
        case "natural":
            return Arm(same, _natural(plan), label=plan.label, scoring=plan.scoring)
        case "unimax":
            sizes = {d: DomainSize(*size) for d, size in plan.domains.items() if size[1] > 0}
            mixer = UniMax(max_epochs=rules.max_repeats)
            return Arm(same, mixer.mixture(sizes, budget_tokens=float(budget)), label=plan.label)
        case _:
            if spec.share is not None:
                rules = replace(rules, keep=Keep(token_share=spec.share))
            return Arm(rules, mixture, label=plan.label)


def _natural(plan: Thresholds) -> Mixture:
    pool = sum(tokens for _, tokens in plan.domains.values())
    shares = {domain: tokens / pool for domain, (_, tokens) in plan.domains.items()}
    return Mixture("natural", (Phase(1.0, shares),), {})


def _run_mixture(settings: Settings) -> Mixture | None:
    if not settings.mix:
        return None
    name, _ = mixer_for(settings)
    return load_mixture(mixture_output(RunFolder(Path(settings.run)), name).path)


def _own_mixture(making: Making, arm: ArmSettings) -> Mixture | None:
    if not arm.mix:
        return None
    options = dict(arm.mix)
    name = options.pop("mixer", None)
    if not isinstance(name, str):
        raise ConfigError(f"arm {arm.name}: mix.mixer is missing", fix="name a mixer")
    mixer = parse(resolve(MIXERS, name, what="mixer"), options, where="compare.arms.mix")
    sizes = {d: DomainSize(*size) for d, size in making.plan.domains.items() if size[1] > 0}
    return mixer.mixture(sizes, budget_tokens=float(making.plan.kept_tokens))


def _described(frame: pl.DataFrame, table: pl.DataFrame) -> dict[str, Any]:
    copies = table["copies"].to_numpy().astype(np.uint32)
    weight = table["weight"].to_numpy().astype(np.float32)
    kept = copies > 0
    tokens = frame["num_tokens"].to_numpy() * copies.astype(np.int64)
    domains = (
        frame.select("domain").with_columns(tokens=tokens).filter(pl.Series(kept))
        .group_by("domain").agg(pl.col("tokens").sum()).sort("domain")
    )  # fmt: skip
    return {
        "digest": xxhash.xxh3_128_hexdigest(copies.tobytes() + weight.tobytes()),
        "rows": int(kept.sum()),
        "copies": int(copies.sum()),
        "tokens": int(tokens.sum()),
        "weighted": bool((weight[kept] != 1).any()),
        "domains": dict(domains.iter_rows()),
    }


def _in_common(frame: pl.DataFrame, counts: np.ndarray) -> dict[str, tuple[int, int]]:
    """Domain -> rows kept, summed over the sets, and rows in common, over ordered pairs of them."""
    table = (
        frame.select("domain")
        .with_columns(kept=pl.Series(counts), common=pl.Series(counts * (counts - 1)))
        .group_by("domain").agg(pl.col("kept", "common").sum()).sort("domain")
    )  # fmt: skip
    return {domain: (kept, common) for domain, kept, common in table.iter_rows() if kept}


def _link(run: RunFolder, folder: RunFolder) -> None:
    """Make a set's folder look like a run: links, relative, so that the run can be moved."""
    folder.root.mkdir(parents=True, exist_ok=True)
    up = Path(*[".."] * len(folder.root.relative_to(run.root).parts))
    names = ["examples"]
    if (run.root / "lengths").is_dir():
        names.append("lengths")
    if run.clusters.mark() is not None:
        names.append("domains")
    for name in names:
        link = folder.root / name
        if not link.is_symlink():
            link.symlink_to(up / name, target_is_directory=True)


def _thresholds_output(run: RunFolder) -> Output:
    return Output(run.root / "compare" / "arms" / "described" / "thresholds.json")


def _ranks_path(run: RunFolder) -> Path:
    return run.root / "compare" / "arms" / "described" / "ranks.npy"


def _save(path: Path, ranks: np.ndarray) -> None:
    with path.open("wb") as file:  # a name without .npy would get one
        np.save(file, ranks)


@lru_cache(maxsize=1)
def _load(path: str, _: str) -> Mapping[str, Thresholds]:
    """The stored cuts; read once in a worker for one fingerprint."""
    return from_values(read_json(Path(path)), np.load(Path(path).with_name("ranks.npy")))
