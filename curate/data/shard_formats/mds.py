"""Shards of Mosaic Streaming (MDS), one stream for each domain.

mds/<domain>/shard.00000.mds, and beside them index.json

A shard is: the number of samples; where each begins, and the end of the last; the names of the
columns, as JSON; the samples. A sample is: the size of each column of varying size; the columns, in
the order of their names. All numbers are unsigned, of 32 bits, little-endian.

Source: https://docs.mosaicml.com/projects/streaming, format version 2.
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute

from curate.data.example import Source
from curate.data.kinds import item_kind, plain_kind, unwrapped
from curate.data.shard_formats.cells import (
    byte_cells,
    file_suffix,
    image_columns,
    image_parts,
    is_binary,
    number_cells,
)
from curate.data.shard_formats.json_text import json_cells
from curate.data.shard_formats.sink import Context
from curate.data.shard_layout import Shard
from curate.errors import CurateError

# The functions are made at import time, unseen by type checkers.
pc: Any = pyarrow.compute

_NUMBERS = {
    pa.uint8(): "uint8", pa.int8(): "int8", pa.uint16(): "uint16", pa.int16(): "int16",
    pa.float16(): "float16", pa.uint32(): "uint32", pa.int32(): "int32",
    pa.float32(): "float32", pa.uint64(): "uint64", pa.int64(): "int64",
    pa.float64(): "float64",
}  # fmt: skip
_U4 = np.dtype("<u4")
_LARGEST = 2**32 - 1


@dataclass(frozen=True, slots=True)
class _Column:
    """How one column of a shard is stored."""

    name: str
    encoding: str
    """Mosaic's name of it."""
    size: int | None
    """Of a value in bytes; None where it varies."""
    cells: Callable[[pa.Array], list[bytes]]


class _Sink:
    def __init__(self, path: Path, schema: pa.Schema, sources: Mapping[str, Source]) -> None:
        self._names = sorted(schema.names)
        self._schema = schema
        self._missing = set[str]()
        self._suffixes = {name: set[str]() for name in image_columns(schema, sources)}
        self._num_rows = 0
        self._file = path.open("wb")
        # Where a column has a null, and how many rows there are, is known only at the end; the
        # rows wait in a file without a name, so that memory does not grow.
        self._waiting = cast("BinaryIO", tempfile.TemporaryFile(dir=path.parent))  # noqa: SIM115
        self._writer = pa.ipc.new_stream(self._waiting, schema)

    def write(self, table: pa.Table) -> None:
        for name in self._names:
            column = table.column(name).combine_chunks()
            if name in self._suffixes:
                column, _ = image_parts(column)
                self._suffixes[name].update(file_suffix(cell[:16]) for cell in byte_cells(column))
            if _has_null(column):
                self._missing.add(name)
        self._num_rows += table.num_rows
        self._writer.write_table(table)

    def close(self) -> dict[str, Any]:
        self._writer.close()
        self._waiting.seek(0)
        columns = [
            _column(
                name,
                self._schema.field(name).type,
                has_null=name in self._missing,
                suffixes=self._suffixes.get(name),
            )
            for name in self._names
        ]
        facts = {
            "column_names": [column.name for column in columns],
            "column_encodings": [column.encoding for column in columns],
            "column_sizes": [column.size for column in columns],
        }
        header = json.dumps(_settings() | facts, sort_keys=True).encode()
        offsets = np.zeros(self._num_rows + 1, np.int64)
        start = 4 + 4 * len(offsets) + len(header)
        self._file.seek(start)
        at = 0
        with pa.ipc.open_stream(self._waiting) as stream:
            for batch in stream:
                samples = _samples(batch, columns)
                offsets[at + 1 : at + 1 + len(samples)] = [len(sample) for sample in samples]
                self._file.writelines(samples)
                at += len(samples)
        offsets = start + offsets.cumsum()
        if offsets[-1] > _LARGEST:
            raise CurateError(
                f"a shard of {offsets[-1]} bytes is larger than the format mds allows, 2^32",
                fix="set shards.size_mb to a smaller size; mds is not compressed",
            )
        self._file.seek(0)
        self._file.write(np.array([self._num_rows], _U4).tobytes())
        self._file.write(offsets.astype(_U4).tobytes() + header)
        self._file.close()
        self._waiting.close()
        return facts

    def discard(self) -> None:
        for file in (self._file, self._waiting):
            with suppress(OSError):
                file.close()


def _samples(batch: pa.RecordBatch, columns: Sequence[_Column]) -> list[bytes]:
    cells = [column.cells(batch.column(column.name)) for column in columns]
    sizes = [
        [len(cell) for cell in mine]
        for mine, column in zip(cells, columns, strict=True)
        if column.size is None
    ]
    width = 4 * len(sizes)
    heads = np.array(sizes, _U4).T.tobytes()
    starts = (heads[at : at + width] for at in range(0, len(heads), width))
    return [b"".join(parts) for parts in zip(starts, *cells, strict=True)]


def _column(name: str, kind: pa.DataType, *, has_null: bool, suffixes: set[str] | None) -> _Column:
    """The plainest encoding that keeps all values of a shard; JSON where none does."""
    kind = plain_kind(kind) or kind
    if has_null:
        return _Column(name, "json", None, json_cells)
    if suffixes is not None:
        # Readers open both by what is inside, whatever the name says.
        encoding = "bytes" if "bin" in suffixes else "jpeg" if suffixes == {"jpg"} else "png"
        return _Column(name, encoding, None, lambda array: byte_cells(image_parts(array)[0]))
    if kind in _NUMBERS:
        return _Column(name, _NUMBERS[kind], kind.bit_width // 8, number_cells)
    if pa.types.is_decimal(kind):
        return _Column(name, "str_decimal", None, _decimal_cells)
    if "string" in str(kind) and not pa.types.is_nested(kind):
        return _Column(name, "str", None, byte_cells)
    if is_binary(kind):
        return _Column(name, "bytes", None, byte_cells)
    if (item := plain_kind(item_kind(kind))) in _NUMBERS:
        return _Column(name, f"ndarray:{_NUMBERS[item]}", None, _array_cells)
    return _Column(name, "json", None, json_cells)


def _decimal_cells(array: pa.Array) -> list[bytes]:
    return byte_cells(unwrapped(array).cast(pa.string()))


def _array_cells(lists: pa.Array) -> list[bytes]:
    """Lists of numbers as arrays of one axis: its length, then the values."""
    lists = unwrapped(lists)
    values = unwrapped(lists.flatten()).to_numpy(zero_copy_only=False)
    raw, width = values.tobytes(), values.dtype.itemsize
    found: list[bytes] = []
    at = 0
    for length in pc.list_value_length(lists).to_pylist():
        end = at + length * width
        found.append(_axis(length) + raw[at:end])
        at = end
    return found


def _axis(length: int) -> bytes:
    """One axis, the type of its length, and the length."""
    size = next(code for code in range(4) if length < 1 << (8 << code))
    return bytes([1 << 2 | size]) + length.to_bytes(1 << size, "little")


def _has_null(column: pa.Array) -> bool:
    """Whether a value is missing; in lists of numbers, whether a number is."""
    column = unwrapped(column)
    if column.null_count:
        return True
    is_list = plain_kind(item_kind(column.type)) in _NUMBERS
    return is_list and unwrapped(column.flatten()).null_count > 0


def _settings() -> dict[str, Any]:
    return {"compression": None, "format": "mds", "hashes": ["xxh3_128"], "size_limit": None,
            "version": 2}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mds:
    """See `curate.data.shard_formats.sink.Format`."""

    pattern: str = r"mds/(?:[^/]+/){0,2}(?:shard\.\d{5,}\.mds|index\.json)"

    def files(self, shard: Shard) -> tuple[str, ...]:
        return (shard.path("mds", f"shard.{shard.number:05d}.mds"),)

    def open(self, paths: Sequence[Path], schema: pa.Schema, context: Context) -> _Sink:
        return _Sink(paths[0], schema, context.sources)

    def documents(self, shards: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        folders: dict[PurePosixPath, list[Mapping[str, Any]]] = {}
        for shard in shards:
            folders.setdefault(PurePosixPath(shard["file"]).parent, []).append(shard)
        found: dict[str, str] = {}
        for folder, mine in folders.items():
            mine.sort(key=lambda shard: (len(shard["file"]), shard["file"]))
            index = {"shards": [_entry(shard) for shard in mine], "version": 2}
            found[f"{folder}/index.json"] = json.dumps(index, sort_keys=True) + "\n"
        return found

    def count_rows(self, paths: Sequence[Path]) -> int:
        size = paths[0].stat().st_size
        with paths[0].open("rb") as file:
            rows = int.from_bytes(file.read(4), "little")
            stored = file.read(4 * (rows + 1)) if 4 * (rows + 2) <= size else b""
        offsets = np.frombuffer(stored, _U4).astype(np.int64)
        if len(offsets) < rows + 1 or offsets[-1] != size or (np.diff(offsets) < 0).any():
            raise OSError("its samples do not end where the file does")
        return rows


def _entry(shard: Mapping[str, Any]) -> dict[str, Any]:
    """A shard in index.json."""
    raw = {
        "basename": PurePosixPath(shard["file"]).name,
        "bytes": shard["bytes"],
        "hashes": {"xxh3_128": shard["digest"]},
    }
    return (
        _settings()
        | dict(shard["facts"])
        | {"raw_data": raw, "samples": shard["rows"], "zip_data": None}
    )


MDS = Mds()
