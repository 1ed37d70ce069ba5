"""The rows of a gradient index with the largest inner products: an exact scan, block by block.

    score(i, q) = <phi_i, q> * factor_i

Every block of rows is multiplied with all queries in float32, or in float64 where the bound
|fl(x . y) - x . y| <= k eps / 2 |x| |y| of float32 lets too many rows through. What can be among
the best is multiplied again in float64, one row at a time: so neither blocks, nor parts, nor
threads change a digit of the result, and ties go to the first row.

`approximate` multiplies in bfloat16, or int8 rows as such, and keeps the best 4 K of each query.
The K that seem best are multiplied again in the same way, from rows of a finer type where there are
such, and of the others those that can be better if they are hardly further off than these were.
`measure_recall` tells what that loses.

The lowest scores are the best of the negated queries. Influence under a curvature is the scan of
plain rows with preconditioned queries.

Cost: 2 N k Q flops and one reading of the rows; a block and its (Q, B) scores in memory.
Shapes: N rows of all parts, k numbers of a row, Q queries, K results of each, B rows of a block, S
scales of a row, G groups of queries.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from curate.errors import ConfigError, InputError
from curate.models.scan_best import Candidates, Found, Ranked
from curate.models.scan_products import Queries, lengths_of, takes_int8
from curate.models.scan_rows import Floats, Places, ScanPart, pieces, rows_at_once

__all__ = ["Found", "ScanPart", "mean_queries", "measure_recall", "merge", "recall_of", "scan",
           "score_blocks"]  # fmt: skip

WIDENING = 4
"""Candidates of an approximate scan by results."""
_CAUTION = 1.25
"""How far off the others may be, by the largest error of those that are read first."""
_LEAST_READ = 64
"""Candidates whose errors tell of the others'."""


def scan(
    parts: Sequence[ScanPart],
    queries: Tensor,
    *,
    num_best: int,
    approximate: bool = False,
    finer: Sequence[ScanPart] | None = None,
    block_rows: int | None = None,
    device: torch.device | str = "cpu",
) -> Found:
    """Rows with the highest scores; equal scores in order of position.

    Args:
        parts: of one index.
        queries: (Q, k) of any float type.
        num_best: K.
        approximate: in bfloat16 or int8, with exact scores for the best of 4 K candidates.
        finer: the same rows in a finer type, of which only those are read; `parts` themselves
            unless given.
        block_rows: at a time; as many as fit 8 MiB (64 on an accelerator) unless given.
        device: where the blocks are multiplied.

    Raises:
        ConfigError: `num_best` or `block_rows` is less than 1, or `finer` makes no sense.
        InputError: a query is not finite.
    """
    if num_best < 1 or (block_rows is not None and block_rows < 1):
        raise ConfigError("nothing was asked for", fix="ask for at least 1 row, in blocks of some")
    _check_finer(parts, finer, approximate=approximate)
    asked = Queries(queries, device)
    last = parts if finer is None else finer
    if approximate:
        kept = Candidates(len(asked), WIDENING * num_best, None)
    else:
        kept = Candidates(len(asked), num_best, _Settling(last, asked, num_best))
    place = asked.room.device
    is_small = approximate and all(takes_int8(part.header, place) for part in parts)
    block = rows_at_once(
        parts, len(asked), place, given=block_rows, number_bytes=1 if is_small else 4
    )
    for start, piece in pieces(parts, block):
        if approximate:
            kept.add(start, asked.coarse(piece))
        else:
            _add_exact(kept, asked, start, piece)
    held = dict(enumerate(kept.best()))
    positions = {query: places for query, (places, _) in held.items()}
    if approximate:
        positions, exact = _read_again(last, asked, held, num_best)
    else:
        exact = asked.exact(last, positions)
    best = Ranked(len(asked), num_best)
    for query, places in positions.items():
        best.put(query, places, exact[query])
    return best.found


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
        block_rows: at a time; as many as fit 8 MiB (64 on an accelerator) unless given.
        device: where the blocks are multiplied.

    Raises:
        InputError: a query is not finite.
    """
    asked = Queries(queries, device)
    block = rows_at_once(parts, len(asked), asked.room.device, given=block_rows)
    for start, piece in pieces(parts, block):
        values = asked.room.values(piece)
        usable = piece.can_be_used(np.isfinite(lengths_of(values)))
        products = asked.products(values, torch.float64).cpu().numpy() * asked.lengths[:, None]
        yield start, np.where(usable, products * piece.all_factors(), np.nan)


def merge(found: Sequence[Found], starts: Sequence[int]) -> Found:
    """The best of several scans of the same queries, each over its own rows.

    Args:
        found: with as many results each.
        starts: position of the first row of each.
    """
    best = Ranked(*found[0].positions.shape)
    for query in range(len(best.found.positions)):
        held = [one.positions[query] >= 0 for one in found]
        pairs = list(zip(found, held, strict=True))
        positions = [
            one.positions[query][has] + start
            for (one, has), start in zip(pairs, starts, strict=True)
        ]
        scores = [one.scores[query][has] for one, has in pairs]
        best.put(query, np.concatenate(positions), np.concatenate(scores))
    return best.found


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
    finer: Sequence[ScanPart] | None = None,
    block_rows: int | None = None,
    device: torch.device | str = "cpu",
) -> float:
    """Mean share of the exact results that the approximate scan finds; NaN where there are no rows.

    Args:
        parts: of one index.
        queries: (Q, k), of which `most` are taken at even distances.
        num_best: K.
        most: queries that are scanned twice.
        finer: as in `scan`; the exact results are theirs.
        block_rows: as in `scan`.
        device: as in `scan`.
    """
    taken = np.unique(np.linspace(0, len(queries) - 1, min(most, len(queries))).round())
    some = queries[torch.from_numpy(taken.astype(np.int64)).to(queries.device)]
    shared = partial(scan, queries=some, num_best=num_best, block_rows=block_rows, device=device)
    exact = shared(parts if finer is None else finer)
    found = shared(parts, approximate=True, finer=finer)
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


def _add_exact(kept: Candidates, asked: Queries, start: int, piece: ScanPart) -> None:
    found = asked.bounded(piece)
    if found is not None and found.scores.dtype == np.float32 and kept.is_crowded(*found):
        # Preconditioned queries are long beside their scores.
        asked.widen()
        found = asked.bounded(piece)
    if found is not None:
        kept.add(start, found.scores, found.slack)


def _read_again(
    parts: Sequence[ScanPart],
    asked: Queries,
    held: Mapping[int, tuple[Places, Floats]],
    num_best: int,
) -> tuple[dict[int, Places], dict[int, Floats]]:
    """Candidates that can be among the best, of each query, and their exact scores.

    Those that seem best are read; how far off they were says which others may be better.
    """
    first: dict[int, npt.NDArray[np.bool_]] = {}
    num_first = max(num_best, _LEAST_READ)
    for query, (positions, coarse) in held.items():
        first[query] = np.zeros(len(positions), dtype=bool)
        first[query][np.lexsort((positions, -coarse))[:num_first]] = True
    exact = asked.exact(parts, {query: held[query][0][mine] for query, mine in first.items()})
    others: dict[int, npt.NDArray[np.bool_]] = {}
    for query, (_, coarse) in held.items():
        found = exact[query] / (float(asked.lengths[query]) or 1.0)
        off = _CAUTION * np.abs(found - coarse[first[query]]).max(initial=0)
        last = np.sort(found)[-num_best:].min(initial=np.inf)
        others[query] = ~first[query] & (coarse >= last - off)
    more = asked.exact(parts, {query: held[query][0][mine] for query, mine in others.items()})
    places = {
        query: np.concatenate([positions[first[query]], positions[others[query]]])
        for query, (positions, _) in held.items()
    }
    return places, {query: np.concatenate([exact[query], more[query]]) for query in held}


class _Settling(NamedTuple):
    """Decides between rows by their exact scores."""

    parts: Sequence[ScanPart]
    asked: Queries
    num_best: int

    def __call__(self, query: int, positions: Places) -> tuple[Places, Floats]:
        scores = self.asked.exact(self.parts, {query: positions})[query]
        order = np.sort(np.lexsort((positions, -scores))[: self.num_best])
        length = float(self.asked.lengths[query])
        return positions[order], scores[order] / (length if length > 0 else 1)


def _check_finer(
    parts: Sequence[ScanPart], finer: Sequence[ScanPart] | None, *, approximate: bool
) -> None:
    if finer is None:
        return
    if not approximate:
        raise ConfigError("an exact scan has no finer rows", fix="scan the finer rows themselves")
    sizes = [[(part.num_rows, part.header.blocks) for part in one] for one in (parts, finer)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            "the finer rows are not those that are scanned", fix="give the same parts in each type"
        )
