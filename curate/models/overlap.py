"""Which texts of some examples stand, as a whole or in runs of words, in other examples.

Shapes: R rows (examples), P pieces (texts of examples), W words of a block, U texts that are looked
for, M places where a run stands, G different runs, E examples that are looked for, Q pairs of a row
and a text.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import polars as pl

from curate.models.text_runs import Flags, Hashes, Places, Words, row_blocks, words_of

LEAST_TEMPLATE = 10
"""What stands in so few examples is no template, however small the set is."""

_SIEVE_BITS = (12, 28)
_MATCHES = 4_000_000
"""Places that are compared at a time."""
_MAIN = ("text", "prompt")
_SYSTEM = "system"


class Rules(Protocol):
    """The scorer's options that say what is looked for."""

    @property
    def ngrams(self) -> int: ...
    @property
    def shortest(self) -> int: ...
    @property
    def template(self) -> float: ...


class Pieces(NamedTuple):
    """The texts of some examples, each example's own in their order."""

    rows: Places
    """(P,) ascending."""
    texts: pl.Series
    """(P,) without null."""
    is_main: Flags
    """(P,) the text or the prompt, which are compared however short they are."""
    num_rows: int
    """R; a row may have no piece."""


class Block(NamedTuple):
    """The words of some rows."""

    words: Words
    rows: Places
    """(R,) those that have pieces in the block."""
    bounds: Places
    """(R + 1,) words of each."""
    piece_rows: Places
    """(P,) place in `rows` of each piece."""
    is_main: Flags


class Sought(NamedTuple):
    """What of an evaluation set is looked for."""

    runs: Hashes
    """(M,) ascending, equal ones by text and place."""
    texts: Places
    """(M,) the text in which each stands."""
    places: Places
    """(M,) its first word there."""
    sizes: Places
    """(U,) words of a run, the same for all of a text."""
    coverable: Places
    """(U,) words of the text that lie in its runs."""
    examples: Places
    """(U,) whose text it is."""
    wholes: Hashes
    """(X,) texts that are looked for as a whole, ascending."""
    whole_examples: Places
    """(X,)"""
    num_examples: int
    num_short: int
    """Examples too short to be looked for within others."""
    num_template: int
    """Examples all of whose runs are the set's template."""


class Covered(NamedTuple):
    """Pairs of which the row has some of the text's words."""

    rows: Places
    """(Q,) ascending."""
    texts: Places
    """(Q,) ascending within a row."""
    words: Places
    """(Q,) how many words of the text lie in the runs."""


def pieces_of(fields: pl.DataFrame) -> Pieces | None:
    """The texts of examples: the text, prompt and response, both answers, or all messages but those
    of the system; None where there are none.

    Args:
        fields: of `curate.data.reading.read_fields`; a label and numbers are left aside.
    """
    frames: list[pl.DataFrame] = []
    for order, name in enumerate(fields.columns):
        column = fields.select(pl.int_range(pl.len()).alias("row"), pl.col(name).alias("text"))
        if column["text"].dtype == pl.String:
            found = column.with_columns(turn=pl.lit(0, pl.Int64), is_main=pl.lit(name in _MAIN))
        elif isinstance(column["text"].dtype, pl.List):
            found = column.explode("text").drop_nulls("text")
            if not isinstance(found["text"].dtype, pl.Struct):
                continue
            part = pl.col("text").struct
            found = (
                found.filter(part.field("role").ne_missing(_SYSTEM))
                .with_columns(
                    turn=pl.int_range(pl.len()), is_main=pl.lit(False), text=part.field("content")
                )
                .select("row", "text", "turn", "is_main")
            )
        else:
            continue
        frames.append(found.with_columns(order=pl.lit(order)))
    if not frames:
        return None
    both = pl.concat(frames).sort("row", "order", "turn")
    return Pieces(
        both["row"].cast(pl.Int64).to_numpy(),
        both["text"].fill_null(""),
        both["is_main"].to_numpy(),
        fields.height,
    )


def blocks_of(pieces: Pieces) -> Iterator[Block]:
    """The words of all pieces, some whole rows at a time."""
    for part in row_blocks(pieces.rows, pieces.texts):
        words = words_of(pieces.texts[part])
        rows, firsts, places = np.unique(pieces.rows[part], return_index=True, return_inverse=True)
        bounds = np.append(words.bounds[firsts], words.bounds[-1])
        yield Block(words, rows, bounds, places.astype(np.int64), pieces.is_main[part])


def covered_words(rows: Places, texts: Places, places: Places, sizes: Places) -> Covered:
    """How many words of each text lie in the runs that a row has too.

    Args:
        rows: (M,) where a run was found, ascending.
        texts: (M,) which text has it.
        places: (M,) its first word in that text; no run twice for one row.
        sizes: (U,) words of a run of each text.
    """
    if not len(rows):
        return Covered(rows, texts, places)
    rows, texts, places = _sorted(rows, texts, places)
    is_new = np.ones(len(rows), dtype=np.bool_)
    is_new[1:] = (np.diff(rows) != 0) | (np.diff(texts) != 0)
    added = sizes[texts]
    # Runs overlap: one adds only the words behind the end of the one before.
    added[1:] = np.where(is_new[1:], added[1:], np.minimum(added[1:], np.diff(places)))
    starts = np.flatnonzero(is_new)
    return Covered(rows[starts], texts[starts], np.add.reduceat(added, starts))


def _sorted(rows: Places, texts: Places, places: Places) -> tuple[Places, Places, Places]:
    """By row, text and place; rows ascend already."""
    distinct, codes = np.unique(rows, return_inverse=True)
    bits = [int(each.max()).bit_length() for each in (codes, texts, places)]
    if sum(bits) > 63:
        order = np.lexsort((places, texts, rows))
        return rows[order], texts[order], places[order]
    # One number of all three: sorting numbers takes a tenth of the time of sorting their places.
    keys = np.sort((((codes << bits[1]) | texts) << bits[2]) | places)
    both = keys >> bits[2]
    found = distinct[both >> bits[1]]
    return found, both & ((1 << bits[1]) - 1), keys & ((1 << bits[2]) - 1)


# -- what is looked for ---------------------------------------------------------------------------


def sought_in(sets: Iterator[Pieces], rules: Rules) -> Sought:
    """What of an evaluation set is looked for.

    Args:
        sets: its examples, some at a time, rows of each counted from 0.
        rules: how long runs are, and what a template is.
    """
    found: list[tuple[Any, ...]] = []  # runs, texts, places
    texts: list[tuple[Places, ...]] = []  # sizes, examples
    wholes: list[tuple[Any, ...]] = []  # hashes, examples, whether it is the whole example
    first_text = first_row = 0
    for pieces in sets:
        for block in blocks_of(pieces):
            starts, ends, owners = _texts(block, rules)
            sizes = np.minimum(ends - starts, _lengths(block, starts, ends, rules.ngrams))
            runs, own, places = _runs_of(block.words, starts, ends, sizes)
            found.append((runs, own + first_text, places))
            texts.append((sizes, block.rows[owners] + first_row))
            wholes.append(_wholes(block, rules, first_row))
            first_text += len(starts)
        first_row += pieces.num_rows
    runs, of, places = _in_order(*_joined(found, 3))
    sizes, examples = _joined(texts, 2)
    keys, key_examples, is_whole = _in_order(*_joined(wholes, 3))
    limit = max(LEAST_TEMPLATE, rules.template * first_row)
    keep = ~_is_common(runs, examples[of], limit)
    runs, of, places = runs[keep], of[keep], places[keep]
    covered = covered_words(np.zeros(len(of), dtype=np.int64), of, places, sizes)
    coverable = np.zeros(len(sizes), dtype=np.int64)
    coverable[covered.texts] = covered.words
    own = is_whole.astype(np.bool_) | ~_is_common(keys, key_examples, limit)
    pairs = np.stack([keys[own], key_examples[own].astype(np.uint64)])
    # Its rows lie across each other, and safetensors takes the memory of an array as it is.
    both = np.ascontiguousarray(np.unique(pairs, axis=1))
    has_text, has_run = (np.zeros(first_row, dtype=np.bool_) for _ in range(2))
    has_text[examples] = True
    has_run[examples[coverable > 0]] = True
    return Sought(
        runs.astype(np.uint64), of, places, sizes, coverable, examples,
        both[0], both[1].astype(np.int64), first_row,
        int((~has_text).sum()), int((has_text & ~has_run).sum()),
    )  # fmt: skip


def _texts(block: Block, rules: Rules) -> tuple[Places, Places, Places]:
    """Bounds and rows, ascending, of the texts that are looked for within others: the pieces that
    are long enough, and where a row has none the row as a whole."""
    starts, ends = block.words.bounds[:-1], block.words.bounds[1:]
    is_long = ends - starts >= _lengths(block, starts, ends, rules.shortest)
    has_long = np.zeros(len(block.rows), dtype=np.bool_)
    has_long[block.piece_rows[is_long]] = True
    first, last = block.bounds[:-1], block.bounds[1:]
    others = ~has_long & (last - first >= _lengths(block, first, last, rules.shortest))
    rows = np.concatenate([block.piece_rows[is_long], np.flatnonzero(others)])
    order = np.argsort(rows, kind="stable")
    starts = np.concatenate([starts[is_long], first[others]])
    ends = np.concatenate([ends[is_long], last[others]])
    return starts[order], ends[order], rows[order]


def _lengths(block: Block, starts: Places, ends: Places, words: int) -> Places:
    """As many words, or twice as many letters where most words are letters."""
    letters = np.concatenate([[0], np.cumsum(block.words.is_letter)])
    is_spaceless = 2 * (letters[ends] - letters[starts]) > ends - starts
    return np.where(is_spaceless, 2 * words, words)


def _runs_of(
    words: Words, starts: Places, ends: Places, sizes: Places
) -> tuple[Hashes, Places, Places]:
    """Every run of each text: its hash, the text, its place there."""
    counts = ends - starts - sizes + 1
    own = np.repeat(np.arange(len(starts)), counts)
    places = np.arange(len(own)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = starts[own] + places
    return words.runs(first, first + sizes[own]), own, places


def _wholes(block: Block, rules: Rules, first_row: int) -> tuple[Any, ...]:
    """Hash, example and kind of what is compared as a whole."""
    keys, rows, is_row = whole_texts(block, rules)
    return keys, block.rows[rows] + first_row, is_row


def whole_texts(block: Block, rules: Rules) -> tuple[Hashes, Places, Flags]:
    """(X,) hashes of the rows, their texts and prompts, and of other pieces that are long enough;
    the place in the block of the row, ascending, and whether it is all of the row."""
    starts, ends = block.words.bounds[:-1], block.words.bounds[1:]
    is_long = ends - starts >= _lengths(block, starts, ends, rules.shortest)
    taken = (block.is_main & (ends > starts)) | is_long
    first, last = block.bounds[:-1], block.bounds[1:]
    full = np.flatnonzero(last > first)
    keys = np.concatenate([
        block.words.runs(starts[taken], ends[taken]), block.words.runs(first[full], last[full])
    ])  # fmt: skip
    is_row = np.concatenate([np.zeros(int(taken.sum()), np.bool_), np.ones(len(full), np.bool_)])
    rows = np.concatenate([block.piece_rows[taken], full])
    order = np.argsort(rows, kind="stable")
    return keys[order], rows[order], is_row[order]


def _joined(parts: list[tuple[Any, ...]], count: int) -> list[npt.NDArray[Any]]:
    if not parts:
        return [np.zeros(0, dtype=np.uint64 if i == 0 else np.int64) for i in range(count)]
    return [np.concatenate([part[i] for part in parts]) for i in range(count)]


def _in_order(
    hashes: Hashes, owners: Places, others: npt.NDArray[Any]
) -> tuple[Hashes, Places, npt.NDArray[Any]]:
    """By hash, equal ones as they were."""
    order = np.argsort(hashes, kind="stable")
    return hashes[order], owners[order], others[order]


def _is_common(hashes: Hashes, examples: Places, limit: float) -> Flags:
    """(M,) whether a hash stands in more examples than the limit.

    Args:
        hashes: (M,) ascending.
        examples: (M,) ascending where hashes are equal.
        limit: a number of examples.
    """
    is_new = np.ones(len(hashes), dtype=np.bool_)
    is_new[1:] = hashes[1:] != hashes[:-1]
    is_other = is_new.copy()
    is_other[1:] |= examples[1:] != examples[:-1]
    codes = np.cumsum(is_new) - 1
    return (np.bincount(codes, weights=is_other) > limit)[codes]


# -- looking for it -------------------------------------------------------------------------------


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


MATCHES = {"row": pl.Int64(), "set": pl.Int32(), "example": pl.Int64(), "share": pl.Float64(),
           "exact": pl.Boolean()}  # fmt: skip
"""Columns of what `matches_in` finds."""


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
