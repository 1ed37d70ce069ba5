"""The values of a column one by one, as bytes, for formats that hold rows rather than columns."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from curate.data.example import Source
from curate.data.kinds import is_text, plain_kind, unwrapped

# The functions are made at import time, unseen by type checkers.
pc: Any = pyarrow.compute

_BEGINNINGS = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
)


def byte_cells(array: pa.Array) -> list[bytes]:
    """Each text or binary value as bytes, UTF-8 for texts; empty where null.

    Several times as fast as `to_pylist`.
    """
    wide = unwrapped(array).cast(pa.large_binary())
    _, offsets, data = wide.buffers()
    if len(wide) == 0 or data is None:
        return [b""] * len(wide)
    ends = np.frombuffer(offsets, np.int64)[wide.offset : wide.offset + len(wide) + 1]
    first = int(ends[0])
    taken = data.slice(first, int(ends[-1]) - first).to_pybytes()
    return [taken[a:b] for a, b in pairwise((ends - first).tolist())]


def number_cells(array: pa.Array) -> list[bytes]:
    """Each number as it lies in memory, little-endian; there are no nulls."""
    values = unwrapped(array).to_numpy(zero_copy_only=False)
    width, raw = values.dtype.itemsize, values.tobytes()
    return [raw[at : at + width] for at in range(0, len(raw), width)]


def is_image(kind: pa.DataType) -> bool:
    """Whether it is how `datasets` keeps images (and sounds): a file's bytes and its path."""
    kind = plain_kind(kind) or kind
    if not pa.types.is_struct(kind) or kind.num_fields != 2:
        return False
    if {kind.field(i).name for i in range(2)} != {"bytes", "path"}:
        return False
    return is_binary(kind.field("bytes").type) and is_text(kind.field("path").type)


def image_columns(schema: pa.Schema, sources: Mapping[str, Source]) -> list[str]:
    """Columns of images: as `datasets` keeps them, or the bytes that a source calls its image."""
    named = {source.image for source in sources.values() if source.image is not None}
    found: list[str] = [
        field.name
        for field in schema
        if is_image(field.type) or (field.name in named and is_binary(field.type))
    ]
    return found


def is_binary(kind: pa.DataType) -> bool:
    kind = plain_kind(kind) or kind
    return is_text(kind) and "binary" in str(kind)


def image_parts(array: pa.Array) -> tuple[pa.Array, pa.Array | None]:
    """Bytes and path of each image, null where the image is; no path where there are bytes only."""
    array = unwrapped(array)
    if is_binary(array.type):
        return array, None
    missing = array.is_null()
    names = [field.name for field in array.type]
    content, path = (
        pc.if_else(missing, None, unwrapped(array.field(names.index(name))))
        for name in ("bytes", "path")
    )
    return content, path


def file_suffix(content: bytes) -> str:
    """jpg, png, gif, bmp, tif or webp, by the first bytes of a file; `bin` for all others."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    return next((suffix for begin, suffix in _BEGINNINGS if content.startswith(begin)), "bin")
