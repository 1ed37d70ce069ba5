"""Columns of images in one form: the bytes of image files, or pixels.

An image is a struct of `bytes` and `path` (as `datasets` keeps them), a column of bytes, a column
of paths, or numbers: a list, or lists in lists.

Shapes: N rows, H height, W width, C channels.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from curate.data.example import Source
from curate.data.images import channels_last, damage_of
from curate.data.kinds import Problems, is_number, item_kind, plain_kind, unwrapped
from curate.data.storage import is_local, locate, store_errors
from curate.errors import InputError

# The functions are made at import time, unseen by type checkers.
pc: Any = pyarrow.compute

_PARTS = ("bytes", "path")


def is_image(kind: pa.DataType) -> bool:
    """Whether a column of this type may hold images: files, paths or lists of numbers."""
    return is_file(kind) or is_path(kind) or list_depth(kind) is not None


def is_file(kind: pa.DataType) -> bool:
    """Whether it holds the bytes of image files, alone or beside their paths."""
    plain = plain_kind(kind)
    checks = ("binary", "large_binary", "binary_view")
    return _is_struct(plain) or any(getattr(pa.types, f"is_{check}")(plain) for check in checks)


def is_path(kind: pa.DataType) -> bool:
    plain = plain_kind(kind)
    checks = ("string", "large_string", "string_view")
    return any(getattr(pa.types, f"is_{check}")(plain) for check in checks)


def list_depth(kind: pa.DataType) -> int | None:
    """How many lists stand around numbers, one at least; None where there are none."""
    depth, inner = 0, plain_kind(kind)
    while inner is not None and (item := item_kind(inner)) is not None:
        depth, inner = depth + 1, plain_kind(item)
    return depth if depth and is_number(inner) else None


def anchored(table: pa.Table, source: Source, folders: Sequence[str]) -> pa.Table:
    """A table whose relative paths of images are made absolute; others stay as they are.

    Args:
        table: rows of an input.
        source: resolved.
        folders: where a path may start; the first that has the file is taken, or else the first.
    """
    name = source.image
    if name is None or name not in table.column_names or not folders:
        return table
    column = table.column(name)
    at = table.column_names.index(name)
    if is_path(column.type):
        found = _absolute(column.cast(pa.large_string()).to_pylist(), folders)
        return table.set_column(at, name, pa.array(found, pa.large_string()))
    if not _is_struct(plain_kind(column.type)):
        return table
    content, paths = _parts(_whole(column))
    given = pc.if_else(pc.is_null(content), paths, None).to_pylist()
    if not any(given):
        return table
    absolute = pa.array(_absolute(given, folders), pa.large_string())
    return table.set_column(
        at, name, pa.StructArray.from_arrays([content, absolute], names=list(_PARTS))
    )


def image_values(
    column: pa.ChunkedArray, name: str, shape: Sequence[int] | None, problems: Problems
) -> pa.Array | np.ndarray:
    """Images as the bytes of files, or as pixels; rows with problems hold anything.

    Args:
        column: of a type that `is_image`.
        name: of the column.
        shape: of one image, where the numbers stand in one list.
        problems: added to.

    Returns:
        large_binary (N,), or pixels (N, H, W, C), uint8 where they are whole numbers and float32
        where they are not.
    """
    array = _whole(column)
    if list_depth(column.type) is not None:
        return _pixels(array, name, shape, problems)
    if is_path(column.type):
        content, paths = pa.nulls(len(array), pa.large_binary()), array.cast(pa.large_string())
    elif _is_struct(array.type):
        content, paths = _parts(array)
    else:
        content, paths = array.cast(pa.large_binary()), pa.nulls(len(array), pa.large_string())
    return _contents(content, paths, name, problems)


def note_damaged(files: pa.Array, column: pa.ChunkedArray, problems: Problems) -> None:
    """Decode every image, and note those that cannot be.

    Args:
        files: large_binary (N,).
        column: (N,) that they come from; where it has paths, the notes name them.
        problems: added to; rows that have one already are not looked at.
    """
    for row, content in enumerate(files):
        if row not in problems and content.is_valid:
            why = damage_of(memoryview(content.as_buffer()))
            if why is not None:
                path = _path(column[row].as_py())
                problems[row] = ("unreadable_image", why if path is None else f"{path}: {why}")


def _path(value: Any) -> str | None:
    """What a row says of where its image is from."""
    found = value.get("path") if isinstance(value, dict) else value
    return found if isinstance(found, str) else None


def _is_struct(kind: pa.DataType | None) -> bool:
    if kind is None or not pa.types.is_struct(kind):
        return False
    return "bytes" in {kind.field(i).name for i in range(kind.num_fields)}


def _parts(array: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Bytes and paths; `struct_field` keeps the nulls of the struct itself."""
    names = {array.type.field(i).name for i in range(array.type.num_fields)}
    content = pc.struct_field(array, "bytes").cast(pa.large_binary())
    if "path" not in names:
        return content, pa.nulls(len(array), pa.large_string())
    return content, pc.struct_field(array, "path").cast(pa.large_string())


def _absolute(paths: Sequence[str | None], folders: Sequence[str]) -> list[str | None]:
    return [None if path is None else _placed(path, folders) for path in paths]


def _placed(path: str, folders: Sequence[str]) -> str:
    if not is_local(path) or Path(path).is_absolute():
        return path
    places = [f"{folder.rstrip('/')}/{path}" for folder in folders]
    there = (p for p in places if not is_local(p) or Path(p).exists())
    return next(there, places[0])


def _contents(content: pa.Array, paths: pa.Array, name: str, problems: Problems) -> pa.Array:
    """The bytes of each image, read from its path where the row does not hold them."""
    missing = np.flatnonzero(pc.is_null(content).to_numpy(zero_copy_only=False)).tolist()
    if not missing:
        return content
    found: list[Any] = [None] * len(content)
    for row in missing:
        path = paths[row].as_py()
        if path is None:
            problems.setdefault(row, ("missing_image", f"{name} is null"))
        elif row not in problems:
            try:
                found[row] = _file(path)
            except InputError as error:
                problems.setdefault(row, ("missing_image", error.what))
    return pc.coalesce(content, pa.array(found, pa.large_binary()))


def _file(path: str) -> bytes:
    if is_local(path) and not Path(path).is_absolute():
        raise InputError(f"{path} is relative to no folder", fix="give it in full")
    with store_errors(path):
        if is_local(path):
            return Path(path).read_bytes()
        system, inside = locate(path)
        content: Any = system.cat_file(inside)
        return bytes(content)


def _pixels(
    array: pa.Array, name: str, shape: Sequence[int] | None, problems: Problems
) -> np.ndarray:
    count = len(array)
    for row in np.flatnonzero(pc.is_null(array).to_numpy(zero_copy_only=False)).tolist():
        problems.setdefault(row, ("missing_image", f"{name} is null"))
    owners, levels = np.arange(count), list[np.ndarray]()
    while item_kind(array.type) is not None:
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        levels.append(_lengths_of(lengths, owners, count))
        owners = np.repeat(owners, lengths)
        array = unwrapped(array.flatten())
    numbers = _numbers(array, owners, name, problems)
    if shape is None:
        shape = _common_shape(levels, name, problems)
    wanted = int(np.prod(shape))
    sizes = np.bincount(owners, minlength=count)
    for row in np.flatnonzero(sizes != wanted).tolist():
        detail = f"{name} has {sizes[row]} numbers, {_times(shape)} are {wanted}"
        problems.setdefault(row, ("wrong_type", detail))
    order = channels_last(tuple(shape))
    if order is None:
        for row in range(count):
            problems.setdefault(row, ("wrong_type", f"{name} is {_times(shape)}: no image"))
        return np.zeros((count, 1, 1, 1), numbers.dtype)
    pixels = np.zeros((count, wanted), numbers.dtype)
    fits = sizes == wanted
    pixels[fits] = numbers[fits[owners]].reshape(-1, wanted)
    turned = pixels.reshape(count, *shape).transpose(0, *(axis + 1 for axis in order))
    turned = turned[..., None] if turned.ndim == 3 else turned
    return np.ascontiguousarray(turned)


def _lengths_of(lengths: np.ndarray, owners: np.ndarray, count: int) -> np.ndarray:
    """(N,) the one length of the lists of each row; -1 where they differ, 0 where none are."""
    low, high = np.full(count, np.iinfo(np.int64).max), np.zeros(count, np.int64)
    np.minimum.at(low, owners, lengths)
    np.maximum.at(high, owners, lengths)
    return np.where((low == high) | (high == 0), high, -1)


def _common_shape(levels: list[np.ndarray], name: str, problems: Problems) -> tuple[int, ...]:
    """The shape that most rows have; the others are problems."""
    shapes = [tuple(int(n) for n in row) for row in np.stack(levels, axis=1)]
    usable = [shape for row, shape in enumerate(shapes) if row not in problems and min(shape) > 0]
    counts = Counter(usable)
    most = max(counts, key=lambda shape: (counts[shape], shape), default=(1, 1))
    for row, shape in enumerate(shapes):
        if shape != most:
            found = "its rows differ in length" if min(shape) < 0 else _times(shape)
            detail = f"{name}: {found}, most images are {_times(most)}"
            problems.setdefault(row, ("wrong_type", detail))
    return most


def _numbers(values: pa.Array, owners: np.ndarray, name: str, problems: Problems) -> np.ndarray:
    """Whole numbers of 0 to 255 as uint8, truth values as 0 and 255, others as float32."""
    for row in np.unique(owners[pc.is_null(values).to_numpy(zero_copy_only=False)]).tolist():
        problems.setdefault(row, ("wrong_type", f"{name} has a null"))
    if pa.types.is_null(values.type):
        return np.zeros(len(values), np.uint8)
    filled = pc.fill_null(values, pa.scalar(0).cast(values.type)).to_numpy(zero_copy_only=False)
    if filled.dtype == bool:
        return filled.astype(np.uint8) * np.uint8(255)
    if filled.dtype.kind in "iu":
        outside, what = (filled < 0) | (filled > 255), "a pixel outside 0 to 255"
        pixels = filled.astype(np.uint8)
    else:
        pixels = filled.astype(np.float32)
        outside, what = ~np.isfinite(pixels), "a pixel that is not finite"
    for row in np.unique(owners[outside]).tolist():
        problems.setdefault(row, ("wrong_type", f"{name} has {what}"))
    return pixels


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """One array without dictionary or extension; 64-bit offsets, so that bytes cannot overflow."""
    chunks = [unwrapped(chunk) for chunk in column.chunks]
    kind = plain_kind(column.type)
    if kind is not None and is_path(kind):
        kind = pa.large_string()
    elif kind is not None and is_file(kind) and not _is_struct(kind):
        kind = pa.large_binary()
    elif _is_struct(kind):
        chunks = [pa.StructArray.from_arrays(_parts(c), names=list(_PARTS)) for c in chunks]
        kind = pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])
    chunks = [chunk.cast(kind) for chunk in chunks]
    return pa.chunked_array(chunks, kind).combine_chunks() if chunks else pa.array([], kind)
