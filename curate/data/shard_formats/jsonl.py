"""JSON Lines, compressed with zstd: one object for each row.

jsonl/<domain>/train-00000-of-00024.jsonl.zst
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import zstandard

from curate.data.shard_formats.json_text import json_text
from curate.data.shard_formats.sink import Context
from curate.data.shard_layout import Shard

_LEVEL = 3
"""Zstandard's own default."""
_CHUNK_BYTES = 1 << 20


class _Sink:
    def __init__(self, path: Path, level: int) -> None:
        self._file = path.open("wb")
        # One frame for the whole file: several readers, `zstandard`'s own among them, stop
        # behind the first one without a word.
        compressor = zstandard.ZstdCompressor(level=level, write_checksum=True)
        self._frame = compressor.stream_writer(self._file, closefd=False)

    def write(self, table: pa.Table) -> None:
        self._frame.write(json_text(table))

    def close(self) -> dict[str, Any]:
        self._frame.close()
        self._file.close()
        return {}

    def discard(self) -> None:
        with suppress(OSError):
            self._file.close()


@dataclass(frozen=True, slots=True)
class JsonLines:
    """See `curate.data.shard_formats.sink.Format`."""

    pattern: str = r"jsonl/(?:[^/]+/){0,2}train-\d{5,}-of-\d{5,}\.jsonl\.zst"

    def files(self, shard: Shard) -> tuple[str, ...]:
        return (shard.path("jsonl", f"{shard.stem}.jsonl.zst"),)

    def open(self, paths: Sequence[Path], schema: pa.Schema, context: Context) -> _Sink:
        del schema
        settings = context.settings
        return _Sink(paths[0], (settings.compression == "zstd" and settings.level) or _LEVEL)

    def documents(self, shards: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        del shards
        return {}

    def count_rows(self, paths: Sequence[Path]) -> int:
        rows, last = 0, b"\n"
        with pa.input_stream(str(paths[0]), compression="zstd") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                rows += chunk.count(b"\n")
                last = chunk[-1:]
        if last != b"\n" or not rows:
            raise OSError("it is empty, or ends within a row")
        return rows


JSONL = JsonLines()
