"""The gradient index: projected gradients of every example, per checkpoint and partition.

    run/influence/<checkpoint>/part-….vectors     rows of `curate.models.index_rows`
    run/influence/<checkpoint>/part-….parquet     key, loss, squared_norm, ..., scales of each row
    run/influence/<checkpoint>/sides.safetensors  principal axes, where they are asked for
    run/target/influence/<checkpoint>/…           the same of the target

A row that has no vector is zeros in the one file and has no `squared_norm` in the other. The file
of vectors is marked last: where it is done, so is the table.

Shapes: N examples of a partition, B of a batch, k numbers of a row, S scales of a row.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
from torch import Tensor

from curate.config import parse, plain
from curate.data.example import KEY
from curate.data.files import discard, fingerprint, misshapen, replace
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.data.tables import read_examples, read_table, write_table
from curate.errors import InputError
from curate.models.index_pass import IndexPass, index_rows
from curate.models.index_rows import Header, RowsWriter, decode_rows, encode_rows, open_rows
from curate.models.load import LoadedModel
from curate.models.projection import blocks_of, describe
from curate.models.tasks import Encoded, Task
from curate.models.tokens import tokenizer_digest
from jobs.fields import example_fields
from jobs.influence_adam import Prepared, adam_facts, moments_stamps, prepared
from jobs.influence_columns import row_columns, row_counts
from jobs.influence_sides import (
    FOLDER,
    IndexOptions,
    common_facts,
    sides_of,
    sides_output,
    sides_stamps,
)
from jobs.lengths import content_of, content_settings
from jobs.measurers import Measurer
from jobs.measuring import batch_tokens, measurer_of, ready, tokens_of
from jobs.run import Receipt
from jobs.run import Task as Work
from jobs.settings import Settings, parse_settings
from jobs.target import target_folder, target_settings


class World(NamedTuple):
    """A set of examples that is indexed: the pool of a run, or its target."""

    settings: Settings
    folder: RunFolder
    label: str
    """Before the names of its tasks."""
    pool: Settings
    """Of the run, whose sample gives the principal axes of both."""


def pool_world(settings: Settings) -> World:
    """The examples of the run."""
    return World(settings, RunFolder(Path(settings.run)), "", settings)


def target_world(settings: Settings) -> World:
    """The examples of the target; it must have been indexed before its tasks are asked for."""
    own = target_settings(settings)
    return World(own, target_folder(RunFolder(Path(settings.run))), "target: ", settings)


def vectors_output(run: RunFolder, part: Partition, slug: str) -> Output:
    """Rows of one checkpoint; `slug` as `Measurer.slug` has it."""
    return Output(run.root / FOLDER / slug / f"{part.name}.vectors")


def rows_output(run: RunFolder, part: Partition, slug: str) -> Output:
    """What is known of each row, in the same order."""
    return Output(run.root / FOLDER / slug / f"{part.name}.parquet")


class IndexPart(NamedTuple):
    """The index of one partition."""

    header: Header
    stored: npt.NDArray[Any]
    """(N, k) mapped, as stored."""
    table: pl.DataFrame
    """Key, loss, squared_norm (null: no vector), num_positions, num_scored, scales (N, S)."""

    def values(self, rows: slice = slice(None)) -> Tensor:
        """(n, k) float32 rows."""
        scales = self.table["scales"].to_numpy()[rows] if self.header.num_scales else None
        return decode_rows(self.stored[rows], scales, self.header)


def open_part(run: RunFolder, part: Partition, slug: str) -> IndexPart:
    """What `build_work` wrote.

    Args:
        run: the run folder, or that of the target.
        part: of its partitions.
        slug: of the checkpoint.

    Raises:
        InputError: it is missing, truncated, or damaged.
    """
    vectors, rows = vectors_output(run, part, slug), rows_output(run, part, slug)
    header, stored = open_rows(vectors.path)
    try:
        table = read_table(rows.path)
    except InputError as error:  # what helps is to remove both
        raise misshapen(vectors.path, error.what) from error
    one, other = vectors.mark(), rows.mark()
    if one is None or other is None or one["fingerprint"] != other["fingerprint"]:
        raise misshapen(vectors.path, "the table beside it is of another index")
    return IndexPart(header, stored, table)


def build_tasks(world: World, chosen: Sequence[Measurer], options: IndexOptions) -> list[Work]:
    """One task for each checkpoint and partition, so that a worker loads each model once.

    Args:
        world: the examples.
        chosen: checkpoints.
        options: of the index; `sides_tasks` must have run before those that are returned. Rows of
            a target are of gradients, whatever `adam` says.
    """
    options = dataclasses.replace(options, adam="none") if world.label else options
    moments = moments_stamps(chosen, options)
    common = common_facts(world.settings, chosen, options)
    axes = sides_stamps(world.pool, chosen, options)
    contents = {part.name: content_of(world.folder, part) for part in world.folder.partitions()}
    values = plain(world.settings)
    found: list[Work] = []
    for measurer in chosen:
        for part in world.folder.partitions():
            stamp = fingerprint(
                **common,
                model=measurer.digest,
                axes=axes.get(measurer.name),
                moments=moments.get(measurer.name),
                source=content_settings(world.settings.sources[part.source]),
                examples=contents[part.name],
            )
            payload = {
                "settings": values,
                "pool": world.pool.run,
                "axes": axes.get(measurer.name),
                "moments": moments.get(measurer.name),
                "options": plain(options),
                "partition": asdict(part),
                "measurer": {**asdict(measurer), "folder": str(measurer.folder)},
                "task": common["task_digest"],
                "fingerprint": stamp,
            }
            output = vectors_output(world.folder, part, measurer.slug)
            table = rows_output(world.folder, part, measurer.slug)
            if output.is_done(stamp) and not table.is_done(stamp):  # someone has removed it
                output = table
            found.append(Work(f"{measurer.name}, {world.label}{part.name}", payload, output, stamp))
    return found


def build_work(payload: dict[str, Any]) -> Receipt:
    """Index one partition with one checkpoint."""
    settings = parse_settings(payload["settings"])
    options = parse(IndexOptions, payload["options"])
    run = RunFolder(Path(settings.run))
    part = Partition(**payload["partition"])
    measurer = measurer_of(payload["measurer"])
    task, loaded = ready(settings, measurer)
    keys = read_examples(run, part, KEY)
    encoded = task.encode(example_fields(settings, run, part))
    sides = sides_of(
        loaded,
        options,
        place=sides_output(RunFolder(Path(payload["pool"])), measurer.slug),
        stamp=payload["axes"],
    )
    header = Header(
        dtype=options.dtype,
        num_rows=keys.height,
        first_row=part.first_row,
        blocks=blocks_of(sides),
        projection=describe(options.projection, sides),
        model=measurer.digest,
        tokenizer=None if loaded.tokenizer is None else tokenizer_digest(loaded.tokenizer),
        reduction=options.reduction,
        task=payload["task"],
        adam=adam_facts(options, payload["moments"]),
    )
    way = prepared(loaded, sides, options, folder=measurer.folder, stamp=payload["moments"])
    job = _Job(task, loaded, way, options, header)
    facts: dict[str, Any] = {}

    def write(path: Path) -> None:
        table, counts = _build(job, encoded, keys, path, settings=settings)
        facts.update(rows=table.height, width=header.width, **counts)
        # The mark of the vectors comes after both files.
        rows_output(run, part, measurer.slug).write(
            lambda place: write_table(table, place), payload["fingerprint"], rows=table.height
        )

    output = vectors_output(run, part, measurer.slug)
    discard(output.mark_path)
    replace(output.path, write)
    output.adopt(payload["fingerprint"], **facts)
    return {**facts, **tokens_of(encoded)}


@dataclass(frozen=True, slots=True)
class _Job:
    """What is the same for all batches of a partition."""

    task: Task
    loaded: LoadedModel
    way: Prepared
    options: IndexOptions
    header: Header


def _build(
    job: _Job, encoded: Encoded, keys: pl.DataFrame, path: Path, *, settings: Settings
) -> tuple[pl.DataFrame, dict[str, int]]:
    """Write the vectors at `path`; gives the table beside them, and counts for the log."""
    header, device = job.header, job.loaded.device
    scales = np.ones((header.num_rows, header.num_scales), dtype=np.float32)
    usable = np.zeros(header.num_rows, dtype=np.bool_)
    index = IndexPass(
        job.loaded.model,
        job.task,
        job.way.sides,
        reduction=job.options.reduction,
        with_squares=job.options.norms,
        adam=job.way.adam,
    )
    with RowsWriter(path, header) as writer:

        def take(chosen: npt.NDArray[np.int64], rows: Tensor) -> None:
            found = encode_rows(rows, header.blocks, header.dtype)
            writer.write(chosen, found.stored)
            usable[chosen] = found.usable
            if found.scales is not None:
                scales[chosen] = found.scales

        columns, passed = index_rows(
            index,
            job.task,
            encoded,
            take,
            batch_tokens=batch_tokens(settings.score, device.type),
            device=device,
        )
    table = keys.hstack(row_columns(columns, usable))
    counts = row_counts(encoded, table)
    if header.num_scales:
        given = pl.Series("scales", scales, dtype=pl.Array(pl.Float32, header.num_scales))
        table = table.with_columns(given)
    if header.dtype == "float16":
        counts["rescaled"] = int((scales != 1).sum())
    if passed.halved:
        counts |= {"halved": passed.halved, "batch_tokens": passed.batch_tokens}
    return table, counts
