"""The rows of a gradient index with the largest inner products: an exact scan, block by block.

    score(i, q) = <phi_i, q> * factor_i

Every block of rows is multiplied with all queries in float32. What can be among the best, by the
bound |fl(x . y) - x . y| <= k eps |x| |y|, is multiplied again in float64, one row at a time: so
neither blocks, nor parts, nor threads change a digit of the result, and ties go to the first row.
`approximate` multiplies in bfloat16 instead, keeps the best 4 K of each query, and multiplies those
again in the same way; `measure_recall` tells what that loses.

The lowest scores are the best of the negated queries. Influence under a curvature is the scan of
plain rows with preconditioned queries.

Cost: 2 N k Q flops and one reading of the rows; a block and its (Q, B) scores in memory.
Shapes: N rows of all parts, k numbers of a row, Q queries, K results of each, B rows of a block, S
scales of a row, G groups of queries.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from curate.errors import ConfigError, InputError
from curate.models.index_rows import Header, as_tensor, decode_rows

Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]

WIDENING = 4
"""Candidates of an approximate scan by results."""
_BLOCK_BYTES = 64 * 2**20
_CHUNK = 256
_LARGEST, _SMALLEST = 1e30, 1e-20
"""Lengths of rows between which products of float32 neither overflow nor lose digits."""


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


class Found(NamedTuple):
    """The best rows of each query, best first."""

    positions: Places
    """(Q, K) counted over all parts; -1 where there are fewer rows."""
    scores: Floats
    """(Q, K) NaN where there are fewer rows."""


def scan(
    parts: Sequence[ScanPart],
    queries: Tensor,
    *,
    num_best: int,
    approximate: bool = False,
    block_rows: int | None = None,
    device: torch.device | str = "cpu",
) -> Found:
    """Rows with the highest scores; equal scores in order of position.

    Args:
        parts: of one index.
        queries: (Q, k) of any float type.
        num_best: K.
        approximate: in bfloat16, with exact scores for the best 4 K.
        block_rows: at a time; as many as fit 64 MiB unless given.
        device: where the blocks are multiplied.

    Raises:
        ConfigError: `num_best` or `block_rows` is less than 1.
        InputError: a query is not finite.
    """
    if num_best < 1 or (block_rows is not None and block_rows < 1):
        raise ConfigError("nothing was asked for", fix="ask for at least 1 row, in blocks of some")
    asked = _Queries.of(queries, torch.device(device))
    kept = [_Best(num_best * (WIDENING if approximate else 1)) for _ in asked.values]
    for start, piece in _pieces(parts, _rows_at_once(parts, len(asked.values), block_rows)):
        if approximate:
            _add_approximate(kept, asked, start, piece)
        else:
            _add_exact(kept, asked, start, piece)
    if approximate:
        kept = [
            _exact_again(parts, query, best, num_best)
            for query, best in zip(asked.values, kept, strict=True)
        ]
    return _padded(kept, num_best)


def score_blocks(
    parts: Sequence[ScanPart],
    queries: Tensor,
    *,
    block_rows: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[int, Floats]]:
    """All scores in float64: position of the first row of each block, and its (Q, B).

    NaN where a row is not used. The last digits may depend on the blocks.

    Args:
        parts: of one index.
        queries: (Q, k).
        block_rows: at a time; as many as fit 64 MiB unless given.
        device: where the blocks are multiplied.

    Raises:
        InputError: a query is not finite.
    """
    asked = _Queries.of(queries, torch.device(device))
    for start, piece in _pieces(parts, _rows_at_once(parts, len(asked.values), block_rows)):
        values = _decoded(piece)
        usable = _usable(piece, values.isfinite().all(1).numpy())
        products = asked.products(values, torch.float64)
        yield start, _scores(products, piece, usable, unused=np.nan)


def merge(found: Sequence[Found], starts: Sequence[int]) -> Found:
    """The best of several scans of the same queries, each over its own rows.

    Args:
        found: with as many results each.
        starts: position of the first row of each.
    """
    num_best = found[0].positions.shape[1]
    kept = [_Best(num_best) for _ in found[0].positions]
    for one, start in zip(found, starts, strict=True):
        for best, positions, scores in zip(kept, one.positions, one.scores, strict=True):
            held = positions >= 0
            best.add(positions[held] + start, scores[held])
    return _padded(kept, num_best)


def recall_of(found: Found, exact: Found) -> Floats:
    """(Q,) share of the exact results that were found; results of equal score stand for each other.

    NaN where there is nothing to be found.
    """
    num_held = (exact.positions >= 0).sum(1)
    last = np.where(np.isnan(exact.scores), np.inf, exact.scores).min(1, keepdims=True)
    hits = (found.scores >= last).sum(1)
    return np.where(num_held > 0, hits / np.maximum(num_held, 1), np.nan)


def measure_recall(
    parts: Sequence[ScanPart],
    queries: Tensor,
    *,
    num_best: int,
    most: int = 100,
    block_rows: int | None = None,
    device: torch.device | str = "cpu",
) -> float:
    """Mean share of the exact results that the approximate scan finds; NaN where there are no rows.

    Args:
        parts: of one index.
        queries: (Q, k), of which `most` are taken at even distances.
        num_best: K.
        most: queries that are scanned twice.
        block_rows: as in `scan`.
        device: as in `scan`.
    """
    taken = np.unique(np.linspace(0, len(queries) - 1, min(most, len(queries))).round())
    some = queries[torch.from_numpy(taken.astype(np.int64)).to(queries.device)]
    exact, found = (
        scan(
            parts,
            some,
            num_best=num_best,
            approximate=approximate,
            block_rows=block_rows,
            device=device,
        )
        for approximate in (False, True)
    )
    return float(recall_of(found, exact).mean())


def mean_queries(rows: Tensor, groups: npt.NDArray[np.int64] | None = None) -> Tensor:
    """One query for all rows, or for each group: the mean of those that are finite.

    Args:
        rows: (n, k) of any float type.
        groups: (n,) in [0, G), all in one group unless given.

    Returns:
        (G, k) float64.

    Raises:
        InputError: a group has no row that is finite.
    """
    values = rows.detach().double().cpu()
    chosen = torch.zeros(len(values), dtype=torch.int64) if groups is None else torch.tensor(groups)
    num_groups = int(chosen.max()) + 1 if len(chosen) else 1
    held = values.isfinite().all(1)
    counts = torch.bincount(chosen[held], minlength=num_groups)
    if not bool(counts.all()):
        raise InputError(
            f"no query of group {int(counts.argmin())} has a gradient",
            fix="look at the reasons for which the target's examples were set aside",
        )
    totals = torch.zeros(num_groups, values.shape[1], dtype=torch.float64)
    totals.index_add_(0, chosen[held], values[held])
    return totals / counts[:, None]


class _Queries(NamedTuple):
    """Queries, as they are and of unit length."""

    values: Floats
    """(Q, k)"""
    lengths: Floats
    """(Q,)"""
    unit: Tensor
    """(Q, k) float64 on the device; zeros stay zeros."""

    @classmethod
    def of(cls, queries: Tensor, device: torch.device) -> "_Queries":
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
        return cls(values, (largest * rest)[:, 0], torch.from_numpy(unit).to(device))

    def products(self, rows: Tensor, dtype: torch.dtype) -> Floats:
        """(Q, B) float64 inner products, multiplied in `dtype`."""
        rows = rows.to(self.unit.device)
        found = self.unit.to(dtype) @ rows.to(dtype).T
        return found.double().cpu().numpy() * self.lengths[:, None]


class _Best:
    """The best rows that one query has met."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.positions: Places = np.empty(0, np.int64)
        self.scores: Floats = np.empty(0, np.float64)

    @property
    def last(self) -> float:
        """What a row must reach to matter."""
        return float(self.scores[-1]) if len(self.scores) == self.size else -np.inf

    def add(self, positions: Places, scores: Floats) -> None:
        positions = np.concatenate([self.positions, positions])
        scores = np.concatenate([self.scores, scores])
        order = np.lexsort((positions, -scores))[: self.size]
        self.positions, self.scores = positions[order], scores[order]


def _padded(kept: Sequence[_Best], num_best: int) -> Found:
    positions = np.full((len(kept), num_best), -1, np.int64)
    scores = np.full((len(kept), num_best), np.nan)
    for query, best in enumerate(kept):
        num_held = min(num_best, len(best.scores))
        positions[query, :num_held] = best.positions[:num_held]
        scores[query, :num_held] = best.scores[:num_held]
    return Found(positions, scores)


def _rows_at_once(parts: Sequence[ScanPart], num_queries: int, block_rows: int | None) -> int:
    if block_rows is not None:
        return block_rows
    width = max((part.header.width for part in parts), default=1)
    return max(1, _BLOCK_BYTES // (4 * max(width, 2 * num_queries, 1)))


def _pieces(parts: Sequence[ScanPart], block_rows: int) -> Iterator[tuple[int, ScanPart]]:
    """Rows that are multiplied together, and the position of the first of them."""
    start = 0
    for part in parts:
        for first in range(0, len(part.stored), block_rows):
            rows = slice(first, first + block_rows)
            yield start + first, _taken(part, rows)
        start += len(part.stored)


def _taken(part: ScanPart, rows: slice | Places) -> ScanPart:
    return ScanPart(
        part.stored[rows],
        part.header,
        None if part.scales is None else part.scales[rows],
        None if part.usable is None else part.usable[rows],
        None if part.factors is None else part.factors[rows],
    )


def _decoded(piece: ScanPart) -> Tensor:
    """(B, k) float32."""
    return decode_rows(piece.stored, piece.scales, piece.header)


def _coarse(piece: ScanPart, device: torch.device) -> Tensor:
    """(B, k) bfloat16 on the device, without the detour over float32."""
    values = as_tensor(piece.stored, piece.header.dtype).to(device).bfloat16()
    if not piece.header.num_scales:
        return values
    assert piece.scales is not None
    scales = torch.from_numpy(np.array(piece.scales, dtype=np.float32)).to(device).bfloat16()
    if piece.header.dtype == "int8":
        sizes = torch.tensor([block.size for block in piece.header.blocks], device=device)
        scales = scales.repeat_interleave(sizes, 1)
    return values * scales


def _usable(piece: ScanPart, finite: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """(B,)"""
    if piece.usable is not None:
        finite = finite & np.asarray(piece.usable, dtype=bool)
    if piece.factors is not None:
        finite = finite & np.isfinite(piece.factors)
    return finite


def _factors(piece: ScanPart) -> Floats:
    """(B,)"""
    if piece.factors is None:
        return np.ones(len(piece.stored))
    return np.asarray(piece.factors, dtype=np.float64)


def _scores(
    products: Floats, piece: ScanPart, usable: npt.NDArray[np.bool_], *, unused: float
) -> Floats:
    """(Q, B), `unused` where a row has none."""
    found = np.full(products.shape, unused)
    found[:, usable] = products[:, usable] * _factors(piece)[usable]
    return found


def _add_exact(kept: Sequence[_Best], asked: _Queries, start: int, piece: ScanPart) -> None:
    values = _decoded(piece)
    lengths = torch.linalg.vector_norm(values, dim=1, dtype=torch.float64).numpy()
    usable = _usable(piece, np.isfinite(lengths))
    if not usable.any():
        return
    factors = _factors(piece)
    dtype = _multiplied_in(lengths[usable], values.shape[1])
    scores = _scores(asked.products(values, dtype), piece, usable, unused=-np.inf)
    reach = float((lengths[usable] * np.abs(factors[usable])).max())
    slack = (values.shape[1] + 8) * torch.finfo(dtype).eps * reach * asked.lengths  # (Q,)
    numbers = values.numpy()
    for query, best in enumerate(kept):
        near = _near(scores[query], usable, best, float(slack[query]))
        if len(near):
            exact = _products(numbers, near, asked.values[query]) * factors[near]
            best.add(near + start, exact)


def _multiplied_in(lengths: Floats, width: int) -> torch.dtype:
    """float32 where its rounding is bounded."""
    held = lengths[lengths > 0]
    tame = not len(held) or (held.max() <= _LARGEST and held.min() >= _SMALLEST)
    # Else the products may be those of TF32 or bfloat16.
    strict = torch.get_float32_matmul_precision() == "highest"
    few = width * torch.finfo(torch.float32).eps < 0.1
    return torch.float32 if tame and strict and few else torch.float64


def _near(scores: Floats, usable: npt.NDArray[np.bool_], best: _Best, slack: float) -> Places:
    """Rows of a block that can be among the best, where each score is within `slack` of its own."""
    near = np.flatnonzero((scores >= best.last - slack) & usable)
    if len(near) > best.size:
        place = len(near) - best.size
        last = np.partition(scores[near], place)[place]
        near = near[scores[near] >= last - 2 * slack]
    return near


def _products(values: npt.NDArray[Any], rows: Places, query: Floats) -> Floats:
    """(n,) each by its own sum, so that it does not depend on what is beside it."""
    chunks = [rows[first : first + _CHUNK] for first in range(0, len(rows), _CHUNK)]
    return np.concatenate([(values[chunk] * query).sum(1) for chunk in chunks])


def _add_approximate(kept: Sequence[_Best], asked: _Queries, start: int, piece: ScanPart) -> None:
    products = asked.products(_coarse(piece, asked.unit.device), torch.bfloat16)
    usable = _usable(piece, np.ones(len(piece.stored), dtype=bool))
    if not np.isfinite(products[:, usable]).all():  # rows that are not finite, or leave the type
        values = _decoded(piece)
        usable = _usable(piece, values.isfinite().all(1).numpy())
        products = asked.products(values, torch.float64)
    scores = _scores(products, piece, usable, unused=-np.inf)
    for query, best in enumerate(kept):
        near = _near(scores[query], usable, best, 0.0)
        if len(near):
            best.add(near + start, scores[query][near])


def _exact_again(
    parts: Sequence[ScanPart], query: Floats, candidates: _Best, num_best: int
) -> _Best:
    """The best of the candidates by scores in float64."""
    best = _Best(num_best)
    positions = np.sort(candidates.positions)
    start = 0
    for part in parts:
        held = positions[(positions >= start) & (positions < start + len(part.stored))] - start
        for first in range(0, len(held), _CHUNK):
            rows = held[first : first + _CHUNK]
            piece = _taken(part, rows)
            found = _products(_decoded(piece).numpy(), np.arange(len(rows)), query)
            best.add(rows + start, found * _factors(piece))
        start += len(part.stored)
    return best
