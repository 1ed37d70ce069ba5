"""Packed sequences: token ids in rows of one length, in Parquet.

packed/<domain>/train-00000-of-00024.parquet

The documents of a shard stand behind each other and are cut every `length` tokens. `labels` are
the ids, and -100 where no loss is to be taken: at the first token of a document, which has nothing
of its own before it, in prompts, in all of a chat but what the assistant says, and in the padding
that fills up the last sequence of a shard. `seq_lengths` are the stretches of a sequence that
belong to one document (the padding is one too), for trainers that keep documents from seeing each
other.

Labels double the size (1.2 bytes a token more, zstd): without them every trainer would need code of
its own, and one that has none would train on padding.

Shapes: S sequences, L their length, T = S * L tokens, P pieces of documents, D documents.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from curate.data.shard_formats.parquet import writer_options
from curate.data.shard_formats.sink import Context
from curate.data.shard_formats.tokenising import encoder_of, num_weighted
from curate.data.shard_layout import Shard

# The functions are made at import time, unseen by type checkers.
pc: Any = pyarrow.compute

IGNORED = -100
"""Label of a token that is not counted, as in torch."""


def packed_schema(length: int) -> pa.Schema:
    """Columns of the files."""
    return pa.schema(
        [
            pa.field("input_ids", pa.list_(pa.int32(), length)),
            pa.field("labels", pa.list_(pa.int32(), length)),
            pa.field("seq_lengths", pa.list_(pa.int32())),
            pa.field("num_tokens", pa.int32()),
            pa.field("num_documents", pa.int32()),
            pa.field("curate_domain", pa.string()),
        ]
    )


class _Buffer:
    """Tokens that wait until they fill a sequence, and the documents that they are of."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._names: dict[str, int] = {}
        self.ids = np.zeros(0, np.int32)
        self._labels = np.zeros(0, np.int32)
        self._begins = np.zeros(0, np.int64)
        """(D,) where each document begins; the first may have begun before the buffer."""
        self._domains = np.zeros(0, np.int64)
        """(D,) number of each one's domain in `_names`."""

    def add(
        self, ids: npt.NDArray[np.int32], counted: npt.NDArray[np.bool_],
        begins: npt.NDArray[np.int64], domains: pa.Array
    ) -> None:  # fmt: skip
        names = domains.dictionary_encode()
        codes = [self._names.setdefault(n, len(self._names)) for n in names.dictionary.to_pylist()]
        numbers = np.array(codes, dtype=np.int64)[names.indices.to_numpy()]
        self._begins = np.concatenate([self._begins, begins + len(self.ids)])
        self._domains = np.concatenate([self._domains, numbers])
        self.ids = np.concatenate([self.ids, ids])
        labels = np.where(counted, ids, np.int32(IGNORED))
        self._labels = np.concatenate([self._labels, labels])

    def take(self) -> pa.Table:
        """All sequences that are full."""
        total = len(self.ids) // self._length * self._length
        table = self._sequences(total, self._begins[self._begins < total], total)
        # The document that goes on behind the border, or begins there, stays.
        ended = (
            int((self._begins <= total).sum()) - 1 if len(self.ids) > total else len(self._begins)
        )
        self._begins, self._domains = self._begins[ended:] - total, self._domains[ended:]
        self.ids, self._labels = self.ids[total:], self._labels[total:]
        return table

    def fill(self, padding: int) -> pa.Table:
        """What is left, filled up."""
        used = len(self.ids)
        missing = -used % self._length
        self.ids = np.append(self.ids, np.full(missing, padding, np.int32))
        self._labels = np.append(self._labels, np.full(missing, IGNORED, np.int32))
        borders = np.append(self._begins, used) if missing else self._begins
        return self._sequences(used + missing, borders, used)

    def _sequences(self, total: int, borders: npt.NDArray[np.int64], used: int) -> pa.Table:
        """The first `total` tokens, of which `used` are no padding.

        Args:
            total: a multiple of the length.
            borders: where documents, and the padding, begin.
            used: at most `total`.
        """
        length, count = self._length, total // self._length
        cuts = np.arange(0, total, length)
        begins = np.union1d(cuts, borders[borders >= 0])  # (P,)
        offsets = np.searchsorted(begins, np.append(cuts, total))  # (S + 1,)
        # The padding counts to the domain before it, so that it does not mix domains.
        owner = np.searchsorted(self._begins, begins, side="right") - 1
        started = self._begins[(self._begins >= 0) & (self._begins < used)]
        columns = [
            _fixed(self.ids[:total], length),
            _fixed(self._labels[:total], length),
            pa.ListArray.from_arrays(
                pa.array(offsets, pa.int32()), pa.array(np.diff(begins, append=total), pa.int32())
            ),
            pa.array(np.minimum(length, used - cuts), pa.int32()),
            pa.array(np.bincount(started // length, minlength=count)[:count], pa.int32()),
            self._domain_names(self._domains[owner], offsets[:-1]),
        ]
        return pa.Table.from_arrays(columns, schema=packed_schema(length))

    def _domain_names(
        self, domains: npt.NDArray[np.int64], firsts: npt.NDArray[np.int64]
    ) -> pa.Array:
        """Domain of each sequence; null where it holds several."""
        if not len(firsts):
            return pa.array([], pa.string())
        lowest, highest = (f.reduceat(domains, firsts) for f in (np.minimum, np.maximum))
        names = pa.array(list(self._names), pa.string())
        return names.take(pa.array(lowest, mask=lowest != highest))


class _Sink:
    def __init__(self, path: Path, context: Context) -> None:
        self._encoder = encoder_of(context)
        self._sources = context.sources
        length = context.settings.packing.length
        self._buffer = _Buffer(length)
        schema = packed_schema(length)
        self._due = schema.empty_table()
        self._facts: dict[str, Any] = {"sequences": 0, "tokens": 0, "padding": 0, "weighted": 0}
        # Ids hardly repeat within a page: a dictionary of them only adds to their size.
        options = writer_options(context.settings)
        options["use_dictionary"] = ["curate_domain"]
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pq.ParquetWriter(self._file, schema, **options)

    def write(self, table: pa.Table) -> None:
        found = self._encoder.encode(table, self._sources, marks=True)
        domains = table["curate_domain"].combine_chunks()
        self._buffer.add(found.ids, found.counted, found.starts[:-1], domains)
        self._facts["weighted"] += num_weighted(table)
        self._flush()
        self._due = self._buffer.take()

    def close(self) -> dict[str, Any]:
        # The filled-up sequence goes with those before it: no row group of a single row.
        rest = self._buffer.fill(self._encoder.special.padding)
        self._due = pa.concat_tables([self._due, rest]).combine_chunks()
        self._flush()
        self._writer.close()
        self._file.close()
        return self._facts

    def discard(self) -> None:
        # pyarrow would try to write the footer, and fail again, when it is collected.
        self._writer.is_open = False
        with suppress(OSError):
            self._file.close()

    def _flush(self) -> None:
        if not self._due.num_rows:
            return
        tokens = int(pc.sum(self._due["num_tokens"]).as_py())
        length = self._due.schema.field("input_ids").type.list_size
        self._facts["sequences"] += self._due.num_rows
        self._facts["tokens"] += tokens
        self._facts["padding"] += self._due.num_rows * length - tokens
        self._writer.write_table(self._due, row_group_size=self._due.num_rows)


@dataclass(frozen=True, slots=True)
class Packed:
    """See `curate.data.shard_formats.sink.Format`."""

    pattern: str = r"packed/(?:[^/]+/){0,2}train-\d{5,}-of-\d{5,}\.parquet"

    def files(self, shard: Shard) -> tuple[str, ...]:
        return (shard.path("packed", f"{shard.stem}.parquet"),)

    def open(self, paths: Sequence[Path], schema: pa.Schema, context: Context) -> _Sink:
        del schema
        return _Sink(paths[0], context)

    def documents(self, shards: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        del shards
        return {}

    def count_rows(self, paths: Sequence[Path]) -> int:
        """Documents, by where they begin."""
        counts = pq.read_table(paths[0], columns=["num_documents"])["num_documents"]
        return int(pc.sum(counts).as_py() or 0)


PACKED = Packed()


def _fixed(values: npt.NDArray[np.int32], length: int) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values), length)
