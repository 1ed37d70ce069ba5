"""Rows of two tables, brought together by a hash, whatever their number.

Up to a limit they stay in memory. Beyond it they are dealt into files by the first bits of the
hash, so that equal hashes meet in one bucket and only one bucket is in memory at a time.
"""

from collections.abc import Iterator
from pathlib import Path

import polars as pl

from curate.data.example import KEY

_BITS = 8
_MOST_ROWS = 500_000


class Buckets:
    """Takes rows of a left and of a right table; gives them back, equal hashes together.

    Args:
        folder: for the files, if there have to be any; empty, and the caller's to remove.
        column: of the hash, UInt64.
        schema: of the left table and of the right one.
        most_rows: kept in memory, of both together.
    """

    def __init__(
        self,
        folder: Path,
        column: str,
        schema: tuple[pl.Schema, pl.Schema],
        *,
        most_rows: int = _MOST_ROWS,
    ) -> None:
        self._folder, self._column, self._schema, self._most = folder, column, schema, most_rows
        self._held: tuple[list[pl.DataFrame], list[pl.DataFrame]] = ([], [])
        self._rows = self._flushes = 0

    def add(self, side: int, frame: pl.DataFrame) -> None:
        """Take rows in; 0 is the left table, 1 the right one."""
        if frame.height:
            self._held[side].append(frame.select(self._schema[side].names()))
            self._rows += frame.height
        if self._rows > self._most:
            self._flush()

    def __iter__(self) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
        """Bucket by bucket; within one, the rows of a table in the order in which they came."""
        if not self._flushes:
            if self._rows:
                yield self._together(0, self._held[0]), self._together(1, self._held[1])
            return
        self._flush()
        for bucket in range(1 << _BITS):
            paths = [sorted(self._folder.glob(f"{bucket:03d}-{side}-*")) for side in (0, 1)]
            if paths[0] or paths[1]:
                left, right = (
                    self._together(side, [pl.read_ipc(path) for path in found])
                    for side, found in enumerate(paths)
                )
                yield left, right

    def _together(self, side: int, frames: list[pl.DataFrame]) -> pl.DataFrame:
        return pl.concat([self._schema[side].to_frame(), *frames])

    def _flush(self) -> None:
        for side in (0, 1):
            if not self._held[side]:
                continue
            frame = self._together(side, self._held[side])
            bucket_of = pl.col(self._column) // (1 << (64 - _BITS))
            dealt = frame.with_columns(bucket_of.alias("")).partition_by(
                "", as_dict=True, include_key=False
            )
            for (bucket,), rows in dealt.items():
                rows.write_ipc(self._folder / f"{bucket:03d}-{side}-{self._flushes:06d}")
            self._held[side].clear()
        self._rows, self._flushes = 0, self._flushes + 1


def key_hash() -> pl.Expr:
    """UInt64 hash of an example's key."""
    return pl.concat_str(*KEY, separator="\0").hash()
