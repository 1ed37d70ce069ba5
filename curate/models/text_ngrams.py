"""Runs of words or characters of many texts as 64-bit hashes, a whole column of texts at a time.

Each distinct word is hashed once (xxh3 of its lower-cased UTF-8), and a run's hash is folded from
those of its parts, so that the same text gives the same hashes on any machine.

Shapes: N texts, M n-grams of a block of them.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

Unit = Literal["words", "characters"]
Hashes = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]

_BLOCK_CHARS = 4_000_000
"""Texts are taken together until they have so many characters: about 100 bytes of arrays each."""
_ALL = r"\w+|[^\w\s]+"
_WORDS_ONLY = r"\w+"
_FOLD = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xD6E8FEB86659FD93)


class Block(NamedTuple):
    """The n-grams of some texts that follow each other."""

    first: int
    """Place of the block's first text."""
    num_texts: int
    texts: Places
    """(M,) which text of the block, from 0, each n-gram stands in."""
    hashes: Hashes
    """(M,) n-grams of one length after those of the next shorter; a text's own in its order."""


def ngram_blocks(
    texts: Sequence[str],
    *,
    ngrams: tuple[int, int],
    unit: Unit = "words",
    punctuation: bool = True,
    block_chars: int = _BLOCK_CHARS,
) -> Iterator[Block]:
    """The n-grams of all texts, some texts at a time.

    Args:
        texts: N; letters are lower-cased, nothing else is changed.
        ngrams: shortest and longest run.
        unit: `words` are runs of letters, digits and underscores; of `characters`, white space is
            one blank each.
        punctuation: whether runs of other marks are words too.
        block_chars: most characters of a block, but for a single text that has more.
    """
    whole = pl.Series("text", list(texts), dtype=pl.String)
    ends = whole.str.len_chars().cast(pl.Int64).cum_sum().to_numpy()
    first = 0
    while first < len(whole):
        before = int(ends[first - 1]) if first else 0
        last = int(np.searchsorted(ends, before + block_chars, side="right"))
        last = max(first + 1, last)
        block = whole[first:last].str.to_lowercase()
        if unit == "characters":
            lengths, hashes = _characters(block)
        else:
            lengths, hashes = _words(block, _ALL if punctuation else _WORDS_ONLY)
        places, found = _runs(lengths, hashes, ngrams)
        yield Block(first, last - first, places, found)
        first = last


def buckets_of(hashes: Hashes, num_buckets: int) -> Places:
    """(M,) in [0, B): the high 32 bits of each hash, scaled; B below 2^32."""
    return (((hashes >> np.uint64(32)) * np.uint64(num_buckets)) >> np.uint64(32)).astype(np.int64)


def _words(texts: pl.Series, pattern: str) -> tuple[Places, Hashes]:
    """Words of each text, and the hashes of all, one after the other."""
    found = texts.str.extract_all(pattern)
    lengths = found.list.len().cast(pl.Int64).to_numpy()
    flat = found.list.explode().drop_nulls().to_arrow()  # an empty list becomes a null
    coded = pc.dictionary_encode(flat)  # pyright: ignore[reportAttributeAccessIssue]
    coded = coded.combine_chunks() if isinstance(coded, pa.ChunkedArray) else coded
    own = [xxhash.xxh3_64_intdigest(word.encode()) for word in coded.dictionary.to_pylist()]
    codes = coded.indices.to_numpy(zero_copy_only=False)
    return lengths, np.array(own, dtype=np.uint64)[codes]


def _characters(texts: pl.Series) -> tuple[Places, Hashes]:
    """Characters of each text, and the hashes of all."""
    clean = texts.str.replace_all(r"\s+", " ").str.strip_chars()
    lengths = clean.str.len_chars().cast(pl.Int64).to_numpy()
    points = np.frombuffer("".join(clean.to_list()).encode("utf-32-le"), dtype="<u4")
    return lengths, _folded(np.zeros(len(points), dtype=np.uint64), points.astype(np.uint64))


def _runs(lengths: Places, units: Hashes, ngrams: tuple[int, int]) -> tuple[Places, Hashes]:
    """Runs of the units of each text, and the text of each run."""
    texts = np.repeat(np.arange(len(lengths)), lengths)
    run, places = units, texts
    found = [(places, run)] if ngrams[0] == 1 else []
    for size in range(2, ngrams[1] + 1):
        if len(run) < 2:
            break
        within = texts[: len(texts) - size + 1] == texts[size - 1 :]
        # `run` still holds what crosses from one text to the next: kept so that places agree.
        run = _folded(run[:-1], units[size - 1 :])
        if size >= ngrams[0]:
            found.append((texts[: len(run)][within], run[within]))
    if not found:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint64)
    return np.concatenate([p for p, _ in found]), np.concatenate([h for _, h in found])


def _folded(run: Hashes, unit: Hashes) -> Hashes:
    """A run that is longer by one unit; without the last steps runs that end in words of one
    bucket would share buckets too."""
    mixed = run * _FOLD + unit
    mixed ^= mixed >> np.uint64(32)
    mixed *= _MIX
    mixed ^= mixed >> np.uint64(29)
    return mixed
