"""Nearest vectors, exact or approximate, among more of them than memory holds.

Exact search goes over the vectors block by block. faiss finds candidates in float32, a few more
than asked for; these are valued anew in float64 and ordered by value, then position. Where an
error of float32 could have kept a better row out of the candidates, which mostly means many equal
rows, that query is searched once more over all rows within the error. The answer therefore does
not depend on blocks, parts, threads or device.

Approximate search is that of an inverted file: only the cells nearest to a query are looked into.
Cells are learned from a sample, filled shard by shard, and what was missed is measured. faiss's own
inverted files go through their cells query by query; here all queries of a cell are compared with
its rows at once, which is several times as fast for the many queries that this is for.

Shapes: Q queries, N vectors, d dimensions, k neighbours.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from curate.errors import ConfigError
from curate.vectors.engine import faiss_module, gpu_number, gpu_resources, is_gpu
from curate.vectors.store import BLOCK_ROWS, Floats, Positions, Vectors

Metric = Literal["inner", "l2"]

_SHARD_BYTES = 1 << 28
_PAIR_NUMBERS = 1 << 22
_TABLE_NUMBERS = 1 << 24
_RECALL_QUERIES = 200


class Neighbours(NamedTuple):
    """The k nearest of each query, best first."""

    values: Floats
    """(Q, k) inner products, descending, or distances (not squared), ascending; NaN where there
    are fewer than k."""
    positions: Positions
    """(Q, k) rows of the vectors; -1 where there are fewer than k."""


def nearest(
    queries: npt.NDArray[np.floating],
    vectors: Vectors,
    k: int,
    *,
    metric: Metric = "inner",
    exclude: Positions | None = None,
    threads: int = 1,
    device: str = "cpu",
    block_rows: int = BLOCK_ROWS,
) -> Neighbours:
    """The nearest vectors of each query, exactly; equal values by position.

    Args:
        queries: (Q, d); a query with NaN has no neighbours.
        vectors: where to search; rows without a vector are never found.
        k: how many, at least 1.
        metric: `inner` for the largest inner products, `l2` for the smallest distances.
        exclude: (Q,) a position never returned for each query, as its own; -1 for none.
        threads: of the CPU.
        device: `cpu` or `cuda`.
        block_rows: vectors in memory at a time.

    Raises:
        ConfigError: k is not positive, or queries and vectors have different widths.
        MissingDependencyError: faiss, or its build for the GPU asked for, is missing.
    """
    queries, asked = _checked(queries, vectors, k)
    found = _empty(len(queries), k)
    if not len(asked):
        return found
    wanted = k + (exclude is not None)
    scan = _Scan(queries[asked], vectors, wanted, metric=metric, threads=threads, device=device)
    values, positions = scan.run(block_rows)
    _put(found, asked, values, positions, metric=metric, exclude=exclude)
    return found


def nearest_approximate(
    queries: npt.NDArray[np.floating],
    vectors: Vectors,
    k: int,
    *,
    metric: Metric = "inner",
    exclude: Positions | None = None,
    cells: int | None = None,
    probes: int = 16,
    seed: int = 0,
    threads: int = 1,
    device: str = "cpu",
    block_rows: int | None = None,
    recall_queries: int = _RECALL_QUERIES,
) -> tuple[Neighbours, float]:
    """Nearly the nearest vectors of each query, from the cells nearest to it.

    Values are those of the rows found, in float64 like those of `nearest`. Worth its while from
    several times as many queries as there are cells, since every vector is put into a cell first.

    Args:
        queries: (Q, d); a query with NaN has no neighbours.
        vectors: where to search.
        k: how many, at least 1.
        metric: as of `nearest`.
        exclude: as of `nearest`.
        cells: how many cells the vectors are split into; by default sqrt(N).
        probes: cells looked into for each query.
        seed: of the cells and of the queries that recall is measured on.
        threads: of the CPU.
        device: `cpu` or `cuda`.
        block_rows: vectors in memory at a time; by default a quarter of a gibibyte's worth.
        recall_queries: on how many queries recall is measured against `nearest`.

    Returns:
        The neighbours, and the recall: the share of the exact neighbours' places that are taken by
        rows just as near; NaN without queries or vectors.
    """
    from curate.vectors.clusters import kmeans  # which assigns by `nearest`

    queries, asked = _checked(queries, vectors, k)
    found = _empty(len(queries), k)
    num_usable = len(vectors.usable())
    if not len(asked) or not num_usable:
        return found, float("nan")
    if cells is None:
        cells = max(1, round(num_usable**0.5))
    if cells < 1 or probes < 1:
        raise ConfigError(
            f"cells is {cells} and probes {probes}", fix="ask for at least one of each"
        )
    wanted = k + (exclude is not None)
    scan = _Scan(queries[asked], vectors, wanted, metric=metric, threads=threads, device=device)
    centroids = kmeans(
        vectors, cells, seed=seed, iterations=10, max_rows_per_centroid=64,
        spherical=metric == "inner", threads=threads, device=device,
    )  # fmt: skip
    rows = block_rows or max(1, _SHARD_BYTES // (4 * vectors.dim))
    scan.probe(centroids, min(probes, cells), rows)
    values, positions = scan.ranked()
    _put(found, asked, values, positions, metric=metric, exclude=exclude)
    sample = np.random.default_rng(seed).permutation(asked)[:recall_queries]
    exact = nearest(
        queries[sample], vectors, k, metric=metric, threads=threads, device=device,
        exclude=None if exclude is None else exclude[sample],
    )  # fmt: skip
    return found, _recall(found.values[sample], exact.values, metric)


class _Scan:
    """One search under way: the best candidates of each query so far."""

    def __init__(
        self, queries: Floats, vectors: Vectors, k: int, *, metric: Metric, threads: int,
        device: str,
    ) -> None:  # fmt: skip
        self.queries, self.vectors, self.k = queries, vectors, k
        self.metric: Metric = metric
        self.threads, self.device = threads, device
        self.faiss = faiss_module(threads)
        self.width = k + max(2, min(8, k))  # what is beyond k shows whether k are surely right
        self.sign = 1.0 if metric == "l2" else -1.0  # candidates are kept so that less is better
        self._values = np.full((len(queries), self.width), np.inf, dtype=np.float32)
        self._positions = np.full((len(queries), self.width), -1, dtype=np.int64)
        self._largest = 0.0

    def run(self, block_rows: int) -> tuple[npt.NDArray[np.float64], Positions]:
        """Exact values, less is better, and positions (Q, k) of the k best rows."""
        for positions, block in _wide_blocks(self.vectors, block_rows):
            self._largest = max(self._largest, float(_norms(block).max()))
            self._look(slice(None), positions, block)
        values, positions = self.ranked()
        self._repair(values, positions, block_rows)
        return values, positions

    def probe(self, centroids: Floats, probes: int, block_rows: int) -> None:
        """Look only among the rows whose nearest centroid is one of a query's nearest."""
        centres = Vectors([centroids])
        cells = self._cells(self.queries, centres, probes)  # (Q, probes)
        order = np.argsort(cells, axis=None, kind="stable")
        asked = np.searchsorted(cells.ravel()[order], np.arange(len(centroids) + 1))
        for positions, block in _wide_blocks(self.vectors, block_rows):
            labels = self._cells(block, centres, 1)[:, 0]
            by_cell = np.argsort(labels, kind="stable")
            held = np.searchsorted(labels[by_cell], np.arange(len(centroids) + 1))
            for cell in np.flatnonzero(np.diff(held) * np.diff(asked)).tolist():
                rows = by_cell[held[cell] : held[cell + 1]]
                queries = order[asked[cell] : asked[cell + 1]] // probes
                self._look(queries, positions[rows], block[rows])

    def _cells(self, rows: Floats, centres: Vectors, probes: int) -> Positions:
        return nearest(
            rows, centres, probes, metric=self.metric, threads=self.threads, device=self.device
        ).positions

    def _look(self, queries: slice | Positions, positions: Positions, block: Floats) -> None:
        """Take the best rows of a block into the best so far, for some queries."""
        values, found = self._search(self.queries[queries], block)
        found = np.where(found < 0, -1, positions[found])
        worth = np.where(found < 0, np.inf, self.sign * values)
        both = np.concatenate([self._values[queries], worth], axis=1)
        best = np.argsort(both, axis=1, kind="stable")[:, : self.width]
        self._values[queries] = np.take_along_axis(both, best, axis=1)
        names = np.concatenate([self._positions[queries], found], axis=1)
        self._positions[queries] = np.take_along_axis(names, best, axis=1)

    def ranked(self) -> tuple[npt.NDArray[np.float64], Positions]:
        """The candidates valued anew and put in order: (Q, k) values and positions."""
        values = np.full(self._positions.shape, np.inf)
        rows, columns = np.nonzero(self._positions >= 0)
        values[rows, columns] = self.exact(rows, self._positions[rows, columns])
        order = np.lexsort((self._positions, values), axis=1)[:, : self.k]
        return (
            np.take_along_axis(values, order, axis=1),
            np.take_along_axis(self._positions, order, axis=1),
        )

    def exact(self, rows: Positions, positions: Positions) -> npt.NDArray[np.float64]:
        """Values of pairs of a query and a vector, squared distances or negative products."""
        values = np.empty(len(rows))
        step = max(1, _PAIR_NUMBERS // self.vectors.dim)
        for first in range(0, len(rows), step):
            some = slice(first, first + step)
            ours = self.queries[rows[some]].astype(np.float64)
            values[some] = self.against(ours, self.vectors.take(positions[some]))
        return values

    def against(self, ours: npt.NDArray[np.float64], theirs: Floats) -> npt.NDArray[np.float64]:
        """(n,) values of rows (n, d) with one another; `ours` is overwritten."""
        if self.metric == "l2":
            ours -= theirs
            return np.square(ours).sum(axis=1)
        ours *= theirs
        return -ours.sum(axis=1)

    def _search(self, queries: Floats, block: Floats) -> tuple[Floats, Positions]:
        faiss = self.faiss
        kind = faiss.METRIC_L2 if self.metric == "l2" else faiss.METRIC_INNER_PRODUCT
        width = min(self.width, len(block))
        if is_gpu(self.device):
            return faiss.knn_gpu(
                gpu_resources(), queries, block, width, metric=kind,
                device=gpu_number(self.device),
            )  # fmt: skip
        return faiss.knn(queries, block, width, metric=kind)

    def errors(self) -> npt.NDArray[np.float64]:
        """(Q,) by how much a value in float32 may be off: the worst case of a sum of d terms."""
        norms = _norms(self.queries)
        scale = norms * self._largest if self.metric == "inner" else (norms + self._largest) ** 2
        return (self.vectors.dim + 8) * 2.0**-24 * scale

    def _repair(
        self, values: npt.NDArray[np.float64], positions: Positions, block_rows: int
    ) -> None:
        """Search anew where rows that are no candidates could belong to the best k."""
        last = self._values[:, -1].astype(np.float64)  # whatever is no candidate is no better
        unsure = np.flatnonzero(~(values[:, -1] < last - self.errors()) & np.isfinite(last))
        groups = dict[bytes, list[int]]()
        for query in unsure.tolist():
            groups.setdefault(xxhash.xxh3_128_digest(self.queries[query]), []).append(query)
        leaders = np.array([members[0] for members in groups.values()], dtype=np.int64)
        if not len(leaders):
            return
        best = _Best(self, leaders, values[leaders, -1])
        for where, block in _wide_blocks(self.vectors, block_rows):
            best.look(where, block)
        for place, members in enumerate(groups.values()):
            values[members], positions[members] = best.values[place], best.positions[place]


class _Best:
    """The k best rows of a few queries, by going over all rows that come near."""

    def __init__(self, scan: _Scan, queries: Positions, bounds: npt.NDArray[np.float64]) -> None:
        self._scan, self._queries = scan, queries
        self._limits = bounds + scan.errors()[queries]
        self.values = np.full((len(queries), scan.k), np.inf)
        self.positions = np.full((len(queries), scan.k), -1, dtype=np.int64)

    def look(self, where: Positions, block: Floats) -> None:
        """Take the rows of one block, whose positions follow those of the blocks before."""
        scan = self._scan
        squares = np.square(_norms(block)) if scan.metric == "l2" else None
        step = max(1, _TABLE_NUMBERS // len(block))
        for first in range(0, len(self._queries), step):
            ours = scan.queries[self._queries[first : first + step]]
            table = ours @ block.T
            if squares is not None:
                table = np.square(_norms(ours))[:, None] + squares - 2.0 * table
            near = scan.sign * table <= self._limits[first : first + step, None]
            for place in np.flatnonzero(near.any(axis=1)).tolist():
                self._take(first + place, where, block, np.flatnonzero(near[place]))

    def _take(self, place: int, where: Positions, block: Floats, rows: Positions) -> None:
        scan = self._scan
        step = max(1, _PAIR_NUMBERS // scan.vectors.dim)
        query = scan.queries[self._queries[place]]
        for first in range(0, len(rows), step):
            some = rows[first : first + step]
            ours = np.repeat(query[None].astype(np.float64), len(some), axis=0)
            values = np.concatenate([self.values[place], scan.against(ours, block[some])])
            names = np.concatenate([self.positions[place], where[some]])
            order = np.lexsort((names, values))[: scan.k]
            self.values[place], self.positions[place] = values[order], names[order]


def _checked(
    queries: npt.NDArray[np.floating], vectors: Vectors, k: int
) -> tuple[Floats, Positions]:
    """The queries in float32, and which of them can be answered."""
    if k < 1:
        raise ConfigError(f"{k} neighbours were asked for", fix="ask for at least one")
    if queries.ndim != 2 or queries.shape[1] != vectors.dim:
        raise ConfigError(
            f"queries of shape {queries.shape} were given for vectors of {vectors.dim} dimensions",
            fix="make both by the same representation",
        )
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    return queries, np.flatnonzero(~np.isnan(queries).any(axis=1))


def _empty(num: int, k: int) -> Neighbours:
    return Neighbours(
        np.full((num, k), np.nan, dtype=np.float32), np.full((num, k), -1, dtype=np.int64)
    )


def _put(
    found: Neighbours, asked: Positions, values: npt.NDArray[np.float64], positions: Positions,
    *, metric: Metric, exclude: Positions | None,
) -> None:  # fmt: skip
    """Write what was found for some queries, without what each of them excludes."""
    k = found.values.shape[1]
    if exclude is not None:
        out = (positions == exclude[asked, None]) & (positions >= 0)
        order = np.argsort(out, axis=1, kind="stable")[:, :k]  # what is excluded goes last
        values = np.take_along_axis(np.where(out, np.inf, values), order, axis=1)
        positions = np.take_along_axis(np.where(out, -1, positions), order, axis=1)
    shown = np.sqrt(values) if metric == "l2" else -values
    found.values[asked] = np.where(positions < 0, np.nan, shown)
    found.positions[asked] = positions


def _wide_blocks(vectors: Vectors, rows: int) -> Iterator[tuple[Positions, Floats]]:
    """Blocks of at most `rows`, short ones of small parts put together."""
    kept: list[tuple[Positions, Floats]] = []
    size = 0
    for positions, block in vectors.blocks(rows):
        if kept and size + len(positions) > rows:
            yield _joined(kept)
            kept, size = [], 0
        kept.append((positions, block))
        size += len(positions)
    if kept:
        yield _joined(kept)


def _joined(blocks: list[tuple[Positions, Floats]]) -> tuple[Positions, Floats]:
    if len(blocks) == 1:
        return blocks[0]
    return np.concatenate([p for p, _ in blocks]), np.concatenate([b for _, b in blocks])


def _norms(rows: Floats) -> npt.NDArray[np.float64]:
    return np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))


def _recall(found: Floats, exact: Floats, metric: Metric) -> float:
    """Share of the exact neighbours' places whose row is just as near as theirs."""
    there = ~np.isnan(exact)
    if not there.any():
        return float("nan")
    sign = 1.0 if metric == "l2" else -1.0
    last = np.where(there, sign * exact, -np.inf).max(axis=1)
    return float((sign * found <= last[:, None])[there].mean())
