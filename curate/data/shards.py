"""Writes the shards of one group: reads each partition once and deals its rows out.

Rows of a component come in the order of the input. A row with several copies is repeated only
after the whole piece of rows that was read together, so that copies do not stand side by side.
Every file of a group is complete and on disk before the first one gets its name.
"""

from collections.abc import Mapping
from itertools import chain, count
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
_SHARED_BYTES = 64 << 20
"""So much is taken from the input before rows that wait for their row group are copied: they keep
all in memory that was taken with them, and a rare domain waits for long."""


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
            pieces, shared = count(1), 0
            for part, piece_rows in zip(group.partitions, group.piece_rows, strict=True):
                planned = read_phased(run, part, phasing, tokenizer=tokenizer)
                choice = weigh(planned, context.settings.weights, terms[part.name])
                for start in range(0, len(choice.rows), piece_rows):
                    piece = choice.at(slice(start, start + piece_rows))
                    shared += _deal(piece, part, payload=payload, writers=writers, schema=schema)
                    if shared >= _SHARED_BYTES:
                        for writer in writers.values():
                            writer.detach()
                        shared = 0
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
) -> int:
    """Read one piece of a partition and hand its rows to their components.

    Returns:
        Bytes of what was taken, which the writers share.
    """
    shares = {phase: _shares(choice, phase, writers) for phase in choice.copies}
    wanted = np.zeros(len(choice.rows), np.bool_)
    for _, places in chain.from_iterable(shares.values()):
        wanted[places] = True
    if not wanted.any():
        return 0
    taken = 0
    batches = payload.batches(part, choice.rows[wanted], batch_rows=len(choice.rows))
    for phase, mine in shares.items():
        if not mine:
            continue
        weighed, copies = choice.in_phase(phase), choice.copies[phase]
        parts: list[list[tuple[pa.Table, IntArray]]] = [[] for _ in mine]
        for start, batch in batches:
            here = [_inside(choice.rows, places, start, batch.num_rows) for _, places in mine]
            # Rows of all domains are taken at once: a call for each costs more than its rows.
            table = complete_rows(batch, start, part, weighed.at(np.concatenate(here)), schema)
            taken += table.get_total_buffer_size()
            ends = np.cumsum([len(places) for places in here]).tolist()
            for own, places, end in zip(parts, here, ends, strict=True):
                own.append((table.slice(end - len(places), len(places)), places))
        for (writer, _), own in zip(mine, parts, strict=True):
            most = max(int(copies[places].max(initial=0)) for _, places in own)
            for nth in range(1, most + 1):
                for table, places in own:
                    again = copies[places] >= nth
                    due = table if again.all() else table.filter(pa.array(again))
                    tokens = None if choice.tokens is None else choice.tokens[places[again]]
                    writer.add(due, tokens)
    return taken


_Share = tuple[ComponentWriter, IntArray]
"""What one component gets of a piece: rising places of the rows that it gets at least once."""


def _shares(
    choice: Choice, phase: int, writers: Mapping[Component, ComponentWriter]
) -> list[_Share]:
    kept = np.flatnonzero(choice.copies[phase])
    order = kept[np.argsort(choice.domains[kept], kind="stable")]
    ends = np.searchsorted(choice.domains[order], np.arange(len(choice.names) + 1))
    found = [
        (writers.get(Component(phase, name)), order[low:high])
        for name, low, high in zip(choice.names, ends[:-1], ends[1:], strict=True)
    ]
    return [(writer, places) for writer, places in found if writer is not None and len(places)]


def _inside(rows: IntArray, places: IntArray, start: int, size: int) -> IntArray:
    """The places whose rows lie in a stretch of the file."""
    low, high = np.searchsorted(rows[places], (start, start + size))
    return places[low:high]


def complete_rows(
    batch: pa.RecordBatch, start: int, part: Partition, choice: Choice, schema: pa.Schema
) -> pa.Table:
    """The rows of a choice, with the columns of the shards.

    Args:
        batch: a stretch of the file, as it is stored.
        start: number of its first row.
        part: the partition that the rows belong to.
        choice: (n,) examples in the stretch, none twice.
        schema: of `shard_schema`.
    """
    size = len(choice.rows)
    local = choice.rows - start
    is_all = size == batch.num_rows and bool((local[1:] > local[:-1]).all())
    rows = batch if is_all else batch.take(pa.array(local))
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
