"""Puts the rows of the shards into another order than the input's, in two passes over the disk.

The first pass reads every partition once and deals its rows to the buckets of the line; what is
dealt lies in one file per task, as small Arrow streams, each of rows of one bucket, with a table of
them at the end. The second pass gathers a bucket at a time from all these files, puts its rows in
their exact places, and writes the shards. Neither pass knows more than it holds: a piece of the
input, or one bucket. On disk the kept rows lie once more while this goes on, in lz4.

Shapes: N rows of a piece or a bucket, C chunks of a file.
"""

import io
import struct
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from curate.data.choice import Choice, IntArray
from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.data.payload import Payload
from curate.data.shard_curriculum import Phasing, read_phased
from curate.data.shard_formats.sink import Context
from curate.data.shard_layout import Component
from curate.data.shard_line import Deal, Places, Stretch
from curate.data.shard_weights import Terms, Way, weigh
from curate.data.shard_writer import ComponentWriter
from curate.data.shards import complete_rows
from curate.errors import CurateError

_HELD_BYTES = 48 << 20
"""Of the input, before it is dealt."""

_MAGIC = b"dealt\x00\x00\x01"
_ENTRY = 4
"""Bucket, first byte, size and digest of a chunk."""
_LZ4 = pa.ipc.IpcWriteOptions(compression="lz4")


# -- the first pass -------------------------------------------------------------------------------


def deal_rows(
    run: RunFolder,
    deal: Deal,
    places: Places,
    target: Path,
    *,
    way: Way,
    terms: Mapping[str, Terms],
    schema: pa.Schema,
    tokenizer: str | None,
    phasing: Phasing | None = None,
) -> int:
    """Deal the rows of some partitions to the buckets of the line.

    Args:
        run: the run folder.
        deal: the partitions, and where the numbers of their rows begin.
        places: of the line.
        target: file to write.
        way: how weights reach the trainer.
        terms: name of a partition -> what its weights need to know of the others.
        schema: of the shards.
        tokenizer: digest of the tokenizer whose counts go with the rows; None counts nothing.
        phasing: of a curriculum.

    Returns:
        How many rows were dealt, copies counted.

    Raises:
        CurateError: plan and index disagree.
        InputError: an input file is gone.
        OSError: the file could not be written.
    """
    placer = places.placer()
    starts = np.array(deal.starts, dtype=np.int64)
    with target.open("wb") as file, Payload(run) as payload:
        out = _Dealt(file, schema, np.array(places.cuts, dtype=np.int64))
        for part, piece_rows in zip(deal.partitions, deal.piece_rows, strict=True):
            planned = read_phased(run, part, phasing, tokenizer=tokenizer)
            choice = weigh(planned, way, terms[part.name])
            for start in range(0, len(choice.rows), piece_rows):
                piece = choice.at(slice(start, start + piece_rows))
                component, nth, weights = _repeated(piece, placer.index)
                if len(nth):
                    place = placer.places(component, _numbers(component, starts))
                    table, local = _read(piece, part, payload, schema, piece_rows)
                    tokens = piece.tokens[nth] if piece.tokens is not None else np.zeros_like(nth)
                    out.add(table, local[nth], place, tokens, weights)
                pa.default_memory_pool().release_unused()
        return out.close()


def _repeated(
    choice: Choice, index: Mapping[Component, int]
) -> tuple[IntArray, IntArray, npt.NDArray[np.float32]]:
    """Component, place in the choice, and weight of every row that is written; copies follow."""
    components, nths, weights = list[IntArray](), list[IntArray](), list[Any]()
    for phase, copies in choice.copies.items():
        # Domains without a row in the phase have no component; their copies are zeros.
        known = np.array([index.get(Component(phase, name), -1) for name in choice.names])
        nth = np.repeat(np.arange(len(choice.rows)), copies)
        nths.append(nth)
        components.append(known[choice.domains[nth]])
        weights.append(choice.in_phase(phase).weights[nth])
    return np.concatenate(components), np.concatenate(nths), np.concatenate(weights)


def _numbers(component: IntArray, starts: IntArray) -> IntArray:
    """(N,) numbers of rows within their components; `starts` moves on to the next piece."""
    order = np.argsort(component, kind="stable")
    counts = np.bincount(component, minlength=len(starts))
    firsts = np.repeat(np.cumsum(counts) - counts, counts)
    numbers = np.empty_like(component)
    numbers[order] = np.arange(len(component)) - firsts
    numbers += starts[component]
    starts += counts
    return numbers


def _read(
    choice: Choice, part: Partition, payload: Payload, schema: pa.Schema, batch_rows: int
) -> tuple[pa.Table, IntArray]:
    """The rows of a piece that are written, once each, and (N,) where each of the piece stands."""
    wanted = np.zeros(len(choice.rows), dtype=bool)
    for copies in choice.copies.values():
        wanted |= copies > 0
    mine = choice.at(np.flatnonzero(wanted))
    tables: list[pa.Table] = []
    for start, batch in payload.batches(part, mine.rows, batch_rows=batch_rows):
        low, high = np.searchsorted(mine.rows, [start, start + batch.num_rows])
        tables.append(complete_rows(batch, start, part, mine.at(slice(low, high)), schema))
    return pa.concat_tables(tables), np.cumsum(wanted) - 1


class _Dealt:
    """The file of one task of the first pass, while it is written."""

    def __init__(self, file: BinaryIO, schema: pa.Schema, cuts: IntArray) -> None:
        self._file, self._schema, self._cuts = file, schema, cuts
        self._tables: list[pa.Table] = []
        self._rows: list[tuple[IntArray, IntArray, IntArray, npt.NDArray[np.float32]]] = []
        self._num_rows = self._size_bytes = self._written = 0
        self._chunks: list[tuple[int, int, int, int]] = []

    def add(
        self,
        table: pa.Table,
        local: IntArray,
        place: IntArray,
        tokens: IntArray,
        weights: npt.NDArray[np.float32],
    ) -> None:
        """Take a piece in.

        Args:
            table: its different rows.
            local: (N,) for each row that is written, where it stands in the table.
            place: (N,) on the line.
            tokens: (N,) of each.
            weights: (N,) of each.
        """
        self._tables.append(table)
        self._rows.append((local + self._num_rows, place, tokens, weights))
        self._num_rows += table.num_rows
        self._size_bytes += table.nbytes
        if self._size_bytes >= _HELD_BYTES:
            self._flush()

    def close(self) -> int:
        """Write the table of chunks; returns how many rows there are."""
        self._flush()
        chunks = np.array(self._chunks, dtype=np.uint64).reshape(-1, _ENTRY)
        self._file.write(chunks.tobytes())
        self._file.write(struct.pack("<Q", len(chunks)) + _MAGIC)
        return self._written

    def _flush(self) -> None:
        if not self._tables:
            return
        table = _stored(pa.concat_tables(self._tables)).combine_chunks()
        local, place, tokens, weights = (
            np.concatenate(each) for each in zip(*self._rows, strict=True)
        )
        self._tables, self._rows, self._num_rows, self._size_bytes = [], [], 0, 0
        bucket = np.searchsorted(self._cuts, place, side="right") - 1
        order = np.argsort(bucket, kind="stable")
        found, firsts = np.unique(bucket[order], return_index=True)
        for number, mine in zip(found.tolist(), np.split(order, firsts[1:]), strict=True):
            rows = table.take(pa.array(local[mine]))
            at = rows.schema.get_field_index("curate_weight")
            rows = rows.set_column(at, rows.schema.field(at), pa.array(weights[mine]))
            columns = [*rows.columns, pa.array(place[mine]), pa.array(tokens[mine])]
            self._write(number, pa.Table.from_arrays(columns, names=_numbered(len(columns))))
            self._written += len(mine)

    def _write(self, bucket: int, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema, options=_LZ4) as writer:
            writer.write_table(table)
        content = sink.getvalue()
        digest = xxhash.xxh3_64_intdigest(content)
        self._chunks.append((bucket, self._file.tell(), content.size, digest))
        self._file.write(content)


def _numbered(count: int) -> list[str]:
    """Names of columns that cannot meet the user's: the schema of the shards is kept elsewhere."""
    return [str(nth) for nth in range(count)]


def _stored(table: pa.Table) -> pa.Table:
    """Dictionaries spelt out: a chunk of ten rows would carry all the words of its piece."""
    for at, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            plain = table.column(at).cast(field.type.value_type)
            table = table.set_column(at, field.name, plain)
    return table


# -- the second pass ------------------------------------------------------------------------------


def write_stretch(
    run: RunFolder,
    stretch: Stretch,
    dealt: Sequence[Path],
    *,
    first_bucket: int,
    schema: pa.Schema,
    context: Context,
    tokenizer: str | None,
) -> list[dict[str, Any]]:
    """Write consecutive shards from what the first pass has dealt.

    Args:
        run: the run folder.
        stretch: the shards, and where their buckets lie on the line.
        dealt: files of the first pass, all of them.
        first_bucket: number of the first bucket.
        schema: of the shards.
        context: formats, codec and what they need to know.
        tokenizer: digest of the tokenizer whose counts are summed up; None counts nothing.

    Returns:
        The receipts of `ComponentWriter.publish`.

    Raises:
        OutputError: the disk is full or read-only.
        CurateError: one file could not be written, and is named; or what was dealt is damaged.
    """
    writer = ComponentWriter(run.shards, stretch.shards, schema, context)
    try:
        num_buckets = len(stretch.cuts) - 1
        chunks = [
            (path, entry)
            for path in dealt
            for entry in _chunks(path, first_bucket, first_bucket + num_buckets)
        ]
        for nth in range(num_buckets):
            mine = [chunk for chunk in chunks if chunk[1][0] == first_bucket + nth]
            table, tokens = _gather(mine, stretch.cuts[nth], stretch.cuts[nth + 1], schema)
            writer.add(table, tokens if tokenizer is not None else None)
            del table
            pa.default_memory_pool().release_unused()
        return writer.publish()
    finally:
        writer.discard()


def _chunks(path: Path, first: int, last: int) -> list[tuple[int, ...]]:
    """Chunks of the buckets from `first` on, before `last`: bucket, first byte, size, digest."""
    tail = 8 + len(_MAGIC)
    with _reading(path) as file:
        file.seek(-tail, io.SEEK_END)
        count, magic = struct.unpack("<Q8s", file.read(tail))
        if magic != _MAGIC:
            raise _damaged(path)
        size = count * _ENTRY * 8
        file.seek(-tail - size, io.SEEK_END)
        table = np.frombuffer(file.read(size), dtype=np.uint64).reshape(count, _ENTRY)
    mine = table[(table[:, 0] >= first) & (table[:, 0] < last)]
    return [tuple(entry) for entry in mine.tolist()]


def _gather(
    chunks: Sequence[tuple[Path, tuple[int, ...]]], first: int, last: int, schema: pa.Schema
) -> tuple[pa.Table, IntArray]:
    """The rows of the line from `first` on, before `last`, with their tokens."""
    tables: list[pa.Table] = []
    for path, (_, start, size, digest) in chunks:
        with _reading(path) as file:
            file.seek(start)
            content = file.read(size)
        if xxhash.xxh3_64_intdigest(content) != digest:
            raise _damaged(path)
        with pa.ipc.open_stream(content) as reader:
            tables.append(reader.read_all())
    table = pa.concat_tables(tables).combine_chunks()
    place = table.column(table.num_columns - 2).to_numpy()
    order = np.argsort(place)
    assert np.array_equal(place[order], np.arange(first, last)), (
        "the plan changed while it was dealt"
    )
    table = table.take(pa.array(order))
    tokens = table.column(table.num_columns - 1).to_numpy()
    columns = [_typed(table.column(at), field.type) for at, field in enumerate(schema)]
    return pa.Table.from_arrays(columns, schema=schema), tokens


def _typed(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """Back to a dictionary, where the shards have one."""
    return column.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else column


@contextmanager
def _reading(path: Path) -> Generator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except (OSError, struct.error) as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> CurateError:
    return CurateError(
        f"{path} is damaged", fix="remove the folder it lies in, then run the same command again"
    )
