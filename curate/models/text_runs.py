"""Runs of words of any length as 64-bit hashes: of every window, or of whole texts.

Words are compared as people would: compatibility forms, capitals and punctuation make no
difference. Where a script puts no spaces between words, each of its letters counts as a word, with
the marks upon it.

With h the hash of each word (xxh3) and b an odd constant, all modulo 2^64,

    S_i = sum over j < i of h_j b^j          run(s, e) = mix((S_e - S_s) b^-s)

so that a run of any length costs two products, and the same words give the same hash wherever they
stand (Karp and Rabin, "Efficient randomized pattern-matching algorithms", 1987).

Shapes: P texts, W words of all of them.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

Hashes = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_NO_SPACES = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = rf"[{_NO_SPACES}]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--[{_NO_SPACES}]]+"
_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)
_MIX = np.uint64(0xD6E8FEB86659FD93)
_BLOCK_CHARS = 4_000_000


class Words(NamedTuple):
    """The words of some texts, one after the other."""

    bounds: Places
    """(P + 1,) the words of text p are those from `bounds[p]` up to `bounds[p + 1]`."""
    is_letter: Flags
    """(W,) a letter of a script without spaces."""
    sums: Hashes
    """(W + 1,) S."""
    inverses: Hashes
    """(W + 1,) b^-s."""

    def runs(self, starts: Places, ends: Places) -> Hashes:
        """Hash of the words from each start up to its end; of any number of runs."""
        return _mixed((self.sums[ends] - self.sums[starts]) * self.inverses[starts])

    def windows(self, size: int) -> Hashes:
        """(W - size + 1,) hash of every run of that size, also from one text into the next."""
        if len(self.is_letter) < size:
            return np.zeros(0, dtype=np.uint64)
        last = len(self.sums) - size
        plain = (self.sums[size:] - self.sums[:last]) * self.inverses[:last]
        return _mixed(plain)


def words_of(texts: pl.Series) -> Words:
    """The words of all texts.

    Args:
        texts: (P,) strings without null.
    """
    found = _normalised(texts).str.extract_all(_WORD)
    bounds = np.concatenate([[0], np.cumsum(found.list.len().cast(pl.Int64).to_numpy())])
    flat = found.list.explode().drop_nulls().to_arrow()  # an empty list becomes a null
    coded = pc.dictionary_encode(flat)  # pyright: ignore[reportAttributeAccessIssue]
    coded = coded.combine_chunks() if isinstance(coded, pa.ChunkedArray) else coded
    distinct = coded.dictionary.to_pylist()
    own = np.array([xxhash.xxh3_64_intdigest(word.encode()) for word in distinct], np.uint64)
    letters = pl.Series(distinct, dtype=pl.String).str.contains(f"^[{_NO_SPACES}]").to_numpy()
    codes = coded.indices.to_numpy(zero_copy_only=False)
    powers, inverses = _powers(_BASE, len(codes)), _powers(_INVERSE, len(codes))
    sums = np.zeros(len(codes) + 1, dtype=np.uint64)
    np.cumsum(own[codes] * powers[:-1], out=sums[1:])
    return Words(bounds, letters.astype(np.bool_)[codes], sums, inverses)


def row_blocks(
    rows: Places, texts: pl.Series, *, block_chars: int = _BLOCK_CHARS
) -> Iterator[slice]:
    """Texts that are taken together: whole rows, up to so many characters unless one has more.

    Args:
        rows: (P,) ascending: the row that each text belongs to.
        texts: (P,).
        block_chars: about 60 bytes of arrays each.
    """
    if not len(rows):
        return
    ends = texts.str.len_chars().cast(pl.Int64).cum_sum().to_numpy()
    borders = np.append(np.flatnonzero(np.diff(rows)) + 1, len(rows))  # where a row has ended
    first = 0
    while first < len(rows):
        before = int(ends[first - 1]) if first else 0
        fitting = int(np.searchsorted(ends, before + block_chars, side="right"))
        whole = borders[(borders > first) & (borders <= fitting)]
        last = int(whole[-1]) if len(whole) else int(borders[borders > first][0])
        yield slice(first, last)
        first = last


def _normalised(texts: pl.Series) -> pl.Series:
    """Lower case, compatibility forms folded; what is ASCII has none."""
    plain = (texts.str.len_bytes() == texts.str.len_chars()).all()
    return (texts if plain else texts.str.normalize("NFKC")).str.to_lowercase()


def _powers(base: int, count: int) -> Hashes:
    """(count + 1,) base^0, base^1, ..."""
    found = np.full(count + 1, base, dtype=np.uint64)
    found[0] = 1
    return np.cumprod(found, dtype=np.uint64)


def _mixed(plain: Hashes) -> Hashes:
    """Without this the low bits of a run would not depend on the order of its words."""
    mixed = plain ^ (plain >> np.uint64(32))
    mixed *= _MIX
    mixed ^= mixed >> np.uint64(29)
    return mixed
