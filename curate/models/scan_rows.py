"""Rows of a gradient index as a scan takes them: piece by piece, decoded into memory used again.

Fresh memory costs more than the numbers that are written to it, so that all pieces are decoded into
the same.

Shapes: N rows of all parts, n of one, k numbers of a row, B rows of a piece, S scales of a row.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from curate.models.index_rows import Header, as_tensor

Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]

_BLOCK_BYTES = 8 * 2**20
_BLOCK_BYTES_ELSEWHERE = 64 * 2**20
"""On an accelerator, where few large products are faster."""


class ScanPart(NamedTuple):
    """Rows of one file."""

    stored: npt.NDArray[Any]
    """(n, k) as `index_rows.open_rows` maps them."""
    header: Header
    scales: npt.NDArray[Any] | None = None
    """(n, S) where the header asks for some."""
    usable: npt.NDArray[np.bool_] | None = None
    """(n,) False where a row has no value. Rows that are not finite are never used."""
    factors: Floats | None = None
    """(n,) for each row's scores, such as 1 / length for a cosine; rows of NaN are not used."""

    @property
    def num_rows(self) -> int:
        """n"""
        return len(self.stored)

    def taken(self, rows: slice | Places) -> "ScanPart":
        """Some of the rows."""
        return ScanPart(
            np.asarray(self.stored)[rows],
            self.header,
            None if self.scales is None else self.scales[rows],
            None if self.usable is None else self.usable[rows],
            None if self.factors is None else self.factors[rows],
        )

    def can_be_used(self, finite: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """(n,) which of the rows that are `finite` (n,) have a score."""
        if self.usable is not None:
            finite = finite & np.asarray(self.usable, dtype=bool)
        if self.factors is not None:
            finite = finite & np.isfinite(self.factors)
        return finite

    def all_factors(self) -> Floats:
        """(n,) 1 where there are none."""
        if self.factors is None:
            return np.ones(len(self.stored))
        return np.asarray(self.factors, dtype=np.float64)


class Room:
    """Memory that is used for piece after piece."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor that may hold anything; the last one of this name and type is lost."""
        key = name, dtype
        last = self._views.get(key)
        if last is not None and last.shape == shape:
            return last
        size = math.prod(shape)
        held = self._held.get(key)
        if held is None or len(held) < size:
            held = torch.empty(size, dtype=dtype, device=self.device)
            self._held[key] = held
        self._views[key] = held[:size].view(shape)
        return self._views[key]

    def values(self, piece: ScanPart) -> Tensor:
        """(B, k) float32; good until the next piece."""
        stored = self.stored(piece)
        if stored.dtype == torch.float32:
            return stored
        found = self.take("values", tuple(stored.shape), torch.float32)
        found.copy_(stored)
        if not piece.header.num_scales:
            return found
        assert piece.scales is not None
        scales = np.asarray(piece.scales, dtype=np.float32)
        if piece.header.dtype == "float16" and not (scales != 1).any():
            return found
        factors = torch.from_numpy(np.array(scales)).to(self.device)
        if piece.header.dtype == "float16":
            return found.mul_(factors)
        for place, span in enumerate(piece.header.spans().values()):
            found[:, span].mul_(factors[:, place : place + 1])
        return found

    def stored(self, piece: ScanPart) -> Tensor:
        """(B, k) of their own type, on the device."""
        return as_tensor(piece.stored, piece.header.dtype).to(self.device)


def rows_at_once(
    parts: Sequence[ScanPart],
    num_queries: int,
    device: torch.device,
    *,
    given: int | None,
    number_bytes: int = 4,
) -> int:
    """B unless it is given.

    Args:
        parts: of the scan.
        num_queries: Q.
        device: where blocks are multiplied.
        given: B.
        number_bytes: of a row's number as it is multiplied.
    """
    if given is not None:
        return given
    width = max((part.header.width for part in parts), default=1)
    room = _BLOCK_BYTES if device.type == "cpu" else _BLOCK_BYTES_ELSEWHERE
    return max(1, room // max(number_bytes * width, 8 * num_queries, 1))


def pieces(parts: Sequence[ScanPart], block_rows: int) -> Iterator[tuple[int, ScanPart]]:
    """Rows that are multiplied together, and the position of the first of them."""
    start = 0
    for part in parts:
        for first in range(0, part.num_rows, block_rows):
            yield start + first, part.taken(slice(first, first + block_rows))
        start += part.num_rows


def gathered(
    parts: Sequence[ScanPart], wanted: Sequence[Places], block_rows: int
) -> Iterator[tuple[Places, ScanPart]]:
    """Rows that any of the lists names, `block_rows` of one part at a time: where and what.

    Args:
        parts: all of them.
        wanted: positions counted over all parts.
        block_rows: at most.
    """
    positions = np.unique(np.concatenate([np.empty(0, np.int64), *wanted]))
    start = 0
    for part in parts:
        low, high = np.searchsorted(positions, [start, start + part.num_rows])
        for first in range(low, high, block_rows):
            some = positions[first : min(first + block_rows, high)]
            yield some, part.taken(some - start)
        start += part.num_rows
