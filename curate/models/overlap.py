"""Which texts of evaluation sets stand, as a whole or in runs of words, in other examples.

Shapes: W words of a block, U texts that are looked for, M places where a run stands, G different
runs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from curate.models.sought import Sought, covered_words
from curate.models.text_pieces import Block, Pieces, Rules, blocks_of, whole_texts
from curate.models.text_runs import Flags, Hashes, Places

_SIEVE_BITS = (12, 28)
_MATCHES = 4_000_000
"""Places that are compared at a time."""

MATCHES = {"row": pl.Int64(), "set": pl.Int32(), "example": pl.Int64(), "share": pl.Float64(),
           "exact": pl.Boolean()}  # fmt: skip
"""Columns of what `matches_in` finds."""


class Table(NamedTuple):
    """The runs of one size that are looked for."""

    size: int
    runs: Hashes
    """(G,) ascending."""
    bounds: Places
    """(G + 1,) where each run stands."""
    texts: npt.NDArray[np.int32]
    """(M,)"""
    places: npt.NDArray[np.int32]
    """(M,)"""
    sieve: Flags
    """Whether the low bits of some run are these: small for few runs, so that it stays in cache."""

    @classmethod
    def of(cls, size: int, runs: Hashes, texts: Places, places: Places) -> "Table":
        """Of (M,) runs, as they come."""
        order = np.argsort(runs, kind="stable")
        distinct, firsts = np.unique(runs[order], return_index=True)
        bits = int(np.clip(np.ceil(np.log2(8 * max(1, len(distinct)))), *_SIEVE_BITS))
        sieve = np.zeros(1 << bits, dtype=np.bool_)
        sieve[distinct & np.uint64(len(sieve) - 1)] = True
        bounds = np.append(firsts, len(runs))
        own = (texts[order].astype(np.int32), places[order].astype(np.int32))
        return cls(size, distinct, bounds, *own, sieve)


@dataclass(frozen=True, slots=True)
class Index:
    """All that is looked for, of all sets, made once for many blocks."""

    sets: tuple[str, ...]
    tables: tuple[Table, ...]
    sizes: Places
    """(U,)"""
    coverable: Places
    """(U,)"""
    text_sets: npt.NDArray[np.int32]
    """(U,)"""
    examples: Places
    """(U,) place in the set."""
    wholes: pl.DataFrame
    """key, set, example."""

    @classmethod
    def of(cls, sets: dict[str, Sought]) -> "Index":
        """Of all sets together."""
        found = list(sets.values())
        counts = [len(each.sizes) for each in found]
        before = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        runs = _all([each.runs for each in found], np.uint64)
        texts = _all([e.texts + b for e, b in zip(found, before, strict=False)], np.int64)
        places = _all([each.places for each in found], np.int64)
        sizes = _all([each.sizes for each in found], np.int64)
        tables: list[Table] = []
        for size in np.unique(sizes[texts]).tolist():
            own = sizes[texts] == size
            tables.append(Table.of(size, runs[own], texts[own], places[own]))
        frames = [
            pl.DataFrame({"key": each.wholes, "example": each.whole_examples}).with_columns(
                set=pl.lit(number, pl.Int32)
            )
            for number, each in enumerate(found)
        ]
        empty = pl.DataFrame(schema={"key": pl.UInt64, "example": pl.Int64, "set": pl.Int32})
        return cls(
            sets=tuple(sets),
            tables=tuple(tables),
            sizes=sizes,
            coverable=_all([each.coverable for each in found], np.int64),
            text_sets=np.repeat(np.arange(len(found), dtype=np.int32), counts),
            examples=_all([each.examples for each in found], np.int64),
            wholes=pl.concat([empty, *frames]),
        )


def matches_in(pieces: Pieces, index: Index, rules: Rules, *, found_from: float) -> pl.DataFrame:
    """What stands in the rows: all pairs with at least that share, and of each row the best one.

    Returns:
        `MATCHES`: row, number of the set, place of the example in it, share of its words (of the
        text of it that is found best), and whether a text of both is equal; by row, best first.
    """
    frames = [pl.DataFrame(schema=MATCHES)]
    for block in blocks_of(pieces):
        own_rows = np.repeat(np.arange(len(block.rows)), np.diff(block.bounds))  # (W,)
        for table in index.tables:
            frames += _partial(block, own_rows, index, table, found_from)
        frames.append(_equal(block, index, rules))
    order = [pl.col("row"), -pl.col("share"), ~pl.col("exact"), pl.col("set"), pl.col("example")]
    return (
        pl.concat(frames)
        .group_by("row", "set", "example")
        .agg(pl.col("share").max(), pl.col("exact").any())
        .sort(order)
        .filter((pl.col("share") >= found_from) | pl.col("row").is_first_distinct())
    )


def _partial(
    block: Block, own_rows: Places, index: Index, table: Table, found_from: float
) -> Iterator[pl.DataFrame]:
    """Pairs by runs of one size."""
    hashes = block.words.windows(table.size)
    hits = np.flatnonzero(table.sieve[hashes & np.uint64(len(table.sieve) - 1)])
    hits = hits[own_rows[hits] == own_rows[hits + table.size - 1]]
    hits = hits[np.argsort(hashes[hits])]  # neighbours in the table are looked up in turn
    places = np.minimum(np.searchsorted(table.runs, hashes[hits]), len(table.runs) - 1)
    known = table.runs[places] == hashes[hits]
    pairs = np.unique(own_rows[hits[known]] * len(table.runs) + places[known])
    rows, runs = np.divmod(pairs, len(table.runs))
    counts = table.bounds[runs + 1] - table.bounds[runs]
    for part in _some(rows, counts):
        yield _shares(block, index, table, (rows[part], runs[part], counts[part]), found_from)


def _some(rows: Places, counts: Places) -> Iterator[slice]:
    """Whole rows, as many as have so many places."""
    ends = np.cumsum(counts)
    borders = np.append(np.flatnonzero(np.diff(rows)) + 1, len(rows))
    first = 0
    while first < len(rows):
        before = int(ends[first - 1]) if first else 0
        fitting = int(np.searchsorted(ends, before + _MATCHES, side="right"))
        last = int(borders[max(np.searchsorted(borders, fitting, side="right") - 1, 0)])
        last = last if last > first else int(borders[np.searchsorted(borders, first, side="right")])
        yield slice(first, last)
        first = last


def _shares(
    block: Block,
    index: Index,
    table: Table,
    hits: tuple[Places, Places, Places],
    found_from: float,
) -> pl.DataFrame:
    """Pairs of some rows, but for those that are neither large nor the row's largest.

    Args:
        hits: rows, runs that stand in them, and at how many places each run stands.
    """
    rows, runs, counts = hits
    each = np.repeat(np.arange(len(rows)), counts)
    places = np.arange(len(each)) - np.repeat(np.cumsum(counts) - counts, counts)
    places += table.bounds[runs[each]]
    texts = table.texts[places].astype(np.int64)
    first = table.places[places].astype(np.int64)
    found = covered_words(rows[each], texts, first, index.sizes)
    shares = found.words / index.coverable[found.texts]
    _, starts, codes = np.unique(found.rows, return_index=True, return_inverse=True)
    largest = np.maximum.reduceat(shares, starts)[codes] if len(shares) else shares
    kept = (shares >= found_from) | (shares == largest)
    return pl.DataFrame(
        {
            "row": block.rows[found.rows[kept]],
            "set": index.text_sets[found.texts[kept]],
            "example": index.examples[found.texts[kept]],
            "share": shares[kept],
            "exact": np.zeros(int(kept.sum()), dtype=np.bool_),
        },
        schema=MATCHES,
    )


def _equal(block: Block, index: Index, rules: Rules) -> pl.DataFrame:
    """Pairs with an equal text."""
    keys, rows, _ = whole_texts(block, rules)
    own = pl.DataFrame({"key": keys, "row": block.rows[rows]}).unique()
    found = own.join(index.wholes, on="key", how="inner")
    return found.select(
        pl.col("row").cast(pl.Int64), "set", "example",
        share=pl.lit(1.0), exact=pl.lit(True),
    )  # fmt: skip


def _all(parts: list[npt.NDArray[Any]], kind: type[np.generic]) -> npt.NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype=kind), *parts])
