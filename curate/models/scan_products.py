"""Inner products of the rows of an index with queries: bounded, coarse, and exact.

`bounded` multiplies in float32 and says by how much a product can be off, by
|fl(x . y) - x . y| <= k eps / 2 |x| |y|; `coarse` multiplies in the fastest type: int8 rows by int8
queries, layer block by layer block, where the processor has an instruction for it, else bfloat16;
`exact` multiplies in float64, one row at a time, so that neither blocks, nor parts, nor threads
change a digit.

Shapes: N rows of all parts, k numbers of a row, Q queries, B rows of a piece, L layer blocks, S
scales of a row.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from curate.errors import InputError
from curate.models.index_rows import Header
from curate.models.scan_rows import Floats, Places, Room, ScanPart, gathered

_LARGEST, _SMALLEST = 1e30, 1e-20
"""Lengths of rows between which products of float32 neither overflow nor lose digits."""
_PLAIN = 1e-15, 1e15
"""Lengths of rows whose squares float32 can sum."""
_CHUNK_BYTES = 2**19
_GATHERED_BYTES = 32 * 2**20
_LARGEST_BLOCK = 2**16
"""Numbers of a block that int32 can sum, one of the factors being moved by 128."""
_SMALLEST_BLOCK = 64
"""Where a layer block is shorter, its scales cost more than the faster products save."""

# No public names: where a version of torch lacks one, int8 rows are multiplied in bfloat16.
_has_vnni: Callable[[], bool] = getattr(torch.cpu, "_is_vnni_supported", lambda: False)
_multiply_int8: Callable[..., Tensor] | None = (
    getattr(torch, "_int_mm", None) if _has_vnni() else None
)


class Products(NamedTuple):
    """Scores of a piece with unit queries, and how far they may be off."""

    scores: npt.NDArray[np.floating]
    """(Q, B) float32 or float64, -inf where a row has none."""
    slack: Floats
    """(B,)"""


class Queries:
    """Queries, as they are and of unit length.

    Args:
        queries: (Q, k) of any float type.
        device: where blocks are multiplied.

    Raises:
        InputError: a query is not finite.
    """

    def __init__(self, queries: Tensor, device: torch.device | str) -> None:
        values = np.ascontiguousarray(queries.detach().double().cpu().numpy())
        finite = np.isfinite(values).all(1)
        if not finite.all():
            raise InputError(
                f"query {int(finite.argmin())} is not finite", fix="leave it out of the queries"
            )
        # Squares of very small or large numbers leave float64.
        largest = np.abs(values).max(1, initial=0, keepdims=True)
        unit = values / np.where(largest > 0, largest, 1)
        rest = np.linalg.norm(unit, axis=1, keepdims=True)
        unit /= np.where(rest > 0, rest, 1)
        self.values: Floats = values
        """(Q, k)"""
        self.lengths: Floats = (largest * rest)[:, 0]
        """(Q,)"""
        self.room = Room(device)
        self._exact_room = Room()
        self._unit = torch.from_numpy(unit).to(self.room.device)  # zeros stay zeros
        self._typed: dict[torch.dtype, Tensor] = {}
        self._is_wide = False
        self._small: tuple[Header, list[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.values)

    def products(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """(Q, B) on the device, multiplied in `dtype`; good until the next piece."""
        if dtype not in self._typed:
            self._typed[dtype] = self._unit.to(dtype)
        if rows.dtype != dtype:
            rows = self.room.take("rows", tuple(rows.shape), dtype).copy_(rows)
        found = self.room.take("products", (len(self), len(rows)), dtype)
        return torch.mm(self._typed[dtype], rows.T, out=found)

    def bounded(self, piece: ScanPart) -> Products | None:
        """Scores and their errors; None where no row has a score."""
        values = self.room.values(piece)
        lengths = lengths_of(values)
        usable = piece.can_be_used(np.isfinite(lengths))
        if not usable.any():
            return None
        factors = piece.all_factors()
        reach = np.zeros(len(usable))
        reach[usable] = lengths[usable] * np.abs(factors[usable])
        width = values.shape[1]
        dtype = torch.float64 if self._is_wide else _multiplied_in(lengths[usable], width)
        scores = self.products(values, dtype).cpu().numpy()
        if piece.factors is not None:
            is_tame = _is_tame(reach) and _is_tame(np.abs(factors[usable]))
            scores = scores * (factors.astype(scores.dtype) if is_tame else factors)
        if not usable.all():
            scores[:, ~usable] = -np.inf
        # Each of k sums is off by half an eps, and a length by less than a tenth.
        return Products(scores, 1.1 * (width / 2 + 8) * torch.finfo(dtype).eps * reach)

    def widen(self) -> None:
        """From here on `bounded` multiplies in float64."""
        self._is_wide = True

    def coarse(self, piece: ScanPart) -> npt.NDArray[np.floating]:
        """(Q, B) float32 or float64 scores with unit queries; -inf where a row has none."""
        if takes_int8(piece.header, self.room.device):
            scores = self._of_int8(piece)
        else:
            stored = self.room.stored(piece)
            values = stored if stored.dtype == torch.bfloat16 else self.room.values(piece)
            scores = self.products(values, torch.bfloat16).float().cpu().numpy()
        usable = piece.can_be_used(np.ones(piece.num_rows, dtype=bool))
        if not np.isfinite(scores if usable.all() else scores[:, usable]).all():
            found = self.bounded(piece)  # rows that are not finite, or leave the type
            return np.full(scores.shape, -np.inf) if found is None else found.scores
        if piece.factors is not None:
            scores = scores * piece.all_factors()
        if not usable.all():
            scores[:, ~usable] = -np.inf
        return scores

    def exact(self, parts: Sequence[ScanPart], wanted: Mapping[int, Places]) -> dict[int, Floats]:
        """float64 scores of some rows, each by its own sum.

        Args:
            parts: all of them.
            wanted: query -> (n,) ascending positions, counted over all parts.

        Returns:
            Query -> (n,) scores.
        """
        found = {query: np.empty(len(positions)) for query, positions in wanted.items()}
        width = self.values.shape[1]
        step = max(1, _GATHERED_BYTES // (4 * max(1, width)))
        for positions, piece in gathered(parts, list(wanted.values()), step):
            values = self._exact_room.values(piece).numpy()
            factors = piece.all_factors()
            for query, own in wanted.items():
                low, high = np.searchsorted(own, [positions[0], positions[-1] + 1])
                if low < high:
                    rows = np.searchsorted(positions, own[low:high])
                    sums = _sums(values, rows, self.values[query], self._exact_room)
                    found[query][low:high] = sums * factors[rows]
        return found

    def _of_int8(self, piece: ScanPart) -> npt.NDArray[np.float32]:
        """Sum over the layer blocks of the products of int8 times both scales."""
        header, room = piece.header, self.room
        if self._small is None or self._small[0].blocks != header.blocks:
            self._small = (header, *_small_queries(self._unit, header))
        _, queries, scales = self._small
        assert piece.scales is not None
        assert _multiply_int8 is not None
        rows = room.stored(piece)
        row_scales = torch.from_numpy(np.array(piece.scales.T, dtype=np.float32, order="C"))
        shape = (len(self), piece.num_rows)
        total = room.take("total", shape, torch.float32).zero_()
        whole = room.take("whole", shape, torch.int32)
        real = room.take("real", shape, torch.float32)
        for place, span in enumerate(header.spans().values()):
            _multiply_int8(queries[place], rows[:, span].T, out=whole)
            real.copy_(whole).mul_(scales[:, place : place + 1])
            total.addcmul_(real, row_scales[place])
        return total.numpy()


def takes_int8(header: Header, device: torch.device) -> bool:
    """Whether int8 rows are multiplied as such: other processors do it slowly."""
    sizes = [block.size for block in header.blocks]
    return (
        header.dtype == "int8"
        and device.type == "cpu"
        and _multiply_int8 is not None
        and max(sizes, default=0) <= _LARGEST_BLOCK
        and sum(sizes) >= _SMALLEST_BLOCK * len(sizes)
    )


def _small_queries(unit: Tensor, header: Header) -> tuple[list[Tensor], Tensor]:
    """(Q, g) int8 of each layer block, and the (Q, L) float32 scales of the queries."""
    found: list[Tensor] = []
    scales: list[Tensor] = []
    for span in header.spans().values():
        part = unit[:, span]
        scale = part.abs().amax(1, keepdim=True) / 127
        found.append(torch.where(scale > 0, part / scale, 0).round().to(torch.int8).contiguous())
        scales.append(scale.float())
    return found, torch.cat(scales, 1)


def lengths_of(values: Tensor) -> Floats:
    """(B,) float64 lengths of float32 rows, within a tenth; inf or NaN where one is not finite."""
    found = torch.linalg.vector_norm(values, dim=1)
    odd = ~((found > _PLAIN[0]) & (found < _PLAIN[1]))
    wide = found.double()
    if bool(odd.any()):
        wide[odd] = torch.linalg.vector_norm(values[odd], dim=1, dtype=torch.float64)
    return wide.cpu().numpy()


def _multiplied_in(lengths: Floats, width: int) -> torch.dtype:
    """float32 where its rounding is bounded."""
    # Else the products may be those of TF32 or bfloat16.
    strict = torch.get_float32_matmul_precision() == "highest"
    few = width * torch.finfo(torch.float32).eps < 0.1
    return torch.float32 if _is_tame(lengths) and strict and few else torch.float64


def _is_tame(sizes: Floats) -> bool:
    held = sizes[sizes > 0]
    return not len(held) or bool(held.max() <= _LARGEST and held.min() >= _SMALLEST)


def _sums(values: npt.NDArray[np.float32], rows: Places, query: Floats, room: Room) -> Floats:
    """(n,) each by its own sum, so that it does not depend on what is beside it."""
    width = values.shape[1]
    step = max(1, _CHUNK_BYTES // (8 * max(1, width)))
    taken = room.take("taken", (step, width), torch.float32).numpy()
    wide = room.take("wide", (step, width), torch.float64).numpy()
    found = np.empty(len(rows))
    for first in range(0, len(rows), step):
        few = rows[first : first + step]
        num = len(few)
        np.take(values, few, axis=0, out=taken[:num], mode="clip")  # else it is copied once more
        np.copyto(wide[:num], taken[:num])
        np.multiply(wide[:num], query, out=wide[:num])
        np.add.reduce(wide[:num], 1, out=found[first : first + num])
    return found
