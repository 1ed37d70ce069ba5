"""What of an evaluation set is looked for: its runs of words, and its texts as a whole.

Shapes: M places where a run stands, U texts that are looked for within others, X texts that are
looked for as a whole, E examples, Q pairs of a row and a text.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from curate.models.text_pieces import Block, Pieces, Rules, blocks_of, run_lengths, whole_texts
from curate.models.text_runs import Flags, Hashes, Places, Words

LEAST_TEMPLATE = 10
"""What stands in so few examples is no template, however small the set is."""


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
            sizes = np.minimum(ends - starts, run_lengths(block, starts, ends, rules.ngrams))
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


def _texts(block: Block, rules: Rules) -> tuple[Places, Places, Places]:
    """Bounds and rows, ascending, of the texts that are looked for within others: the pieces that
    are long enough, and where a row has none the row as a whole."""
    starts, ends = block.words.bounds[:-1], block.words.bounds[1:]
    is_long = ends - starts >= run_lengths(block, starts, ends, rules.shortest)
    has_long = np.zeros(len(block.rows), dtype=np.bool_)
    has_long[block.piece_rows[is_long]] = True
    first, last = block.bounds[:-1], block.bounds[1:]
    others = ~has_long & (last - first >= run_lengths(block, first, last, rules.shortest))
    rows = np.concatenate([block.piece_rows[is_long], np.flatnonzero(others)])
    order = np.argsort(rows, kind="stable")
    starts = np.concatenate([starts[is_long], first[others]])
    ends = np.concatenate([ends[is_long], last[others]])
    return starts[order], ends[order], rows[order]


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
