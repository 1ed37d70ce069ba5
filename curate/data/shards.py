"""Writes the shards of one group: reads each partition once and deals its rows out.

Rows of a component come in the order of the input. A row with several copies is repeated only
after the whole piece of rows that was read together, so that copies do not stand side by side.
Every file of a group is complete and on disk before the first one gets its name.
"""

from collections.abc import Mapping
from itertools import count
from typing import Any

import numpy as np
import pyarrow as pa

from curate.data.choice import Choice, IntArray
from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.data.payload import Payload
from curate.data.shard_curriculum import Phasing, read_phased
from curate.data.shard_formats.sink import Context
from curate.data.shard_layout import Component, Group, Shard
from curate.data.shard_weights import Terms, weigh
from curate.data.shard_writer import ComponentWriter

_RELEASED_PIECES = 96
"""After so many pieces the allocator gives back what it keeps. It costs a tenth of the time of
writing to do so after each, a twentieth after 24."""


def write_group(
    run: RunFolder,
    group: Group,
    *,
    terms: Mapping[str, Terms],
    schema: pa.Schema,
    context: Context,
    tokenizer: str | None,
    phasing: Phasing | None = None,
) -> list[dict[str, Any]]:
    """Write all shards of a group.

    Args:
        run: the run folder.
        group: partitions to read and shards to make of them.
        terms: name of a partition -> what its weights need to know of the others.
        schema: of `shard_schema`.
        context: formats, codec and what they need to know.
        tokenizer: digest of the tokenizer whose counts are summed up; None counts nothing.
        phasing: of a curriculum.

    Returns:
        The receipts of `ComponentWriter.publish`.

    Raises:
        OutputError: the disk is full or read-only.
        CurateError: one file could not be written, and is named; or plan and index disagree.
        InputError: an input file is gone.
    """
    by_component: dict[Component, list[Shard]] = {}
    for shard in group.shards:
        by_component.setdefault(shard.component, []).append(shard)
    writers = {
        component: ComponentWriter(run.shards, mine, schema, context)
        for component, mine in by_component.items()
    }
    try:
        with Payload(run) as payload:
            pieces = count(1)
            for part, piece_rows in zip(group.partitions, group.piece_rows, strict=True):
                planned = read_phased(run, part, phasing, tokenizer=tokenizer)
                choice = weigh(planned, context.settings.weights, terms[part.name])
                for start in range(0, len(choice.rows), piece_rows):
                    piece = choice.at(slice(start, start + piece_rows))
                    _deal(piece, part, payload=payload, writers=writers, schema=schema)
                    if next(pieces) % _RELEASED_PIECES == 0:
                        pa.default_memory_pool().release_unused()
        return [receipt for writer in writers.values() for receipt in writer.publish()]
    finally:
        for writer in writers.values():
            writer.discard()


def _deal(
    choice: Choice,
    part: Partition,
    *,
    payload: Payload,
    writers: Mapping[Component, ComponentWriter],
    schema: pa.Schema,
) -> None:
    """Read one piece of a partition and hand its rows to their components."""
    shares: list[tuple[ComponentWriter, Choice, IntArray, IntArray]] = []
    for phase, copies in choice.copies.items():
        mine = choice.in_phase(phase)
        kept = np.flatnonzero(copies)
        order = kept[np.argsort(choice.domains[kept], kind="stable")]
        ends = np.searchsorted(choice.domains[order], np.arange(len(choice.names) + 1))
        for name, low, high in zip(choice.names, ends[:-1], ends[1:], strict=True):
            writer = writers.get(Component(phase, name))
            if writer is not None and low < high:
                shares.append((writer, mine, order[low:high], copies[order[low:high]]))
    if not shares:
        return
    wanted = np.zeros(len(choice.rows), np.bool_)
    for _, _, index, _ in shares:
        wanted[index] = True
    batches = payload.batches(part, choice.rows[wanted], batch_rows=len(choice.rows))
    for writer, mine, index, copies in shares:
        for nth in range(1, int(copies.max()) + 1):
            due = index[copies >= nth]
            for start, batch in batches:
                ends = np.searchsorted(choice.rows[due], (start, start + batch.num_rows))
                here = due[ends[0] : ends[1]]
                if len(here):
                    table = complete_rows(batch, start, part, mine.at(here), schema)
                    writer.add(table, choice.tokens[here] if choice.tokens is not None else None)


def complete_rows(
    batch: pa.RecordBatch, start: int, part: Partition, choice: Choice, schema: pa.Schema
) -> pa.Table:
    """The rows of a choice, with the columns of the shards.

    Args:
        batch: a stretch of the file, as it is stored.
        start: number of its first row.
        part: the partition that the rows belong to.
        choice: (n,) examples in the stretch.
        schema: of `shard_schema`.
    """
    size = len(choice.rows)
    local = choice.rows - start
    rows = batch if size == batch.num_rows else batch.take(pa.array(local))
    added = {
        "curate_source": pa.repeat(pa.scalar(part.source), size),
        "curate_file": pa.repeat(pa.scalar(part.file), size),
        "curate_row": pa.array(choice.rows),
        "curate_weight": pa.array(choice.weights),
        "curate_domain": _domains(choice),
    }
    columns: list[Any] = []
    for field in schema:
        if field.name in added:
            columns.append(added[field.name])
        elif field.name in batch.schema.names:
            column = rows.column(field.name)
            columns.append(column if column.type == field.type else column.cast(field.type))
        else:
            columns.append(pa.nulls(size, field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def _domains(choice: Choice) -> Any:
    """(n,) the domain of each example."""
    codes = choice.domains
    if len(codes) and (codes == codes[0]).all():
        return pa.repeat(pa.scalar(choice.names[codes[0]], pa.string()), len(codes))
    places, codes = np.unique(codes, return_inverse=True)
    names = pa.array([choice.names[place] for place in places.tolist()], pa.string())
    return names.take(pa.array(codes))
