"""Queries of the scorer `influence`: one vector for each sub-task and checkpoint.

run/influence/<metric>/queries/<checkpoint>.safetensors

A row's score for a sub-task is its inner product with the sub-task's query, by the row's factor
where the metric has one (`influence_rows.Known.factors`): what can be done beforehand is in the
query, the mean over the sub-task, lengths, and the inverse of the curvature.

Shapes: m target examples, G sub-tasks, k numbers of a projected gradient.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from curate.config import parse, plain
from curate.data.files import fingerprint, misshapen
from curate.data.layout import RunFolder
from curate.data.partitions import Output
from curate.errors import InputError
from curate.models.checkpoints import native_errors
from curate.models.curvature import Curvature
from curate.models.index_rows import Block, Header, header_bytes
from curate.models.influence_scores import TaskSums
from jobs.influence_curvature import Features, load_curvature
from jobs.influence_rows import Known, check_bytes
from jobs.influence_sides import FOLDER, IndexOptions
from jobs.influence_target import ensure_gradients, read_groups, sayings_of, target_parts
from jobs.measurers import Measurer
from jobs.measuring import measurer_of
from jobs.run import Receipt, Task
from jobs.settings import Settings, parse_settings
from scorers.influence import Influence

VERSION = 1
"""Raised when the same target would give other queries."""


class Queries(NamedTuple):
    """What `query_work` wrote."""

    values: Tensor
    """(G, k) float64."""
    header: Header
    """Of the index whose rows they may be multiplied with."""
    names: list[str]
    """(G,) of the sub-tasks."""


def results_folder(run: RunFolder, options: Influence) -> Path:
    """Where a metric's queries, lists and matrix lie."""
    return run.root / FOLDER / options.metric


def query_output(run: RunFolder, options: Influence, slug: str) -> Output:
    """Queries of one checkpoint."""
    return Output(results_folder(run, options) / "queries" / f"{slug}.safetensors")


def features_name(options: Influence) -> Features:
    """Of what the curvature is made."""
    return "odds" if options.metric == "trak" else "loss"


def query_tasks(
    settings: Settings,
    chosen: Sequence[Measurer],
    options: Influence,
    index: IndexOptions,
    *,
    target: Sequence[Task],
    curvatures: dict[str, str],
    notes: dict[str, list[str]],
) -> list[Task]:
    """One task for each checkpoint.

    Args:
        settings: of the run.
        chosen: checkpoints.
        options: of the scorer.
        index: of the target's index.
        target: tasks that make that, one for each checkpoint.
        curvatures: checkpoint -> fingerprint of its factors, with metrics that have such.
        notes: checkpoint -> what the user should know of it.
    """
    run = RunFolder(Path(settings.run))
    found: list[Task] = []
    for place, (measurer, task) in enumerate(zip(chosen, target, strict=True)):
        stamp = fingerprint(
            stage="influence queries",
            version=VERSION,
            target=task.fingerprint,
            metric=options.metric,
            whiten=options.whiten,
            curvature=curvatures.get(measurer.name),
        )
        payload = {
            "settings": plain(settings),
            "scorer": plain(options),
            "index": plain(index),
            "measurer": {**asdict(measurer), "folder": str(measurer.folder)},
            "notes": notes.get(measurer.name, []),
            "is_first": place == 0,
            "fingerprint": stamp,
        }
        output = query_output(run, options, measurer.slug)
        found.append(Task(f"{measurer.name}, queries", payload, output, stamp))
    return found


def query_work(payload: dict[str, Any]) -> Receipt:
    """The queries of one checkpoint."""
    settings = parse_settings(payload["settings"])
    torch.set_num_threads(settings.cluster.threads)
    options = parse(Influence, payload["scorer"])
    run, measurer = RunFolder(Path(settings.run)), measurer_of(payload["measurer"])
    counts = ensure_gradients(settings, measurer, parse(IndexOptions, payload["index"]))
    groups = read_groups(settings, options.tasks)
    sums: TaskSums | None = None
    header: Header | None = None
    for rows, known in target_parts(settings, measurer.slug):
        header = known.header
        sums = sums or TaskSums(groups.names, header.width)
        own = groups.of_rows[rows]
        for place, values in known.blocks():
            held = known.usable[place]
            features = raw_queries(known, place, values, options)
            sums.add(features[torch.from_numpy(held)], own[place][held])
    assert sums is not None
    assert header is not None
    values = prepared(run, sums.means(), options, measurer.slug)
    facts: dict[str, Any] = {**counts, "tasks": len(groups.names)}
    told = counts if payload["is_first"] else {**counts, "truncated": 0}  # the same with each
    said = [*payload["notes"], *sayings_of(told)]
    if said:
        facts["says"] = f"influence, {measurer.name}: {'; '.join(said)}"
    noted = {"header": header_bytes(header).decode(), "names": groups.names}

    def write(path: Path) -> None:
        with native_errors():
            save_file({"queries": values}, path, metadata={"facts": json.dumps(noted)})

    output = query_output(run, options, measurer.slug)
    output.write(write, payload["fingerprint"], **facts)
    return facts


def raw_queries(known: Known, rows: slice, values: Tensor, options: Influence) -> Tensor:
    """(n, k) float64 queries of single target examples, before the curvature.

    Args:
        known: of the target.
        rows: of it.
        values: (n, k) these rows.
        options: of the scorer.
    """
    factors = known.factors_of(rows, values, options.metric)
    return values.double() if factors is None else values.double() * factors[:, None]


def prepared(run: RunFolder, queries: Tensor, options: Influence, slug: str) -> Tensor:
    """(n, k) what the rows of the pool are multiplied with, given raw queries (n, k)."""
    if not options.has_curvature:
        return queries
    curvature = load_curvature(run, slug, features_name(options))
    return _solved(queries, curvature, options)


def _solved(queries: Tensor, curvature: Curvature, options: Influence) -> Tensor:
    if options.metric == "trak":  # by the inverse of a sum over the rows, not of their mean
        return curvature.precondition(queries) / curvature.num_rows
    return curvature.whiten(queries) if options.whiten else curvature.precondition(queries)


def read_queries(run: RunFolder, options: Influence, slug: str) -> Queries:
    """The queries of one checkpoint.

    Raises:
        InputError: they are missing or damaged.
    """
    output = query_output(run, options, slug)
    try:
        check_bytes(output)
        with safe_open(output.path, "pt") as file:  # pyright: ignore[reportArgumentType]
            noted = json.loads(file.metadata()["facts"])
            values = file.get_tensor("queries")
        header = json.loads(noted["header"])
        header.pop("format")
        header["blocks"] = tuple(Block(*block) for block in header["blocks"])
        return Queries(values, Header(**header), list(noted["names"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise misshapen(output.path, str(error)) from error


def names_of(found: Sequence[Queries]) -> list[str]:
    """The sub-tasks, which all checkpoints share.

    Raises:
        InputError: they do not.
    """
    if any(one.names != found[0].names for one in found):
        raise InputError(
            "the checkpoints' queries are of different sub-tasks",
            fix="remove influence/*/queries in the run folder and run the same command again",
        )
    return found[0].names
