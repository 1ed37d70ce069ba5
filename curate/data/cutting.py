"""Cutting Parquet files into partitions, by their footers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from curate.data.partitions import Partition, partition_name
from curate.data.stored import open_stored

_TOLERANCE = 1.5
_PARTITION_BYTES = 256 << 20

LEAST_ROWS = 10_000
"""Of a partition whose length is `auto`, or all of its file."""
_MOST_ROWS = 50_000
_AUTO_BYTES = 32 << 20
_AUTO_PARTITIONS = 16


@dataclass(frozen=True, slots=True)
class Group:
    """A row group: its length, and its size when decoded."""

    num_rows: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Footer:
    """What the end of a Parquet file says."""

    schema: pa.Schema
    groups: tuple[Group, ...]

    @property
    def num_rows(self) -> int:
        return sum(group.num_rows for group in self.groups)


def read_footer(address: str, stamp: str) -> Footer:
    """Schema and row groups of a Parquet file; errors as `curate.data.stored.open_stored`."""
    file = open_stored(address, stamp)
    try:
        metadata = file.parquet.metadata
        found = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        groups = tuple(Group(group.num_rows, group.total_byte_size) for group in found)
        return Footer(file.parquet.schema_arrow, groups)
    finally:
        file.close()


def cut(source: str, file: str, address: str, stamp: str, footer: Footer, *,
        partition_rows: int | Literal["auto"]) -> list[Partition]:  # fmt: skip
    """The partitions of a file, in order.

    Row groups are joined up to `partition_rows`; one that is more than one and a half times as
    long, or very large, is cut into equal ranges of rows. What `auto` is depends on the file
    alone, so that new files leave the partitions of others as they are.
    """
    if partition_rows == "auto":
        partition_rows = _rows_for(footer)
    partitions: list[Partition] = []
    first = 0
    for count in _lengths(footer.groups, partition_rows):
        name = partition_name(source, file, len(partitions))
        partitions.append(
            Partition(
                name=name,
                source=source,
                file=file,
                address=address,
                first_row=first,
                num_rows=count,
                stamp=stamp,
            )
        )
        first += count
    return partitions


def _rows_for(footer: Footer) -> int:
    """Rows of a partition: more for a large file, where each costs as much as it holds."""
    size = sum(group.size_bytes for group in footer.groups)
    fitting = footer.num_rows * _AUTO_BYTES // max(1, size)
    return max(LEAST_ROWS, min(_MOST_ROWS, footer.num_rows // _AUTO_PARTITIONS, fitting))


def _lengths(groups: Sequence[Group], partition_rows: int) -> list[int]:
    lengths: list[int] = []
    rows = size = 0
    for group in groups:
        share = max(group.num_rows / partition_rows, group.size_bytes / _PARTITION_BYTES)
        if rows and (
            rows + group.num_rows > partition_rows or size + group.size_bytes > _PARTITION_BYTES
        ):
            lengths.append(rows)
            rows = size = 0
        if share > _TOLERANCE:
            lengths += _equal_parts(group.num_rows, -int(-share // 1))
        else:
            rows += group.num_rows
            size += group.size_bytes
    return [length for length in [*lengths, rows] if length]


def _equal_parts(rows: int, parts: int) -> list[int]:
    parts = min(parts, rows)
    return [rows * (at + 1) // parts - rows * at // parts for at in range(parts)]
