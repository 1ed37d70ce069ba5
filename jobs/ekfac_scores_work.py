"""What a worker does with the pool for `influence` with EK-FAC: scores, tables, the matrix.

Shapes: N examples of a partition, n of them scored, Q queries.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from curate.config import parse
from curate.data.example import KEY, TRAIN
from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.data.tables import meet, read_examples, read_table, write_table
from curate.models.influence_scores import OverTasks
from curate.models.kfac_pass import KFACPass
from curate.models.tasks import Encoded
from jobs.ekfac_queries import scores_output
from jobs.ekfac_queries_work import load_queries, query_names
from jobs.ekfac_work import Shop
from jobs.fields import example_fields
from jobs.influence_target import read_groups
from jobs.influence_top import candidates
from jobs.influence_work import matrix_output, top_part_output
from jobs.measuring import as_columns, counts_of, measurer_of
from jobs.run import Receipt
from jobs.score_columns import scored_columns
from jobs.settings import parse_settings
from scorers.influence import Influence

_AT_ONCE = 64
"""Directions of one pass over a partition."""
_TASK = "task-"


def raw_work(payload: dict[str, Any]) -> Receipt:
    """Scores for each sub-task, mean loss and length, with one checkpoint."""
    pool = _Pool(payload)
    slug = measurer_of(payload["measurer"]).slug
    names = query_names(pool.shop, pool.options, "queries", slug)
    found = torch.full((len(pool.encoded), len(names)), torch.nan, dtype=torch.float64)
    for some in _pieces(len(names)):
        asked = load_queries(pool.shop, pool.options, "queries", slug, some)
        found[pool.scored, some] = pool.engine.scores(pool.encoded, pool.scored, asked)
    seen = pool.engine.seen
    columns = {
        "mean_loss": pool.spread(seen.totals / seen.counts),
        **pool.counts(),
        **{f"{_TASK}{place:06d}": own for place, own in enumerate(found.T.contiguous())},
    }
    table = pool.keys.hstack(as_columns({name: own.float() for name, own in columns.items()}))
    facts = counts_of(pool.encoded, table)
    if pool.engine.halved:
        facts["halved"] = pool.engine.halved
    scores_output(pool.shop.run, pool.options, pool.part, slug).write(
        lambda path: write_table(table, path), payload["fingerprint"], rows=table.height, **facts
    )
    return {"rows": table.height, **facts}


def table_work(payload: dict[str, Any]) -> Receipt:
    """The tables of one partition, a table for each seed, and its candidates for the lists."""
    settings = parse_settings(payload["settings"])
    run, part = RunFolder(Path(settings.run)), Partition(**payload["partition"])
    options = parse(Influence, payload["scorer"])
    keys = read_examples(run, part, [*KEY, "split"])
    listed = (keys["split"] == TRAIN).to_numpy()
    keys = keys.select(KEY)
    names = read_groups(settings, options.tasks).names
    total = np.zeros((keys.height, len(names)))
    unscored = 0
    for slug, checkpoint in zip(payload["slugs"], payload["checkpoints"], strict=True):
        raw = read_table(scores_output(run, options, part, checkpoint).path)
        meet(keys, raw)
        scores = _numbers(raw.select(pl.col(f"^{_TASK}.*$")))
        total += scores / len(payload["slugs"])
        over = OverTasks(options.aggregate, keys.height)
        over.add(scores.T)
        values = over.value()
        unscored = int(np.isnan(values).sum())
        found = pl.Series("value", values.astype(np.float32)).fill_nan(None)
        table = keys.hstack([found, raw["mean_loss"], *(raw[c] for c in scored_columns(raw))])
        run.quantities(part, slug).write(
            lambda path, table=table: write_table(table, path),
            payload["fingerprint"],
            rows=table.height,
            unscored=unscored,
        )
    ends = candidates(keys, total, names, listed=listed, count=options.top)
    top_part_output(run, options, part).write(
        lambda path: write_table(ends, path), payload["fingerprint"], rows=ends.height
    )
    return {"rows": keys.height, "unscored": unscored}


def matrix_work(payload: dict[str, Any]) -> Receipt:
    """Scores of one partition with every target example, mean over checkpoints."""
    options = parse(Influence, payload["scorer"])
    settings = parse_settings(payload["settings"])
    run, part = RunFolder(Path(settings.run)), Partition(**payload["partition"])
    keys = read_examples(run, part, KEY)
    num_targets = len(read_groups(settings, options.tasks).of_rows)
    total = np.zeros((num_targets, keys.height))
    for measurer, folder in zip(payload["measurers"], payload["folders"], strict=True):
        pool = _Pool({**payload, "measurer": measurer, "folder": folder})
        slug = measurer_of(measurer).slug
        found = np.full(total.shape, np.nan)
        names = query_names(pool.shop, options, "targets", slug)
        for some in _pieces(len(names)):
            asked = load_queries(pool.shop, options, "targets", slug, some)
            values = pool.engine.scores(pool.encoded, pool.scored, asked)
            for name, own in zip(names[some], values.T.numpy(), strict=True):
                found[int(name), pool.scored] = own
        total += found / len(payload["folders"])
    columns = [
        pl.Series(f"target-{place:06d}", own.astype(np.float32)).fill_nan(None)
        for place, own in enumerate(total)
    ]
    table = keys.hstack(columns)
    matrix_output(run, options, part).write(
        lambda path: write_table(table, path), payload["fingerprint"], rows=table.height
    )
    return {"rows": table.height}


class _Pool:
    """One partition with one checkpoint."""

    def __init__(self, payload: dict[str, Any]) -> None:
        self.shop, self.part = Shop(payload, group=0), Partition(**payload["partition"])
        self.options = parse(Influence, payload["scorer"])
        self.keys = read_examples(self.shop.run, self.part, KEY)
        fields = example_fields(self.shop.settings, self.shop.run, self.part)
        self.encoded: Encoded = self.shop.task.encode(fields)
        self.scored = np.flatnonzero(self.encoded.num_scored > 0)
        layers = [layer for layers in self.shop.groups for layer in layers]
        self.engine: KFACPass = self.shop.engine_of(layers)

    def counts(self) -> dict[str, Tensor]:
        """What the scores stand on."""
        found = {"num_scored": self.encoded.num_scored, "scored_share": self.encoded.scored_share}
        return {
            name: self.spread(torch.from_numpy(values[self.scored]))
            for name, values in found.items()
            if values is not None
        }

    def spread(self, values: Tensor) -> Tensor:
        """(N,) values of the n scored examples, NaN for the others."""
        found = torch.full((len(self.encoded),), torch.nan, dtype=torch.float64)
        found[torch.from_numpy(self.scored)] = values.double()
        return found


def _numbers(frame: pl.DataFrame) -> npt.NDArray[np.float64]:
    return frame.select(pl.all().cast(pl.Float64).fill_null(float("nan"))).to_numpy()


def _pieces(count: int) -> list[slice]:
    return [slice(first, min(first + _AT_ONCE, count)) for first in range(0, count, _AT_ONCE)]
