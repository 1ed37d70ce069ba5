"""The texts of examples as pieces, their words, and what of them is compared as a whole.

Shapes: R rows (examples), P pieces (texts of examples), X texts that are compared as a whole.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import polars as pl

from curate.models.text_runs import Flags, Hashes, Places, Words, row_blocks, words_of

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


def whole_texts(block: Block, rules: Rules) -> tuple[Hashes, Places, Flags]:
    """(X,) hashes of the rows, their texts and prompts, and of other pieces that are long enough;
    the place in the block of the row, ascending, and whether it is all of the row."""
    starts, ends = block.words.bounds[:-1], block.words.bounds[1:]
    is_long = ends - starts >= run_lengths(block, starts, ends, rules.shortest)
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


def run_lengths(block: Block, starts: Places, ends: Places, words: int) -> Places:
    """As many words, or twice as many letters where most words are letters."""
    letters = np.concatenate([[0], np.cumsum(block.words.is_letter)])
    is_spaceless = 2 * (letters[ends] - letters[starts]) > ends - starts
    return np.where(is_spaceless, 2 * words, words)
