"""Scores of a partition for the scorer `influence`: tables, candidates for the lists, the matrix.

run/quantities/influence-seed-0/part-….parquet  value, mean_loss, with influence self_value
run/influence/<metric>/top/part-….parquet       the partition's candidates for top.parquet
run/influence/<metric>/top.parquet              see `jobs.influence_top`
run/influence/<metric>/matrix/part-….parquet    key, then target-000000, ...: a column for each
                                                target example, in the order of targets.parquet
run/influence/<metric>/matrix/targets.parquet   key and sub-task of each column

A model family is the checkpoints whose scores are added up for one table: those of a seed, and for
trak all. Lists and matrix hold the mean over families.

Shapes: N examples of a partition, G sub-tasks, g of them at a time, k numbers of a row.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
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
from curate.data.partitions import Output, Partition, remove_strays
from curate.data.tables import meet, read_examples, read_table, write_table
from curate.models.index_rows import check_alike
from curate.models.influence_scores import OverTasks
from curate.models.scan import ScanPart, score_blocks
from jobs.influence_curvature import load_curvature
from jobs.influence_queries import (
    Queries,
    names_of,
    prepared,
    raw_queries,
    read_queries,
    results_folder,
)
from jobs.influence_rows import Known, known_rows, part_blocks, white_squares, whitened_part
from jobs.influence_sides import FOLDER
from jobs.influence_target import read_groups, target_parts
from jobs.influence_top import candidates, merged
from jobs.run import Receipt
from jobs.settings import Settings, parse_settings
from scorers.influence import Influence

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]

TASKS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Family:
    """Checkpoints whose scores are added up."""

    seed: int
    slug: str
    """Of its tables under `quantities/`."""
    checkpoints: tuple[str, ...]
    """Slugs."""
    weights: tuple[float, ...]
    """Of each."""


def top_part_output(run: RunFolder, options: Influence, part: Partition) -> Output:
    """Candidates of one partition."""
    return Output(results_folder(run, options) / "top" / f"{part.name}.parquet")


def top_output(run: RunFolder, options: Influence) -> Output:
    """The lists."""
    return Output(results_folder(run, options) / "top.parquet")


def matrix_output(run: RunFolder, options: Influence, part: Partition) -> Output:
    """Scores of one partition with every target example."""
    return Output(results_folder(run, options) / "matrix" / f"{part.name}.parquet")


def targets_output(run: RunFolder, options: Influence) -> Output:
    """What the columns of the matrix are."""
    return Output(results_folder(run, options) / "matrix" / "targets.parquet")


def score_work(payload: dict[str, Any]) -> Receipt:
    """All tables of one partition, and its candidates."""
    work = _Work(payload)
    keys = read_examples(work.run, work.part, [*KEY, "split"])
    training = (keys["split"] == TRAIN).to_numpy()
    keys = keys.select(KEY)
    queries = {slug: read_queries(work.run, work.options, slug) for slug in work.slugs}
    names = names_of(list(queries.values()))
    for slug, own in queries.items():
        _check(work, slug, own)
    values = {family.seed: work.over(keys.height) for family in work.families}
    ends: list[pl.DataFrame] = []
    for start in range(0, len(names), TASKS_AT_ONCE):
        some = slice(start, start + TASKS_AT_ONCE)
        total = np.zeros((len(names[some]), keys.height))
        chosen = {slug: own.values[some] for slug, own in queries.items()}
        for family in work.families:
            scores = work.scores(family, chosen)
            values[family.seed].add(scores)
            total += scores / len(work.families)
        ends.append(candidates(keys, total.T, names[some], listed=training, count=work.options.top))
    for family in work.families:
        table = work.table(family, keys, values[family.seed].value())
        _write(work.run.quantities(work.part, family.slug), table, payload)
    _write(top_part_output(work.run, work.options, work.part), pl.concat(ends), payload)
    unscored = int(np.isnan(values[work.families[0].seed].value()).sum())
    return {"rows": keys.height, "unscored": unscored}


def top_work(payload: dict[str, Any]) -> Receipt:
    """Merge the candidates of all partitions."""
    settings = parse_settings(payload["settings"])
    options = parse(Influence, payload["scorer"])
    run = RunFolder(Path(settings.run))
    parts = run.partitions()
    table = merged(
        (read_table(top_part_output(run, options, part).path) for part in parts),
        count=options.top,
    )
    top_output(run, options).write(
        lambda path: write_table(table, path), payload["fingerprint"], rows=table.height
    )
    names = {part.name for part in parts}
    folders = [results_folder(run, options) / name for name in ("top", "matrix")]
    for slug in payload["slugs"]:
        folders += [run.root / FOLDER / slug, run.root / FOLDER / slug / "whitened"]
    for folder in folders:
        remove_strays(folder, names)
    return {"rows": table.height}


def targets_work(payload: dict[str, Any]) -> Receipt:
    """What the columns of the matrix are."""
    settings = parse_settings(payload["settings"])
    options = parse(Influence, payload["scorer"])
    groups = read_groups(settings, options.tasks)
    names = pl.Series("column", [_column(place) for place in range(len(groups.of_rows))])
    tasks = pl.Series("task", [groups.names[place] for place in groups.of_rows], dtype=pl.String)
    table = pl.DataFrame([names]).hstack(groups.keys).hstack([tasks])
    targets_output(RunFolder(Path(settings.run)), options).write(
        lambda path: write_table(table, path), payload["fingerprint"], rows=table.height
    )
    return {"rows": table.height}


def matrix_work(payload: dict[str, Any]) -> Receipt:
    """Scores of one partition with every target example, mean over families; null without one."""
    work = _Work(payload)
    keys = read_examples(work.run, work.part, KEY)
    columns: list[pl.Series] = []
    num_targets = len(read_groups(work.settings, work.options.tasks).of_rows)
    for slug in work.slugs:
        _check(work, slug, read_queries(work.run, work.options, slug))
    for start in range(0, num_targets, TASKS_AT_ONCE):
        some = slice(start, min(start + TASKS_AT_ONCE, num_targets))
        single = {slug: work.single_queries(slug, some) for slug in work.slugs}
        chosen = {slug: values for slug, (values, _) in single.items()}
        total = np.zeros((some.stop - start, keys.height))
        for family in work.families:
            total += work.scores(family, chosen) / len(work.families)
        for _, usable in single.values():
            total[~usable] = np.nan
        columns += [_narrowed(_column(start + place), own) for place, own in enumerate(total)]
    table = keys.hstack(columns)
    _write(matrix_output(work.run, work.options, work.part), table, payload)
    return {"rows": table.height}


class _Work:
    """What a task on one partition has at hand."""

    def __init__(self, payload: Mapping[str, Any]) -> None:
        self.settings: Settings = parse_settings(payload["settings"])
        torch.set_num_threads(self.settings.cluster.threads)
        self.run = RunFolder(Path(self.settings.run))
        self.part = Partition(**payload["partition"])
        self.options = parse(Influence, payload["scorer"])
        self.families = [
            Family(one["seed"], one["slug"], tuple(one["checkpoints"]), tuple(one["weights"]))
            for one in payload["families"]
        ]
        self.slugs = [slug for family in self.families for slug in family.checkpoints]
        self._known: dict[str, Known] = {}
        self._parts: dict[str, ScanPart] = {}

    def over(self, size: int) -> OverTasks:
        return OverTasks(self.options.aggregate, size)

    def known(self, slug: str) -> Known:
        """The pool's index with one checkpoint."""
        if slug not in self._known:
            self._known[slug] = known_rows(self.run, self.part, slug)
        return self._known[slug]

    def scan_part(self, slug: str) -> ScanPart:
        """What queries are multiplied with."""
        if slug not in self._parts:
            known = self.known(slug)
            self._parts[slug] = (
                whitened_part(self.run, self.part, slug, known)
                if self.options.whiten
                else known.scan_part(self.options.metric)
            )
        return self._parts[slug]

    def scores(self, family: Family, queries: Mapping[str, Tensor]) -> Floats:
        """(g, N) weighted sum over the checkpoints of a family; NaN where a row has no value."""
        size = len(self.known(family.checkpoints[0]).usable)
        total = np.zeros((len(queries[family.checkpoints[0]]), size))
        for slug, weight in zip(family.checkpoints, family.weights, strict=True):
            for start, scores in score_blocks([self.scan_part(slug)], queries[slug]):
                total[:, start : start + scores.shape[1]] += weight * scores
        if self.options.metric == "trak":
            total *= np.mean([self.known(slug).doubts for slug in family.checkpoints], axis=0)
        return total

    def single_queries(self, slug: str, some: slice) -> tuple[Tensor, npt.NDArray[np.bool_]]:
        """(g, k) queries of single target examples, and (g,) which of them have a gradient."""
        found: list[Tensor] = []
        usable: list[npt.NDArray[np.bool_]] = []
        for rows, known in target_parts(self.settings, slug):
            first, last = max(rows.start, some.start), min(rows.stop, some.stop)
            if first >= last:
                continue
            place = slice(first - rows.start, last - rows.start)
            values = known.opened.values(place)
            found.append(raw_queries(known, place, values, self.options))
            usable.append(known.usable[place])
        values = prepared(self.run, torch.cat(found), self.options, slug)
        return values, np.concatenate(usable)

    def table(self, family: Family, keys: pl.DataFrame, value: Floats) -> pl.DataFrame:
        """The quantities of a family's table."""
        known = [self.known(slug) for slug in family.checkpoints]
        for one in known:
            meet(keys, one.opened.table.select(KEY))
        found = {"value": value, "mean_loss": np.mean([one.mean_losses for one in known], axis=0)}
        if self.options.metric == "influence":
            found["self_value"] = self.self_influence(family.checkpoints[0])
        rest = known[0].opened.table
        more = [rest[name] for name in ("num_scored", "scored_share") if name in rest.columns]
        columns = [_narrowed(name, values) for name, values in found.items()]
        return keys.hstack([*columns, *(one.cast(pl.Float32) for one in more)])

    def self_influence(self, slug: str) -> Floats:
        """(N,) |L^-1 phi|^2; NaN where a row has no value."""
        known = self.known(slug)
        if not self.options.whiten:
            return white_squares(known, load_curvature(self.run, slug))
        found = np.full(len(known.usable), np.nan)
        for rows, values in part_blocks(self.scan_part(slug)):
            found[rows] = values.double().square().sum(1).numpy()
        return np.where(known.usable, found, np.nan)


def _check(work: _Work, slug: str, queries: Queries) -> None:
    names = f"the pool in {work.run.root / FOLDER / slug}", f"the target in {work.run.target}"
    check_alike(work.known(slug).header, queries.header, names=names, is_query=True)


def _write(output: Output, table: pl.DataFrame, payload: Mapping[str, Any]) -> None:
    output.write(lambda path: write_table(table, path), payload["fingerprint"], rows=table.height)


def _narrowed(name: str, values: Floats) -> pl.Series:
    """(N,) float32; null where that is not finite."""
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    return pl.Series(name, np.where(np.isfinite(narrow), narrow, np.float32(np.nan))).fill_nan(None)


def _column(place: int) -> str:
    return f"target-{place:06d}"
