"""Writes the shards of one group: reads each partition once and deals its rows out.

Rows of a component come in the order of the input. A row with several copies is repeated only
after the whole piece of rows that was read together, so that copies do not stand side by side.
Every file of a group is complete and on disk before the first one gets its name.
"""

import errno
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curate.data.choice import Choice, IntArray, read_choice
from curate.data.files import digest_file, publish, temporary_for
from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.data.payload import Payload
from curate.data.shard_layout import Component, Group, Shard
from curate.data.shard_settings import Shards
from curate.errors import CurateError, OutputError

# The next file would meet the same end.
_HOPELESS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


def writer_options(settings: Shards) -> dict[str, Any]:
    """Keyword arguments of `pyarrow.parquet.ParquetWriter`."""
    options: dict[str, Any] = {
        "compression": settings.compression,
        "compression_level": settings.compression_level,
        "write_page_index": True,
    }
    if int(pa.__version__.split(".")[0]) >= 21:
        # Pages are cut where the content says, so that a store that keeps equal chunks once
        # takes in only what a new plan changed.
        options["use_content_defined_chunking"] = True
    return options


def write_group(
    run: RunFolder, group: Group, *, schema: pa.Schema, settings: Shards, tokenizer: str | None
) -> list[dict[str, Any]]:
    """Write all shards of a group.

    Args:
        run: the run folder.
        group: partitions to read and shards to make of them.
        schema: of `shard_schema`.
        settings: codec and level.
        tokenizer: digest of the tokenizer whose counts are summed up; None counts nothing.

    Returns:
        For each shard its file, domain, phase, rows, tokens, bytes and digest.

    Raises:
        OutputError: the disk is full or read-only.
        CurateError: one file could not be written, and is named; or plan and index disagree.
        InputError: an input file is gone.
    """
    by_component: dict[Component, list[Shard]] = {}
    for shard in group.shards:
        by_component.setdefault(shard.component, []).append(shard)
    options = writer_options(settings)
    writers = {
        component: _Writer(run.shards, mine, schema, options)
        for component, mine in by_component.items()
    }
    try:
        with Payload(run) as payload:
            for part, piece_rows in zip(group.partitions, group.piece_rows, strict=True):
                choice = read_choice(run, part, tokenizer=tokenizer)
                for start in range(0, len(choice.rows), piece_rows):
                    piece = choice.at(slice(start, start + piece_rows))
                    _deal(piece, part, payload=payload, writers=writers, schema=schema)
                    # Otherwise the allocator keeps about as much again as is in use.
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
    writers: Mapping[Component, "_Writer"],
    schema: pa.Schema,
) -> None:
    """Read one piece of a partition and hand its rows to their components."""
    wanted = np.zeros(len(choice.rows), dtype=bool)
    shares: list[tuple[_Writer, IntArray]] = []
    for component in choice.components():
        if writer := writers.get(component):
            copies = choice.copies_of(component)
            shares.append((writer, copies))
            wanted |= copies > 0
    if not wanted.any():
        return
    batches = payload.batches(part, choice.rows[wanted], batch_rows=len(choice.rows))
    for writer, copies in shares:
        for nth in range(1, int(copies.max()) + 1):
            for start, batch in batches:
                inside = (choice.rows >= start) & (choice.rows < start + batch.num_rows)
                index = np.flatnonzero((copies >= nth) & inside)
                if len(index):
                    table = complete_rows(batch, start, part, choice.at(index), schema)
                    writer.add(table, choice.tokens[index] if choice.tokens is not None else None)


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
    names = pa.DictionaryArray.from_arrays(
        pa.array(choice.domains, pa.int32()), pa.array(choice.names, pa.string())
    )
    added = {
        "curate_source": pa.repeat(pa.scalar(part.source), size),
        "curate_file": pa.repeat(pa.scalar(part.file), size),
        "curate_row": pa.array(choice.rows),
        "curate_weight": pa.array(choice.weights),
        "curate_domain": names.cast(pa.string()),
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


class _Writer:
    """Writes the shards of one component in a group, one after the other."""

    def __init__(
        self, root: Path, shards: Sequence[Shard], schema: pa.Schema, options: Mapping[str, Any]
    ) -> None:
        self._root, self._schema, self._options = root, schema, options
        self._shards = shards
        self._due = [(shard, rows) for shard in shards for rows in shard.row_groups][::-1]
        self._tokens = dict.fromkeys((shard.file for shard in shards), 0)
        self._buffer: list[pa.Table] = []
        self._sink: Any = None
        self._open: pq.ParquetWriter | None = None

    def add(self, table: pa.Table, tokens: IntArray | None) -> None:
        """Take rows in; whole row groups go to the file."""
        at = 0
        while at < table.num_rows:
            shard, size = self._due[-1]
            room = size - sum(part.num_rows for part in self._buffer)
            self._buffer.append(table.slice(at, room))
            if tokens is not None:
                self._tokens[shard.file] += int(tokens[at : at + room].sum())
            if table.num_rows - at >= room:
                with _naming(self._root / shard.file):
                    self._flush(shard)
            at += room

    def publish(self) -> list[dict[str, Any]]:
        """Give every file its name; returns what to know of each."""
        assert not self._due, "the plan changed while it was written"
        receipts: list[dict[str, Any]] = []
        for shard in self._shards:
            target = self._root / shard.file
            with _naming(target):
                publish(temporary_for(target), target)
                receipts.append(
                    {
                        "file": shard.file,
                        "domain": shard.component.domain,
                        "phase": shard.component.phase,
                        "rows": shard.num_rows,
                        "tokens": self._tokens[shard.file],
                        "bytes": target.stat().st_size,
                        "digest": digest_file(target),
                    }
                )
        return receipts

    def discard(self) -> None:
        """Remove what has no name yet; after `publish` there is nothing left to remove."""
        self._buffer = []
        if self._open is not None:
            # pyarrow would try to write the footer, and fail again, when it is collected.
            self._open.is_open = False
            self._open = None
        if self._sink is not None:
            with suppress(OSError):
                self._sink.close()
            self._sink = None
        for shard in self._shards:
            with suppress(OSError):
                temporary_for(self._root / shard.file).unlink(missing_ok=True)

    def _flush(self, shard: Shard) -> None:
        if self._open is None:
            temporary = temporary_for(self._root / shard.file)
            temporary.parent.mkdir(parents=True, exist_ok=True)
            self._sink = pa.OSFile(str(temporary), "wb")
            self._open = pq.ParquetWriter(self._sink, self._schema, **self._options)
        # One array per column: how the rows were read must not show in the bytes.
        table = pa.concat_tables(self._buffer).unify_dictionaries().combine_chunks()
        self._buffer = []
        self._open.write_table(table, row_group_size=table.num_rows)
        self._due.pop()
        if not self._due or self._due[-1][0] is not shard:
            self._open.close()
            self._sink.close()
            self._open = self._sink = None


@contextmanager
def _naming(target: Path) -> Generator[None]:
    """Says which file could not be written, and whether others still can."""
    try:
        yield
    except OSError as error:
        what = f"shard {target} could not be written: {error.strerror or error}"
        if error.errno in _HOPELESS:
            raise OutputError(
                what,
                fix="free some space, then run the same command again; what is finished is kept",
            ) from error
        raise CurateError(
            what, fix="remove what is in its way, then run the same command again"
        ) from error
