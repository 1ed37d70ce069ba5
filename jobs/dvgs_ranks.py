"""Percentile ranks of similarities in the whole pool, step by step, for the scorer `dvgs`.

The values of a step are put in order once for the pool, one number an example in memory, and at
most `GRID` of them are kept: ranks are exact up to that many examples, and to 1 / `GRID` beyond.

Shapes: N examples of a partition.
"""

from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors.torch import load_file, save_file

from curate.config import parse
from curate.data.example import KEY
from curate.data.partitions import Partition, remove_strays
from curate.data.tables import read_table, write_table
from curate.models.checkpoints import native_errors
from jobs.dvgs import ranks_output, seed_folder, slug_of, values_output
from jobs.dvgs_work import read_points, step_column, step_weight
from jobs.measuring import as_columns
from jobs.run import Receipt
from jobs.training_work import open_workshop
from scorers.dvgs import DVGS, Running, grid_of, percentile_ranks, turns

GRID = 65_536


def grid_work(payload: dict[str, Any]) -> Receipt:
    """Put the values of every step in order."""
    shop, seed = open_workshop(payload), int(payload["seed"])
    parts = shop.run.partitions()
    remove_strays(seed_folder(shop.run, seed) / "values", {part.name for part in parts})
    paths = [values_output(shop.run, seed, part).path for part in parts]
    grids: dict[str, torch.Tensor] = {}
    for point in read_points(shop.run, seed):
        name = step_column(point)
        pieces = [read_table(path, [name])[name].drop_nulls() for path in paths]
        values = pl.concat(pieces).cast(pl.Float64).to_numpy()
        grids[name] = torch.from_numpy(grid_of(values, GRID).astype(np.float32))

    def write(path: Any) -> None:
        with native_errors():
            save_file(grids, path)

    ranks_output(shop.run, seed).write(write, payload["fingerprint"], steps=len(grids))
    return {"steps": len(grids)}


def rank_work(payload: dict[str, Any]) -> Receipt:
    """Mean percentile rank of each example of one partition."""
    shop, scorer = open_workshop(payload), parse(DVGS, payload["scorer"])
    seed, part = int(payload["seed"]), Partition(**payload["partition"])
    values = read_table(values_output(shop.run, seed, part).path)
    grids = load_file(ranks_output(shop.run, seed).path)
    points = read_points(shop.run, seed)
    running = Running(("rank",), values.height)
    for point, turn in zip(points, turns(len(points), scorer.subsample), strict=True):
        name = step_column(point)
        column = values[name].cast(pl.Float64).fill_null(np.nan).to_numpy()
        rows = np.flatnonzero(np.isfinite(column))
        ranks = percentile_ranks(column[rows], grids[name].double().numpy())
        weight = step_weight(scorer, point)
        running.add(torch.from_numpy(rows), {"rank": torch.from_numpy(ranks)}, weight=weight,
                    stands_for=turn.size)  # fmt: skip
    ranks = running.means()["rank"].float()
    means = values.select(pl.exclude([*KEY, "^step-.*$"]))
    nothing = torch.from_numpy(means["cosine"].is_null().to_numpy())
    table = values.select(KEY).hstack(means)
    table = table.hstack(as_columns({"rank": ranks.masked_fill(nothing, torch.nan)}))
    mark = values_output(shop.run, seed, part).mark() or {}
    names = ("unscored", "truncated", "copies", "not_finite", "halved")
    counts = {name: mark[name] for name in names if name in mark}
    shop.run.quantities(part, slug_of(seed)).write(
        lambda path: write_table(table, path), payload["fingerprint"], rows=table.height, **counts
    )
    return {"rows": table.height, **counts}
