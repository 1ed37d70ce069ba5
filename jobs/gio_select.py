"""The search of `gio` over the whole pool, and the place of every example that comes of it.

Shapes: N examples of the pool, C candidates, S steps, p dimensions.
"""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from curate.data.tables import write_table
from curate.errors import ConfigError, counted
from curate.vectors.search import nearest
from curate.vectors.store import Floats, Vectors, save
from jobs.gio import NAME, places_output, steps_output
from jobs.gio_pool import Pool, Start, read_pool, read_start
from jobs.gio_work import (
    Prepared,
    Work,
    candidates,
    open_work,
    read_prepared,
)
from jobs.run import Receipt
from scorers.gio_explode import Integers, ordered, owners, step_weights, whole_steps
from scorers.gio_gradient import descend
from scorers.gio_search import Selection, Stop, select

log = logging.getLogger(__name__)

_TABLE_NUMBERS = 200_000_000
"""Distances that `own_k` above 1 may hold at once."""


def select_work(payload: dict[str, Any]) -> Receipt:
    """Search, then give every chosen example its place."""
    work = open_work(payload)
    torch.set_num_threads(work.settings.cluster.threads)
    prepared = read_prepared(work.run)
    start = read_start(work, prepared)
    pool = read_pool(work, prepared, start, payload["tokens"])
    found = _search(work, prepared, pool, start)
    steps, places, facts = _chosen(work, prepared, pool, start, found)
    _tell(work, found, facts)
    places_output(work.run).write(lambda path: save(path, places), work.stamp)
    steps_output(work.run).write(lambda path: write_table(steps, path), work.stamp, **facts)
    return facts


def _search(work: Work, prepared: Prepared, pool: Pool, start: Start) -> Selection:
    options = work.options
    if options.own_k > 1 and len(pool.points) * len(prepared.target) > _TABLE_NUMBERS:
        raise ConfigError(
            f"gio: own_k {options.own_k} needs a table of {len(pool.points):,} candidates by"
            f" {len(prepared.target):,} target points",
            fix="set own_k: 1, or mode: centroids",
        )
    if options.own_k > len(start.points):
        raise ConfigError(
            f"gio: own_k is {options.own_k}, but the start has"
            f" {counted(len(start.points), 'point')}",
            fix="raise start_size, or lower own_k",
        )
    device = work.engine["device"]
    target, points, begin = (
        torch.from_numpy(np.ascontiguousarray(rows)).to(device)
        for rows in (prepared.target, pool.points, start.points)
    )
    k = min(options.k, len(target) - 1)
    if k < options.k:
        log.warning("%s: k is lowered from %d to %d, as there are %d different target points;"
                    " divergences of another k are others, the choice is the same", NAME,
                    options.k, k, len(target))  # fmt: skip
    stop = Stop(patience=options.patience, max_steps=options.max_steps)
    if options.optimizer == "gradient":
        return descend(
            target, points, begin, k=k, estimator=options.estimator, stop=stop,
            descent=options.descent, seed=work.seed("descent") % (1 << 62),
        )  # fmt: skip
    own = torch.from_numpy(pool.own).to(device) if (pool.own >= 0).any() else None
    return select(
        target, points, begin, k=k, own_k=options.own_k, estimator=options.estimator, own=own,
        stop=stop,
    )  # fmt: skip


def _chosen(
    work: Work, prepared: Prepared, pool: Pool, start: Start, found: Selection
) -> tuple[pl.DataFrame, Floats, dict[str, Any]]:
    """The table of steps, the place of each example, and counts."""
    most = work.options.max_share if work.options.mode == "centroids" else None
    added = np.array([step.candidate for step in found.steps], dtype=np.int64)
    sizes = np.bincount(pool.members[pool.members >= 0], minlength=len(pool.points))[added]
    budget = _budget(work, pool)
    # The limits of clusters are in examples; a budget of tokens is met below.
    mean_cost = float(pool.costs[pool.members >= 0].mean()) if budget is not None else 1.0
    limit = None if budget is None else budget / max(mean_cost, 1e-9)
    num, share, taken = _cut(prepared, pool, added, sizes, most=most, limit=limit, budget=budget)
    step_of = np.full(len(pool.points) + 1, -1, dtype=np.int32)
    step_of[added[:num]] = np.arange(num)
    order = ordered(step_of[pool.members], pool.distances, taken.tolist())
    if budget is not None:
        order = order[np.cumsum(pool.costs[order]) <= budget]
    counts = np.bincount(step_of[pool.members[order]], minlength=num).astype(np.int64)
    weights = step_weights(share, counts, most=work.options.max_share)
    places = np.full(len(pool.members), np.nan, dtype=np.float32)
    places[start.chosen] = np.arange(len(start.chosen))
    places[order] = len(start.chosen) + np.arange(len(order))
    near = nearest(
        pool.points[added[:num]], Vectors([prepared.target]), 1, metric="l2", **work.engine
    ).values[:, 0]
    steps = pl.DataFrame(
        {
            "step": np.arange(num + 1),
            "candidate": [None, *pool.names[added[:num]].tolist()],
            "divergence": [found.start, *(step.divergence for step in found.steps[:num])],
            "share": [None, *share.tolist()],
            "size": [len(start.chosen), *sizes[:num].tolist()],
            "examples": [len(start.chosen), *counts.tolist()],
            "weight": [1.0, *weights.tolist()],
            "distance": [None, *near.tolist()],
        },
        schema={
            "step": pl.Int64, "candidate": pl.Int64, "divergence": pl.Float64,
            "share": pl.Float64, "size": pl.Int64, "examples": pl.Int64, "weight": pl.Float64,
            "distance": pl.Float64,
        },
    )  # fmt: skip
    facts = {
        "steps": num,
        "chosen": len(order),
        "start": len(start.chosen),
        "why": "budget" if num < len(found.steps) else found.why,
        "before": round(found.start, 6),
        "after": round(steps["divergence"][num], 6),
    }
    return steps, places, facts


def _cut(
    prepared: Prepared, pool: Pool, added: Integers, sizes: Integers, *, most: float | None,
    limit: float | None, budget: float | None,
) -> tuple[int, npt.NDArray[np.float64], Integers]:  # fmt: skip
    """How many steps the budget takes, their shares and examples."""
    target, points = torch.from_numpy(prepared.target), torch.from_numpy(pool.points[added])
    own = torch.from_numpy(pool.own[added])

    def found() -> Iterator[Integers]:
        return owners(target, points, own)

    num, share, taken = whole_steps(found(), sizes, most=most, budget=limit)
    if limit is None or budget is None:
        return num, share, taken
    while num < len(added) and _cost(pool, added[:num], taken) < budget:
        limit *= 1.25  # the examples nearest to the target are shorter than the mean
        num, share, taken = whole_steps(found(), sizes, most=most, budget=limit)
    return num, share, taken


def _cost(pool: Pool, added: Integers, taken: Integers) -> int:
    """Tokens, or examples, of what is taken."""
    step_of = np.full(len(pool.points) + 1, -1, dtype=np.int32)
    step_of[added] = np.arange(len(added))
    order = ordered(step_of[pool.members], pool.distances, taken.tolist())
    return int(pool.costs[order].sum())


def _budget(work: Work, pool: Pool) -> float | None:
    """In the unit of `pool.costs`."""
    budget = work.options.budget
    if budget is None:
        return None
    if budget.examples is not None:
        return float(budget.examples)
    if budget.tokens is not None:
        return float(budget.tokens)
    may = np.concatenate([candidates(work, part) for part in work.run.partitions()])
    whole = float(pool.costs[may].sum())
    return whole * float(budget.share or budget.token_share or 0.0)


def _tell(work: Work, found: Selection, facts: dict[str, Any]) -> None:
    if not found.steps:
        log.warning(
            "%s: nothing is chosen, as no candidate brings the selection nearer to the target; the"
            " target may lie outside the pool", NAME,
        )  # fmt: skip
        return
    log.info("%s: %d additions, %d examples, divergence %.3f to %.3f, ended by %s", NAME,
             facts["steps"], facts["chosen"], facts["before"], facts["after"],
             facts["why"])  # fmt: skip
