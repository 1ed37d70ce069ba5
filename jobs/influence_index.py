"""A run's index of gradients as a whole, for many questions at once: `curate.open(run).gradients`.

    exact        blocks of rows in float32, what can be among the best again in float64
    approximate  bfloat16, or int8 rows as such; the best candidates again in float64
    faiss        its IndexFlatIP over copies of all rows in float32, N k numbers of 4 bytes; what it
                 finds is valued again in float64
    cells        its IndexIVFFlat over the same copies: only the cells nearest to a query are looked
                 into, which for gradients often misses much

All but the first say what share of the exact answer they found, by asking up to 100 of the queries
twice.

Shapes: N rows of the pool, k numbers of a row, Q queries, K results of each.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import polars as pl
import torch
from torch import Tensor

from curate.data.example import KEY
from curate.data.layout import RunFolder
from curate.data.tables import read_examples
from curate.errors import ConfigError, InputError
from curate.models.index_rows import decode_rows
from curate.models.scan import Found, ScanPart, recall_of, scan
from curate.models.scan_best import Ranked
from curate.models.scan_products import Queries
from curate.vectors.engine import faiss_module
from jobs.influence_rows import known_rows, whitened_part
from jobs.influence_sides import FOLDER

log = logging.getLogger(__name__)

How = Literal["exact", "approximate", "faiss", "cells"]

_ASKED_TWICE = 100
_BLOCK_ROWS = 4096
_ROWS_FOR_A_CELL = 64


class Answered(NamedTuple):
    """What was found, and how much of what there was to find."""

    found: Found
    """(Q, K) positions, in the order of `GradientIndex.keys`, and scores."""
    recall: float
    """Mean share of the exact answer, over the queries that were asked twice; 1 where exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientIndex:
    """Projected gradients of all examples with one checkpoint, mapped and not read."""

    parts: Sequence[ScanPart]
    keys: pl.DataFrame
    """(N,) source, file, row of each, and split."""

    @property
    def num_rows(self) -> int:
        """N"""
        return self.keys.height

    def values(self, positions: Sequence[int]) -> Tensor:
        """(n, k) float32 rows, which may serve as queries; zeros where there is no gradient."""
        wanted = np.asarray(positions, dtype=np.int64)
        found = torch.empty(len(wanted), self.parts[0].header.width)
        start = 0
        for part in self.parts:
            mine = np.flatnonzero((wanted >= start) & (wanted < start + part.num_rows))
            if len(mine):
                found[torch.from_numpy(mine)] = _decoded(part, wanted[mine] - start)
            start += part.num_rows
        return found

    def search(
        self,
        queries: Tensor,
        *,
        num_best: int = 100,
        how: How = "exact",
        cells: int | None = None,
        probes: int = 16,
    ) -> Answered:
        """Rows with the largest inner products with each query; the lowest with its negative.

        Args:
            queries: (Q, k); preconditioned, or the rows whitened, for influence.
            num_best: K.
            how: see the head of this file.
            cells: how many there are; four times the root of N unless given.
            probes: how many of them are looked into.

        Raises:
            ConfigError: `how` is unknown, or nothing is asked for.
            InputError: a query is not finite.
            MissingDependencyError: faiss is asked for and not there.
        """
        if how not in get_args(How):
            raise ConfigError(f"how is {how!r}", fix=f"use one of {', '.join(get_args(How))}")
        if how == "exact":
            return Answered(scan(self.parts, queries, num_best=num_best), 1.0)
        if how == "approximate":
            found = scan(self.parts, queries, num_best=num_best, approximate=True)
        else:
            found = _by_faiss(self.parts, queries, num_best, how == "cells", cells, probes)
        taken = np.linspace(0, len(queries) - 1, min(_ASKED_TWICE, len(queries))).round()
        some = taken.astype(np.int64)
        exact = scan(self.parts, queries[torch.from_numpy(some)], num_best=num_best)
        recall = float(recall_of(Found(found.positions[some], found.scores[some]), exact).mean())
        log.warning("%s search of gradients: recall %.4f of the %d best, by %d queries",
                    how, recall, num_best, len(some))  # fmt: skip
        return Answered(found, recall)


def indexed_checkpoints(run: RunFolder) -> tuple[str, ...]:
    """Those whose gradients of the pool are there."""
    folders = (run.root / FOLDER).glob("*/")
    return tuple(sorted(path.name for path in folders if list(path.glob("part-*.vectors"))))


def gradient_index(run: RunFolder, checkpoint: str, *, whitened: bool = False) -> GradientIndex:
    """Open the index.

    Args:
        run: the run folder, or that of its target.
        checkpoint: one of `indexed_checkpoints`.
        whitened: L^-1 phi, kept by `influence: {whiten: true}`, in place of phi.

    Raises:
        InputError: there is none, or it is damaged.
    """
    known = indexed_checkpoints(run)
    if checkpoint not in known:
        raise InputError(
            f"{run.root} has no index of gradients with {checkpoint!r}",
            fix=f"use one of {', '.join(known)}" if known else "score with influence first",
        )
    parts: list[ScanPart] = []
    keys: list[pl.DataFrame] = []
    for part in run.partitions():
        rows = known_rows(run, part, checkpoint)
        opened = whitened_part(run, part, checkpoint, rows) if whitened else rows.scan_part("dot")
        parts.append(opened)
        keys.append(read_examples(run, part, [*KEY, "split"]))
    return GradientIndex(parts=parts, keys=pl.concat(keys))


def _decoded(part: ScanPart, rows: Any) -> Tensor:
    scales = None if part.scales is None else part.scales[rows]
    return decode_rows(np.asarray(part.stored)[rows], scales, part.header)


def _by_faiss(
    parts: Sequence[ScanPart],
    queries: Tensor,
    num_best: int,
    in_cells: bool,
    cells: int | None,
    probes: int,
) -> Found:
    """By an index in memory of the rows that can be used."""
    faiss = faiss_module(torch.get_num_threads())
    blocks: list[Any] = []
    places: list[Any] = []
    start = 0
    for part in parts:
        for first in range(0, part.num_rows, _BLOCK_ROWS):
            rows = slice(first, first + _BLOCK_ROWS)
            values = _decoded(part, rows).numpy()
            held = part.taken(rows).can_be_used(np.asarray(np.isfinite(values).all(1)))
            blocks.append(values[held])
            places.append(np.flatnonzero(held) + start + first)
        start += part.num_rows
    copies, position = np.concatenate(blocks), np.concatenate(places)
    width = copies.shape[1]
    index: Any = faiss.IndexFlatIP(width)
    if in_cells:
        count = min(cells or round(4 * len(copies) ** 0.5), max(1, len(copies)))
        index = faiss.IndexIVFFlat(index, width, count, faiss.METRIC_INNER_PRODUCT)
        chosen = np.random.default_rng(0).permutation(len(copies))[: _ROWS_FOR_A_CELL * count]
        index.cp.min_points_per_centroid = 1
        index.train(copies[np.sort(chosen)])
        index.nprobe = probes
    index.add(copies)
    asked = np.ascontiguousarray(queries.detach().cpu().float().numpy())
    if not np.isfinite(asked).all():
        raise InputError("a query is not finite", fix="leave it out of the queries")
    _, found = index.search(asked, min(num_best, len(copies)))
    best = Ranked(len(asked), num_best)
    held = {query: np.sort(position[own[own >= 0]]) for query, own in enumerate(found)}
    exact = Queries(queries, "cpu").exact(parts, held)
    for query, positions in held.items():
        best.put(query, positions, exact[query])
    return best.found
