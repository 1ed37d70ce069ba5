"""WebDataset: tar files in which the files of one example share a key.

webdataset/<domain>/train-00000-of-00024.tar, with <key>.txt, <key>.json and images for each row
"""

import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute

from curate.data.example import Source
from curate.data.shard_formats.cells import byte_cells, file_suffix, image_columns, image_parts
from curate.data.shard_formats.json_text import json_lines
from curate.data.shard_formats.sink import Context
from curate.data.shard_layout import Shard

# The functions are made at import time, unseen by type checkers.
pc: Any = pyarrow.compute

Members = list[tuple[bytes, bytes]]
"""(suffix, content) of the files of one example."""

_NUMBER = re.compile(r"\.?train-(\d+)-of-")
_BLOCK = 512
_RECORD = 20 * _BLOCK
"""An archive is a whole number of these."""
_SIZE, _SUM, _MAGIC = 124, 148, 257


def _template() -> bytes:
    """Header of a file without name, size and checksum; no time, no owner."""
    info = tarfile.TarInfo("x")
    raw = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    raw[0] = 0
    raw[_SIZE : _SIZE + 12] = bytes(12)
    raw[_SUM : _SUM + 8] = b" " * 8
    return bytes(raw)


_TEMPLATE = _template()
_TEMPLATE_SUM = sum(_TEMPLATE)


class _Sink:
    def __init__(self, path: Path, sources: Mapping[str, Source]) -> None:
        found = _NUMBER.match(path.name)
        assert found is not None, f"{path.name} is no name of a shard"
        self._shard = found[1]
        self._sources = sources
        self._num_rows = 0
        self._file = path.open("wb")

    def write(self, table: pa.Table) -> None:
        for members in _examples(table, self._sources):
            key = f"{self._shard}-{self._num_rows:08d}.".encode()
            for suffix, content in members:
                padding = bytes(-len(content) % _BLOCK)
                self._file.writelines((_header(key + suffix, len(content)), content, padding))
            self._num_rows += 1

    def close(self) -> dict[str, Any]:
        end = self._file.tell() + 2 * _BLOCK
        self._file.write(bytes(2 * _BLOCK + -end % _RECORD))
        self._file.close()
        return {}

    def discard(self) -> None:
        with suppress(OSError):
            self._file.close()


def _header(name: bytes, size: int) -> bytes:
    """POSIX header of one file; `tarfile` takes ten times as long."""
    assert len(name) < 100, "the name of a file is longer than its header holds"
    digits = b"%011o\0" % size
    checksum = b"%06o\0 " % (_TEMPLATE_SUM + sum(name) + sum(digits))
    return b"".join(
        (
            name.ljust(100, b"\0"),
            _TEMPLATE[100:_SIZE],
            digits,
            _TEMPLATE[_SIZE + 12 : _SUM],
            checksum,
            _TEMPLATE[_SUM + 8 :],
        )
    )


def _examples(table: pa.Table, sources: Mapping[str, Source]) -> list[Members]:
    """The files of each row; the column that is the text depends on the row's source."""
    names = table.column("curate_source").to_pylist()
    images = image_columns(table.schema, sources)
    texts = {name: sources[name].text if name in sources else None for name in set(names)}
    wanted = [texts[name] for name in names]
    kinds = dict.fromkeys(wanted)
    if len(kinds) == 1:
        return _encoded(table, wanted[0], images)
    found: list[Members] = [[] for _ in names]
    for text in kinds:
        rows = np.array([at for at, mine in enumerate(wanted) if mine == text])
        for at, members in zip(
            rows.tolist(), _encoded(table.take(rows), text, images), strict=True
        ):
            found[at] = members
    return found


def _encoded(table: pa.Table, text: str | None, images: Sequence[str]) -> list[Members]:
    """The files of each row: the text, the images, everything else as JSON."""
    files: list[list[tuple[bytes, bytes] | None]] = []
    others = table
    if text in table.column_names and text not in images:
        column = table.column(text).combine_chunks()
        cells = [(b"txt", cell) for cell in byte_cells(column)]
        files.append(_present(cells, column))
        others = others.drop_columns([text])
    for name, prefix in zip(images, _prefixes(images), strict=True):
        content, path = image_parts(table.column(name).combine_chunks())
        cells = [(prefix + file_suffix(cell).encode(), cell) for cell in byte_cells(content)]
        files.append(_present(cells, content))
        if path is None:
            others = others.drop_columns([name])
            continue
        missing = pc.and_(content.is_null(), path.is_null())
        rest = pa.StructArray.from_arrays([path], names=["path"], mask=missing)
        others = others.set_column(others.column_names.index(name), name, rest)
    files.append([(b"json", line) for line in json_lines(others)])
    return [[file for file in row if file is not None] for row in zip(*files, strict=True)]


def _present(
    cells: list[tuple[bytes, bytes]], column: pa.Array
) -> list[tuple[bytes, bytes] | None]:
    if not column.null_count:
        return list(cells)
    valid = column.is_valid().to_pylist()
    return [cell if there else None for cell, there in zip(cells, valid, strict=True)]


def _prefixes(images: Sequence[str]) -> list[bytes]:
    """What stands before the suffix of each column of images: nothing where there is one."""
    if len(images) == 1:
        return [b""]
    plain = [re.sub(r"[^a-z0-9_-]+", "_", name.lower())[:40] for name in images]
    return [
        f"{name}{'' if plain.count(name) == 1 else f'-{at}'}.".encode()
        for at, name in enumerate(plain)
    ]


@dataclass(frozen=True, slots=True)
class WebDataset:
    """See `curate.data.shard_formats.sink.Format`."""

    pattern: str = r"webdataset/(?:[^/]+/){0,2}train-\d{5,}-of-\d{5,}\.tar"

    def files(self, shard: Shard) -> tuple[str, ...]:
        return (shard.path("webdataset", f"{shard.stem}.tar"),)

    def open(self, paths: Sequence[Path], schema: pa.Schema, context: Context) -> _Sink:
        del schema
        return _Sink(paths[0], context.sources)

    def documents(self, shards: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        del shards
        return {}

    def count_rows(self, paths: Sequence[Path]) -> int:
        with paths[0].open("rb") as file:
            return sum(re.fullmatch(rb"\d+-\d+\.json", name) is not None for name in _names(file))


def _names(file: BinaryIO) -> Iterator[bytes]:
    """Names of the files in an archive; `tarfile` takes one that breaks off for a whole one."""
    at = 0
    while True:
        file.seek(at)
        header = file.read(_BLOCK)
        if len(header) == _BLOCK and not any(header):
            return
        if len(header) < _BLOCK or header[_MAGIC : _MAGIC + 5] != b"ustar":
            raise OSError(f"no header of a file at byte {at}")
        try:
            length = int(header[_SIZE : _SIZE + 11], 8)
            stored = int(header[_SUM : _SUM + 6], 8)
        except ValueError as error:
            raise OSError(f"a broken header at byte {at}") from error
        known = sum(header) - sum(header[_SUM : _SUM + 8]) + 8 * ord(" ")
        at += _BLOCK + length + -length % _BLOCK
        if stored != known:
            raise OSError(f"a broken header before byte {at}")
        yield header[:100].rstrip(b"\0")


WEBDATASET = WebDataset()
