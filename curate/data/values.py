"""The values of columns in one form, whatever their Arrow types, and what is wrong with them.

Values that cannot be used are noted as problems of their rows; the rest of the rows go on.

Shapes: N rows, F features, H height, W width, C channels.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from curate.data.columns import PROBLEM
from curate.data.example import Source
from curate.data.image_values import image_values
from curate.data.kinds import Problems, is_text, item_kind, plain_kind, turn_columns, unwrapped

# The functions are made at import time, unseen by type checkers.
pc: Any = pyarrow.compute

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}


@dataclass(frozen=True, slots=True)
class Turns:
    """Chat messages of N rows, as flat columns."""

    starts: np.ndarray
    """(N + 1,) position of each row's first message."""
    roles: pa.Array
    contents: pa.Array


Values = pa.Array | Turns | np.ndarray
"""Text, messages, the bytes of image files; (N, F) float32 features, (N, H, W, C) pixels."""


def field_values(table: pa.Table, source: Source, problems: Problems) -> dict[str, Values]:
    """The content of each row by field, in one form; rows with problems hold anything.

    Args:
        table: has all columns of `source.content_columns`.
        source: resolved.
        problems: added to.

    Returns:
        text, prompt, response: large_string arrays; messages: `Turns`; features: (N, F) float32;
        chosen, rejected and their prompt: texts or `Turns`, as the columns are; image:
        large_binary of image files, or (N, H, W, C) uint8 or float32 pixels.
    """
    found: dict[str, Values] = {}
    for field, columns in source.content_columns.items():
        if field == "features":
            found[field] = _features(table, columns, problems)
        elif field == "image":
            column = table.column(columns[0])
            found[field] = image_values(column, columns[0], source.shape, problems)
        elif field == "messages" or turn_columns(table.column(columns[0]).type) is not None:
            found[field] = _messages(table.column(columns[0]), columns[0], problems)
        else:
            found[field] = _texts(table.column(columns[0]), columns[0], problems)
    return found


def plain_texts(column: pa.ChunkedArray, name: str, problems: Problems) -> pa.Array:
    """A column as text, nulls kept: for ids, domains and documents."""
    if is_text(column.type):
        return _texts(column, name, problems, may_be_null=True)
    return _flat(column).cast(pa.large_string())


def label_values(
    column: pa.ChunkedArray, source: Source, problems: Problems, *, num_classes: int | None
) -> pa.Array:
    """Labels as int64; null where there is none.

    Args:
        column: integers, whole floats, booleans or class names; white space is no name.
        source: its `classes` give the names.
        problems: added to: out of range, not whole, and, where a task has classes, missing.
        num_classes: of a classification task.
    """
    name = source.label or ""
    if is_text(column.type):
        names = _texts(column, name, problems, may_be_null=True)
        if "" not in source.classes:  # no name stands for no label
            blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(names)), 0)
            names = pc.if_else(blank, pa.scalar(None, pa.large_string()), names)
        values = pc.index_in(names, pa.array(source.classes, pa.large_string())).cast(pa.int64())
        unknown = pc.and_(pc.is_valid(names), pc.is_null(values))
        for row in _where(unknown):
            reason = "label_out_of_range", f"{_short(names[row].as_py())} is none of the classes"
            problems.setdefault(row, reason)
    else:
        values = _whole_numbers(_flat(column), name, problems)
    limit = num_classes if num_classes is not None else (len(source.classes) or None)
    if limit is not None:
        outside = pc.or_(pc.less(values, 0), pc.greater_equal(values, limit))
        for row in _where(outside):
            detail = f"{name} is {values[row].as_py()}, outside [0, {limit})"
            problems.setdefault(row, ("label_out_of_range", detail))
    if num_classes is not None:
        for row in _where(pc.is_null(values)):
            detail = f"{name} is null{' or empty' if is_text(column.type) else ''}"
            problems.setdefault(row, ("wrong_type", detail))
    return values


def noted_problems(table: pa.Table, problems: Problems) -> None:
    """Take over what the conversion wrote down about rows that it could not read."""
    if PROBLEM not in table.column_names:
        return
    column = _flat(table.column(PROBLEM)).cast(pa.large_string())
    for row in _where(pc.is_valid(column)):
        reason, _, detail = column[row].as_py().partition(": ")
        problems.setdefault(row, (reason, detail))


def byte_views(texts: pa.Array) -> list[memoryview]:
    """The bytes of each text, not copied; empty where null."""
    _, offsets, data = texts.buffers()
    length = len(texts)
    if length == 0 or data is None:
        return [memoryview(b"")] * length
    ends = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + length + 1].tolist()
    view = memoryview(data)
    return [view[a:b] for a, b in pairwise(ends)]


def turn_bytes(turns: Turns) -> list[bytes]:
    """Canonical bytes of each row's messages: role and content, each after its length."""
    parts = [
        b"".join((len(r).to_bytes(8, "little"), r, len(c).to_bytes(8, "little"), c))
        for r, c in zip(byte_views(turns.roles), byte_views(turns.contents), strict=True)
    ]
    starts = turns.starts.tolist()
    return [b"".join(parts[a:b]) for a, b in pairwise(starts)]


def _texts(
    column: pa.ChunkedArray, name: str, problems: Problems, *, may_be_null: bool = False
) -> pa.Array:
    """Text as large_string; invalid UTF-8 becomes null and a problem of its row."""
    binary = _flat(column).cast(pa.large_binary())
    if not may_be_null:
        for row in _where(pc.is_null(binary)):
            problems.setdefault(row, ("missing_text", f"{name} is null"))
    try:
        return binary.cast(pa.large_string())
    except pa.ArrowInvalid:
        values: list[str | None] = []
        for row, value in enumerate(binary.to_pylist()):
            try:
                values.append(None if value is None else value.decode())
            except UnicodeDecodeError as error:
                detail = f"{name}: byte {error.start} is {(value or b'')[error.start]:#04x}"
                problems.setdefault(row, ("invalid_utf8", detail))
                values.append(None)
        return pa.array(values, pa.large_string())


def _messages(column: pa.ChunkedArray, name: str, problems: Problems) -> Turns:
    lists = _flat(column)
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    for row in _where(pc.is_null(lists)):
        problems.setdefault(row, ("missing_text", f"{name} is null"))
    names = turn_columns(lists.type)
    if names is None:  # a column of nulls only
        empty = pa.array([], pa.large_string())
        return Turns(np.zeros(len(lists) + 1, np.int64), empty, empty)
    turns = unwrapped(lists.flatten())
    owners = np.repeat(np.arange(len(lists)), lengths)
    inner: Problems = {}
    parts: list[pa.Array] = []
    for part in names:
        # struct_field keeps the nulls of the turn itself; flatten() of the struct would too.
        values = pa.chunked_array([pc.struct_field(turns, part)])
        parts.append(_texts(values, part, inner))
    for turn, (reason, detail) in sorted(inner.items()):
        row = int(owners[turn])
        problems.setdefault(row, (reason, f"{name}: message {turn - starts[row]}: {detail}"))
    roles = parts[0].dictionary_encode()
    mapped = [_ROLES.get(role, role) for role in roles.dictionary.to_pylist()]
    decoded = pa.array(mapped, pa.large_string()).take(roles.indices)
    return Turns(starts, decoded, parts[1])


def _features(table: pa.Table, columns: Sequence[str], problems: Problems) -> np.ndarray:
    if len(columns) == 1 and item_kind(table.column(columns[0]).type) is not None:
        values = _list_features(_flat(table.column(columns[0])), columns[0], problems)
    else:
        values = np.zeros((table.num_rows, len(columns)), np.float32)
        for at, name in enumerate(columns):
            column = _flat(table.column(name))
            for row in _where(pc.is_null(column)):
                problems.setdefault(row, ("wrong_type", f"{name} is null"))
            values[:, at] = _float32(column)
    for row in np.flatnonzero(~np.isfinite(values).all(axis=1)).tolist():
        problems.setdefault(row, ("wrong_type", "a feature is not finite"))
    return values


def _list_features(lists: pa.Array, name: str, problems: Problems) -> np.ndarray:
    """Lists of numbers as one matrix; rows of another length than most are problems."""
    for row in _where(pc.is_null(lists)):
        problems.setdefault(row, ("wrong_type", f"{name} is null"))
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    counts = Counter(lengths[pc.is_valid(lists).to_numpy(zero_copy_only=False)].tolist())
    width = max(counts, key=lambda length: (counts[length], length), default=0)
    flat = unwrapped(lists.flatten())
    owners = np.repeat(np.arange(len(lists)), lengths)
    for at in _where(pc.is_null(flat)):
        problems.setdefault(int(owners[at]), ("wrong_type", f"{name} has a null"))
    for row in np.flatnonzero(lengths != width).tolist():
        detail = f"{name} has {lengths[row]} numbers, most rows have {width}"
        problems.setdefault(row, ("wrong_type", detail))
    values = np.zeros((len(lists), width), np.float32)
    fits = np.repeat(lengths == width, lengths)
    values[lengths == width] = _float32(flat)[fits].reshape(-1, width)
    return values


def _float32(column: pa.Array) -> np.ndarray:
    """Numbers as float32, 0 where null."""
    if pa.types.is_null(column.type):
        return np.zeros(len(column), np.float32)
    filled = pc.fill_null(column, pa.scalar(0).cast(column.type))
    return filled.to_numpy(zero_copy_only=False).astype(np.float32)


def _whole_numbers(column: pa.Array, name: str, problems: Problems) -> pa.Array:
    if pa.types.is_floating(column.type):
        whole = pc.and_(pc.less(pc.abs(column), 2.0**53), pc.equal(pc.floor(column), column))
        for row in _where(pc.invert(whole)):
            problems.setdefault(row, ("wrong_type", f"{name} is {column[row].as_py()}"))
        column = pc.if_else(whole, column, None)
    if pa.types.is_uint64(column.type):
        # Beyond int64: out of range whatever the classes are.
        largest = pa.scalar(2**63 - 1, pa.uint64())
        column = pc.min_element_wise(column, largest, skip_nulls=False)
    return column.cast(pa.int64())


def _flat(column: pa.ChunkedArray) -> pa.Array:
    """One array without dictionary or extension; 64-bit offsets, so that texts cannot overflow."""
    chunks = [unwrapped(chunk) for chunk in column.chunks]
    kind = plain_kind(column.type)
    if is_text(kind):
        kind = pa.large_binary()
        chunks = [chunk.cast(kind) for chunk in chunks]
    return pa.chunked_array(chunks, kind).combine_chunks() if chunks else pa.array([], kind)


def _where(mask: pa.Array) -> list[int]:
    """Rows where a mask is true; null counts as false."""
    return pc.indices_nonzero(pc.fill_null(mask, False)).to_pylist()


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:39] + "…")
