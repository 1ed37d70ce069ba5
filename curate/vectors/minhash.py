"""MinHash: the share of n-grams that two texts have in common, from K numbers of each.

    J(A, B) = |A n B| / |A u B|          P(min h(A) = min h(B)) = J(A, B)

so that the share of the K minima that agree is an unbiased estimate of J, with the standard
deviation sqrt(J (1 - J) / K). Texts that agree in all r minima of one of b bands are candidates: of
similarity J that happens with probability 1 - (1 - J^r)^b.

Source: Broder, "On the Resemblance and Containment of Documents", SEQUENCES 1997; bands after
Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", section 3.4.

Shapes: N texts, M n-grams, K minima, n candidates.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from curate.vectors.pairs import Similar
from curate.vectors.store import Positions

Minima = npt.NDArray[np.uint32]
Hashes = npt.NDArray[np.uint64]

NUM_MINIMA = 120
"""K; divisible by 3, 4, 5 and 6."""
NOTHING = np.uint32(0xFFFF_FFFF)
"""All minima of a text without n-grams."""

_HALF = np.uint64(32)
_FOLD = np.uint64(0x9E3779B97F4A7C15)
_NEIGHBOURS = 8
"""A row of a bucket is compared with so many of those before it, and with the first."""
_ROWS = 1 << 15


class Bands(NamedTuple):
    """How minima are grouped."""

    num: int
    """b"""
    rows: int
    """r; b times r is K."""


def bands_for(threshold: float) -> Bands:
    """Bands in which texts of this similarity are candidates with a probability above 0.9."""
    rows = 6 if threshold >= 0.7 else 4 if threshold >= 0.55 else 3
    return Bands(NUM_MINIMA // rows, rows)


def minima(texts: Positions, hashes: Hashes, num_texts: int) -> Minima:
    """(N, K) the smallest value of each of K hash functions over a text's n-grams.

    Args:
        texts: (M,) rising: which text each n-gram stands in.
        hashes: (M,) of the n-grams.
        num_texts: N.
    """
    found = np.full((num_texts, NUM_MINIMA), NOTHING, dtype=np.uint32)
    if not len(texts):
        return found
    starts = np.flatnonzero(np.diff(texts, prepend=-1))
    owners = texts[starts]
    narrow = hashes >> _HALF
    # (a x + b mod 2^64) / 2^32 is a strongly universal family for 32 bits of x.
    factors = np.random.default_rng(0x5EED).integers(0, 1 << 64, (2, NUM_MINIMA), dtype=np.uint64)
    for k in range(NUM_MINIMA):
        values = ((narrow * factors[0, k] + factors[1, k]) >> _HALF).astype(np.uint32)
        found[owners, k] = np.minimum.reduceat(values, starts)
    return found


def band_keys(own: Minima, band: int, rows: int) -> Hashes:
    """(N,) equal where all minima of a band are equal, else different but for chance (2^-64)."""
    keys = np.zeros(len(own), dtype=np.uint64)
    for column in range(band * rows, (band + 1) * rows):
        keys = (keys ^ own[:, column]) * _FOLD
        keys ^= keys >> np.uint64(29)
    return keys


def best_in_buckets(own: Minima, keys: Hashes) -> Similar:
    """The most similar earlier row of each among the candidates of one band.

    A bucket of many rows is not compared pair by pair: a row meets the eight before it and the
    bucket's first.

    Args:
        own: (n, K) minima of the rows, in order of precedence.
        keys: (n,) of the band.

    Returns:
        Estimated similarities, 0 where there is no candidate; places are those in `own`.
    """
    values, others = _nothing(len(keys))
    order = np.argsort(keys, kind="stable")  # buckets one after the other, each by precedence
    firsts = _run_starts(keys[order])
    places = np.arange(len(order))
    for lag in range(_NEIGHBOURS + 1):
        before = places - lag if lag else firsts
        good = (before < places) & (before >= firsts)
        _improve(values, others, own, order[places[good]], order[before[good]])
    return Similar(values, others)


def best_across(own: Minima, keys: Hashes, among: Minima, among_keys: Hashes) -> Similar:
    """The most similar of other rows to each row, of the first eight in its bucket of one band.

    Args:
        own: (n, K) minima.
        keys: (n,) of the band.
        among: minima of the others.
        among_keys: theirs.

    Returns:
        Estimated similarities, 0 where there is no candidate; places are those in `among`.
    """
    values, others = _nothing(len(keys))
    order = np.argsort(among_keys, kind="stable")
    first = np.searchsorted(among_keys[order], keys, side="left")
    last = np.searchsorted(among_keys[order], keys, side="right")
    for step in range(_NEIGHBOURS):
        rows = np.flatnonzero(first + step < last)
        _improve(values, others, own, rows, order[first[rows] + step], among)
    return Similar(values, others)


def _run_starts(ordered: Hashes) -> Positions:
    """(n,) where the run of equal keys begins that each place belongs to."""
    new = np.ones(len(ordered), dtype=np.bool_)
    new[1:] = ordered[1:] != ordered[:-1]
    return np.flatnonzero(new)[np.cumsum(new) - 1] if len(ordered) else np.zeros(0, np.int64)


def _nothing(count: int) -> tuple[npt.NDArray[np.float32], Positions]:
    return np.zeros(count, dtype=np.float32), np.full(count, -1, dtype=np.int64)


def _improve(
    values: npt.NDArray[np.float32],
    others: Positions,
    own: Minima,
    rows: Positions,
    candidates: Positions,
    among: Minima | None = None,
) -> None:
    """Take over what is better, or as good and earlier, in place; no row stands twice in `rows`."""
    for start in range(0, len(rows), _ROWS):
        mine, other = rows[start : start + _ROWS], candidates[start : start + _ROWS]
        found = (own[mine] == (own if among is None else among)[other]).mean(axis=1)
        found = found.astype(np.float32)
        better = (found > values[mine]) | ((found == values[mine]) & (other < others[mine]))
        values[mine[better]] = found[better]
        others[mine[better]] = other[better]
