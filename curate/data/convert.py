"""Inputs that are not Parquet become Parquet, once per file, streaming."""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from curate.config import resolve
from curate.data.columns import PROBLEM
from curate.data.example import Source
from curate.data.files import fingerprint
from curate.data.formats import READERS, SETTINGS
from curate.data.layout import RunFolder
from curate.data.partitions import Output
from curate.data.pulse import beat
from curate.data.sources import InputFile
from curate.data.storage import is_damage

VERSION = 1
"""Of the readers: part of the fingerprint of every converted file."""

_GROUP_ROWS = 10_000
_GROUP_BYTES = 64 << 20
_DETAIL_CHARS = 300
_NAME_BYTES = 200
"""Longer file names are cut: file systems take 255 bytes."""


def converted(run: RunFolder, file: InputFile) -> Output:
    """Where a converted input is."""
    folder, slash, name = file.file.rpartition("/")
    encoded = name.encode()
    if len(encoded) > _NAME_BYTES:  # marks and temporary files add to it
        start = encoded[: _NAME_BYTES - 17].decode(errors="ignore")
        name = f"{start}-{xxhash.xxh3_64_hexdigest(encoded)}"
    return Output(run.converted / file.source / f"{folder}{slash}{name}.parquet")


def conversion_fingerprint(
    file: InputFile, source: Source, partition_rows: int | Literal["auto"]
) -> str:
    """Of all that the converted file depends on."""
    settings = {name: getattr(source, name) for name in SETTINGS[file.format]}
    if settings.get("separator", "") is None:  # files converted before there was one stay
        del settings["separator"]
    return fingerprint(
        stage="convert",
        version=VERSION,
        file=file.file,
        stamp=file.stamp,
        format=file.format,
        settings=settings,
        group_rows=_group_rows(partition_rows),
    )


def convert(file: InputFile, source: Source, output: Output, mark: str, *,
            partition_rows: int | Literal["auto"]) -> dict[str, Any]:  # fmt: skip
    """Write one input as Parquet, a row for each original row.

    A damaged input gives a file without rows, whose mark says `unreadable`.

    Args:
        file: the input.
        source: its settings.
        output: the converted file.
        mark: fingerprint for its mark.
        partition_rows: row groups are no longer than this.

    Returns:
        The mark.
    """
    reader = resolve(READERS, file.format, what="format")
    group_rows = _group_rows(partition_rows)
    try:
        return output.write(lambda path: _write(path, reader(file, source), group_rows), mark)
    except _DamagedError as error:
        detail = str(error)
    nothing = pa.table({PROBLEM: pa.array([], pa.string())})
    return output.write(lambda path: pq.write_table(nothing, path), mark, unreadable=detail)


def _group_rows(partition_rows: int | Literal["auto"]) -> int:
    return _GROUP_ROWS if partition_rows == "auto" else min(partition_rows, _GROUP_ROWS)


class _DamagedError(Exception):
    """The input's content is broken; told apart from errors of writing."""


def _guarded(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    try:
        yield from batches
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise
        raise _DamagedError(damage_detail(error)) from error


def damage_detail(error: BaseException) -> str:
    """What Arrow says of a broken file, on one short line."""
    return " ".join(str(error).split())[:_DETAIL_CHARS]


def _write(path: Path, batches: Iterable[pa.RecordBatch], group_rows: int) -> None:
    stream = _guarded(batches)
    first = next(stream, None)
    if first is None:
        pq.write_table(pa.table({PROBLEM: pa.array([], pa.string())}), path)
        return
    with pq.ParquetWriter(path, first.schema, compression="zstd", store_schema=True) as writer:
        for group in _groups(chain([first], stream), group_rows):
            writer.write_table(pa.Table.from_batches(group), row_group_size=group_rows)


def _groups(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[list[pa.RecordBatch]]:
    """Regroup batches to `rows` rows, or fewer where they are large."""
    group: list[pa.RecordBatch] = []
    count = size = 0
    for batch in batches:
        beat()
        while batch.num_rows:
            piece = batch.slice(0, rows - count)
            batch = batch.slice(piece.num_rows)
            group.append(piece)
            count += piece.num_rows
            size += piece.nbytes
            if count == rows or size >= _GROUP_BYTES:
                yield group
                group, count, size = [], 0, 0
    if group:
        yield group
