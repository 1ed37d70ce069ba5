"""Indexed token files, as Megatron-LM and Megatron-core read them.

megatron/<domain>/train-00000-of-00024.bin: the ids of all documents behind each other.
megatron/<domain>/train-00000-of-00024.idx: where each of them begins, little-endian:

    b"MMIDIDX\\0\\0", version 1 (uint64), code of the ids' type (uint8), N (uint64), N + 1 (uint64),
    tokens of each document (N int32), its first byte (N int64), 0, 1 ... N (int64)

A document is one sequence there. Megatron cuts sequences of its own length from them, and draws the
files by a list of weights, its blend.

Shapes: N documents.
"""

import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curate.data.shard_formats.sink import Context
from curate.data.shard_formats.tokenising import encoder_of, num_weighted
from curate.data.shard_layout import Shard

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_CODES = {8: np.dtype("<u2"), 4: np.dtype("<i4")}
_FEW = 65_500
"""Vocabularies below this are stored in 16 bits, as Megatron itself does it."""


def dtype_code(vocabulary: int) -> int:
    """Number that stands for the type of the ids in the index."""
    return 8 if vocabulary < _FEW else 4


class _Sink:
    def __init__(self, paths: Sequence[Path], context: Context) -> None:
        self._encoder = encoder_of(context)
        self._sources = context.sources
        self._code = dtype_code(self._encoder.special.vocabulary)
        self._index = paths[1]
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._num_weighted = 0
        self._file = paths[0].open("wb")

    def write(self, table: pa.Table) -> None:
        found = self._encoder.encode(table, self._sources, marks=False)
        self._file.write(found.ids.astype(_CODES[self._code]).data)
        self._lengths.append(np.diff(found.starts).astype(np.int32))
        self._num_weighted += num_weighted(table)

    def close(self) -> dict[str, Any]:
        self._file.close()
        lengths = np.concatenate([np.zeros(0, np.int32), *self._lengths])
        self._index.write_bytes(_index(lengths, self._code))
        tokens = int(lengths.sum(dtype=np.int64))
        return {"tokens": tokens, "weighted": self._num_weighted}

    def discard(self) -> None:
        with suppress(OSError):
            self._file.close()


@dataclass(frozen=True, slots=True)
class Megatron:
    """See `curate.data.shard_formats.sink.Format`."""

    pattern: str = (
        r"megatron/(?:(?:[^/]+/){0,2}train-\d{5,}-of-\d{5,}\.(?:bin|idx)"
        r"|(?:phase-\d+/)?blend\.txt)"
    )

    def files(self, shard: Shard) -> tuple[str, ...]:
        return tuple(shard.path("megatron", f"{shard.stem}.{end}") for end in ("bin", "idx"))

    def open(self, paths: Sequence[Path], schema: pa.Schema, context: Context) -> _Sink:
        del schema
        return _Sink(paths, context)

    def documents(self, shards: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        """`blend.txt`, one in each phase: weight and prefix of every file, for Megatron's
        `--data-args-path`; the paths start at the shards folder.

        Megatron draws sequences of equal length. So each file's share of the tokens, which is its
        share of the domain's times the domain's share of all, shows every document once.
        """
        blends: dict[str, list[str]] = {}
        for shard in sorted(shards, key=lambda s: s["file"]):
            folder = f"megatron/phase-{shard['phase']}" if shard["phase"] else "megatron"
            line = f"{shard['facts']['tokens']} {shard['file'].removesuffix('.bin')}\n"
            blends.setdefault(f"{folder}/blend.txt", []).append(line)
        return {file: "".join(lines) for file, lines in blends.items()}

    def count_rows(self, paths: Sequence[Path]) -> int:
        """Documents in the index, once it fits the ids."""
        index = paths[1].read_bytes()
        if len(index) < _HEADER.size:
            raise OSError(f"{paths[1].name} is no index")
        magic, version, code, count, _ = _HEADER.unpack_from(index)
        if (
            magic != _MAGIC
            or version != 1
            or code not in _CODES
            or len(index) < _HEADER.size + 4 * count
        ):
            raise OSError(f"{paths[1].name} is no index of token ids")
        lengths = np.frombuffer(index, "<i4", count, _HEADER.size)
        tokens = int(lengths.sum(dtype=np.int64))
        if (
            index != _index(lengths, code)
            or paths[0].stat().st_size != tokens * _CODES[code].itemsize
        ):
            raise OSError(f"{paths[0].name} and its index do not belong together")
        return int(count)


MEGATRON = Megatron()


def _index(lengths: npt.NDArray[np.int32], code: int) -> bytes:
    """The index file of documents of these lengths."""
    sizes = lengths.astype(np.int64) * _CODES[code].itemsize
    return b"".join(
        [
            _HEADER.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1),
            lengths.astype("<i4").tobytes(),
            (sizes.cumsum() - sizes).astype("<i8").tobytes(),
            np.arange(len(lengths) + 1, dtype="<i8").tobytes(),
        ]
    )
