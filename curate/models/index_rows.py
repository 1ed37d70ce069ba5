"""Rows of a gradient index on disk: raw numbers behind a JSON header, mapped to be read.

    part-….vectors   JSON, filled up with spaces to a multiple of 4 KiB, its last byte a line end;
                     then (N, k) numbers, row after row, little-endian

A row is an example, and its numbers are those of one block (a parameter) after the other. Stored
and real values differ by the scales that `encode_rows` returns, and the caller keeps:

    float32   none
    float16   one power of two for a row: 1 but where its numbers leave what float16 holds well
    bfloat16  none
    int8      one for each row and block, the block's largest magnitude / 127

    value = stored * scale

A row without a value (not scored, not finite) is zeros.

Shapes: N rows, k numbers of a row, L blocks, n rows that are read; S is L for int8 and 1 for
float16.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from curate.data.files import misshapen
from curate.errors import ConfigError, CurateError

Storage = Literal["float32", "float16", "bfloat16", "int8"]
Array = npt.NDArray[Any]

FORMAT = 1
PAGE_BYTES = 4096
_MOST_PAGES = 4096
_STORED: dict[str, Any] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),  # numpy has no such type: the bits of one
    "int8": np.dtype("i1"),
}
_LARGEST_HALF = 65504.0
_SMALLEST_HALF = 2.0**-8
"""A row whose largest number is below is raised: its small ones would lose digits."""
_AIM = 14
"""Rows that are moved have their largest number in [2^14, 2^15)."""


class Block(NamedTuple):
    """The numbers of one parameter in a row: its projection, row by row."""

    name: str
    rows: int
    columns: int

    @property
    def size(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Everything that the numbers of one file depend on, and where they are."""

    dtype: Storage
    num_rows: int
    first_row: int
    """Number of the partition's first row in its file."""
    blocks: tuple[Block, ...]
    projection: dict[str, Any]
    """As `projection.describe` has it; `digest` stands for the sides themselves."""
    model: str
    """Digest of the model whose gradients they are."""
    tokenizer: str | None
    """Digest of its tokenizer, where it has one."""
    reduction: Literal["sum", "mean"]
    """What an example's loss is of its counted positions'."""
    task: str = ""
    """Digest of what else makes a loss: the task and its settings."""
    adam: dict[str, Any] | None = None
    """`form` and digest of the `moments`, where rows are of Adam's updates; None: of gradients."""

    @property
    def width(self) -> int:
        """k."""
        return sum(block.size for block in self.blocks)

    @property
    def num_scales(self) -> int:
        """S; 0 where there are none."""
        return {"int8": len(self.blocks), "float16": 1}.get(self.dtype, 0)

    def spans(self) -> dict[str, slice]:
        """Block -> where its numbers are in a row."""
        ends = np.cumsum([block.size for block in self.blocks]).tolist()
        return {
            block.name: slice(end - block.size, end)
            for block, end in zip(self.blocks, ends, strict=True)
        }


class Encoded(NamedTuple):
    """Rows as they are stored."""

    stored: Array
    """(N, k) of the type on disk; bfloat16 as its bits."""
    scales: npt.NDArray[np.float32] | None
    """(N, S) powers of two or shares of 127; None where values are stored as they are."""
    usable: npt.NDArray[np.bool_]
    """(N,) False where a row is not finite, which is stored as zeros."""


def encode_rows(values: Tensor, blocks: Sequence[Block], dtype: Storage) -> Encoded:
    """Rows in the type of the disk; nothing is clamped.

    Args:
        values: (N, k) float32 or float64 on any device.
        blocks: of a row.
        dtype: on disk.
    """
    values = values.detach().float().cpu()
    usable = values.isfinite().all(1)
    values = values.masked_fill(~usable[:, None], 0)
    scales: Tensor | None = None
    if dtype == "float32":
        stored = values
    elif dtype == "bfloat16":
        stored = values.bfloat16()
        usable &= stored.isfinite().all(1)  # float32's largest numbers are rounded up to infinity
        stored = stored.masked_fill(~usable[:, None], 0)
    elif dtype == "float16":
        scales = _powers(values)
        stored = (values / scales).half()
    else:
        scales = _shares(values, blocks)
        wide = scales.repeat_interleave(torch.tensor([block.size for block in blocks]), 1)
        stored = torch.where(wide > 0, values / wide, 0).round_().to(torch.int8)
    return Encoded(
        _as_array(stored, dtype), None if scales is None else scales.numpy(), usable.numpy()
    )


def decode_rows(stored: Array, scales: Array | None, header: Header) -> Tensor:
    """(n, k) float32 values of stored rows.

    Args:
        stored: (n, k) as a file has them.
        scales: (n, S) of these rows, where the header asks for some.
        header: of their file.
    """
    values = as_tensor(stored, header.dtype).float()
    if not header.num_scales:
        return values
    assert scales is not None
    found = torch.from_numpy(np.array(scales, dtype=np.float32))
    sizes = [block.size for block in header.blocks] if header.dtype == "int8" else [header.width]
    return values * found.repeat_interleave(torch.tensor(sizes), 1)


def as_tensor(stored: Array, dtype: Storage) -> Tensor:
    """Stored rows as a tensor of their own type, which shares their memory."""
    array = np.asarray(stored)
    if sys.byteorder == "big":
        array = array.astype(array.dtype.newbyteorder("="))
    found = torch.from_numpy(array.view(np.int16) if dtype == "bfloat16" else array)
    return found.view(torch.bfloat16) if dtype == "bfloat16" else found


class RowsWriter:
    """Writes the rows of a new file in any order; those that are not written are zeros.

    Args:
        path: of the file.
        header: of the file.

    A disk that is full raises OSError in `write` or `close`.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self._dtype = _STORED[header.dtype]
        self._row_bytes = header.width * self._dtype.itemsize
        text = header_bytes(header)
        self._start = len(text)
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.truncate(self._handle, self._start + header.num_rows * self._row_bytes)
        self._put(text, 0)

    def write(self, rows: Sequence[int] | npt.NDArray[np.int64], stored: Array) -> None:
        """Stored rows (n, k), at the positions `rows` (n,)."""
        data = np.ascontiguousarray(stored, dtype=self._dtype)
        for row, values in zip(np.asarray(rows).tolist(), data, strict=True):
            self._put(values.tobytes(), self._start + row * self._row_bytes)

    def close(self) -> None:
        os.close(self._handle)

    def _put(self, data: bytes, place: int) -> None:
        # Through a memory map a full disk would be a crash instead of an error.
        view = memoryview(data)
        while view:
            done = os.pwrite(self._handle, view, place)
            view, place = view[done:], place + done

    def __enter__(self) -> "RowsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Rows(NamedTuple):
    """An open file."""

    header: Header
    stored: Array
    """(N, k) mapped, of the type on disk; what is written into it does not reach the file."""


def open_rows(path: Path) -> Rows:
    """Map a file of rows.

    Raises:
        InputError: it is missing, truncated, or none of ours.
    """
    header, start = _read_header(path)
    dtype = _STORED[header.dtype]
    wanted = start + header.num_rows * header.width * dtype.itemsize
    size = path.stat().st_size
    if size != wanted:
        raise misshapen(path, f"it has {size:,} bytes, not {wanted:,}")
    shape = (header.num_rows, header.width)
    if not header.num_rows:  # nothing cannot be mapped
        return Rows(header, np.zeros(shape, dtype))
    return Rows(header, np.memmap(path, dtype=dtype, mode="c", offset=start, shape=shape))


def read_header(path: Path) -> Header:
    """The header alone.

    Raises:
        InputError: the file is missing or none of ours.
    """
    return _read_header(path)[0]


def header_bytes(header: Header) -> bytes:
    """The header as it stands in a file."""
    values = {"format": FORMAT, **asdict(header), "blocks": [list(b) for b in header.blocks]}
    if header.adam is None:
        del values["adam"]
    text = json.dumps(values, ensure_ascii=True, separators=(",", ":")).encode()
    pages = -(-(len(text) + 1) // PAGE_BYTES)
    return text.ljust(pages * PAGE_BYTES - 1) + b"\n"


def check_alike(
    one: Header,
    other: Header,
    *,
    names: tuple[str, str] = ("one", "other"),
    is_query: bool = False,
) -> None:
    """Refuse to compare rows that mean different things.

    Args:
        one: of one index.
        other: of the other one.
        names: what the two are, for the message.
        is_query: the other one asks: its rows are of gradients, whether or not those of the one
            are of Adam's updates.

    Raises:
        ConfigError: they differ in more than rows and storage; says in what.
    """
    if is_query and other.adam is not None:
        raise ConfigError(
            f"the index of {names[1]} is of Adam's updates ({other.adam.get('form')}), but what"
            " asks must be of gradients",
            fix="build it with adam: none",
        )
    one = replace(one, adam=None) if is_query else one
    differences = [
        f"{what} ({_short(first)} and {_short(second)})"
        for what, first, second in _facts(one, other)
        if first != second
    ]
    if differences:
        raise ConfigError(
            f"the index of {names[0]} and that of {names[1]} cannot be compared: they differ in"
            f" {', '.join(differences)}",
            fix="build both with the same model and settings",
        )


def _facts(one: Header, other: Header) -> list[tuple[str, Any, Any]]:
    pairs = zip(one.blocks, other.blocks, strict=False)
    changed: tuple[Any, Any] = next(
        ((first, second) for first, second in pairs if first != second),
        (len(one.blocks), len(other.blocks)),
    )
    options = sorted(one.projection.keys() | other.projection.keys())
    projections = [
        (f"projection {key}", one.projection.get(key), other.projection.get(key)) for key in options
    ]
    return [
        ("loss reduction", one.reduction, other.reduction),
        ("model", one.model, other.model),
        ("tokenizer", one.tokenizer, other.tokenizer),
        ("task", one.task, other.task),
        *_adam_facts(one.adam or {}, other.adam or {}),
        *projections,
        ("layers", *changed),
    ]


def _adam_facts(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """The form says more than all that comes with it."""
    if one.get("form") != other.get("form"):
        return [("form of Adam", one.get("form"), other.get("form"))]
    return [(f"Adam's {key}", one[key], other.get(key)) for key in one]


def _short(value: Any) -> str:
    if isinstance(value, Block):
        return f"{value.name} as {value.rows} x {value.columns}"
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _read_header(path: Path) -> tuple[Header, int]:
    """The header, and where the numbers begin."""
    text = b""
    try:
        with path.open("rb") as file:
            while not text.endswith(b"\n") and len(text) < _MOST_PAGES * PAGE_BYTES:
                page = file.read(PAGE_BYTES)
                if len(page) < PAGE_BYTES:
                    raise misshapen(path, "it ends within its header")
                text += page
    except OSError as error:
        raise misshapen(path, error.strerror or str(error)) from error
    try:
        values = json.loads(text)
        number = values.pop("format")
        values["blocks"] = tuple(Block(*block) for block in values["blocks"])
        header = Header(**values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise misshapen(path, "it does not begin with the header of a gradient index") from error
    if number != FORMAT or header.dtype not in _STORED:
        raise CurateError(
            f"{path} is of format {number} with {header.dtype}, which this version does not read",
            fix="read it with the version that wrote it, or build the index again",
        )
    return header, len(text)


def _powers(values: Tensor) -> Tensor:
    """(N, 1) the power of two that each row is divided by before it becomes float16."""
    largest = values.abs().amax(1, keepdim=True) if values.numel() else values.new_zeros(
        len(values), 1
    )  # fmt: skip
    _, exponent = torch.frexp(largest)  # largest in [2^(exponent - 1), 2^exponent)
    fits = (largest <= _LARGEST_HALF) & (largest >= _SMALLEST_HALF) | (largest == 0)
    return torch.where(fits, 1.0, torch.ldexp(torch.ones_like(largest), exponent - _AIM - 1))


def _shares(values: Tensor, blocks: Sequence[Block]) -> Tensor:
    """(N, L) the largest magnitude of each row and block, divided by 127."""
    parts = values.split([block.size for block in blocks], 1)
    return torch.stack([part.abs().amax(1) for part in parts], 1) / 127


def _as_array(stored: Tensor, dtype: Storage) -> Array:
    if dtype == "bfloat16":
        return stored.view(torch.int16).numpy().view(np.uint16)
    return stored.numpy()
