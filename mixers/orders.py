"""Draws that are functions of seed and position: any process can make any of them, in any order.

Shapes: n positions, N examples of a domain.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from curate.models.epochs import random_seed

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_BLOCK = 1024
"""Points that are made together."""
_WINDOW = 64
"""Positions over which even points are spread."""
_TABLE = 1 << 16
"""Up to as many examples an order is a table; beyond, it is computed place by place."""
_ROUNDS = 6


def uniform_points(seed: int, first: int, last: int, *, even: bool = False) -> Floats:
    """A number in [0, 1) for each position of a stretch.

    Args:
        seed: of the stream.
        first: first position.
        last: one past the last.
        even: every 64 positions have one point in each 64th of [0, 1), in random order; by itself
            each is as uniform as without.

    Returns:
        (last - first,); a position has the same number whatever the stretch.
    """
    start = first // _BLOCK
    end = max(start + 1, -(-last // _BLOCK))
    found = np.concatenate([_block(seed, block, even) for block in range(start, end)])
    return found[first - start * _BLOCK : last - start * _BLOCK]


class Order:
    """A random order of the N examples of a domain, of which any place can be asked for.

    Args:
        num_examples: N, above 0.
        key: what the order is drawn from.
    """

    def __init__(self, num_examples: int, key: int) -> None:
        self._size = num_examples
        self._key = key
        self._table: Integers | None = None
        if num_examples <= _TABLE:
            raw = _philox(key).random_raw(num_examples)
            self._table = np.argsort(raw, kind="stable")
        # A number is two halves of so many bits; at most four times as many numbers as examples.
        self._bits = np.uint64((max(num_examples - 1, 1).bit_length() + 1) // 2)
        self._keys = _philox(key).random_raw(_ROUNDS)

    def at(self, places: Integers) -> Integers:
        """The examples at some places, (n,) in [0, N) each."""
        if self._table is not None:
            return self._table[places]
        found = self._mixed(places.astype(np.uint64))
        outside = found >= self._size
        # Following the permutation of the larger range until it comes back inside is one of [0, N).
        while outside.any():
            found[outside] = self._mixed(found[outside])
            outside = found >= self._size
        return found.astype(np.int64)

    def _mixed(self, numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """A permutation of all numbers of twice `_bits` bits: Feistel rounds."""
        mask = (np.uint64(1) << self._bits) - np.uint64(1)
        left, right = numbers >> self._bits, numbers & mask
        for key in self._keys:
            left, right = right, left ^ (_scrambled(right ^ key) & mask)
        return (left << self._bits) | right


@lru_cache(maxsize=8)
def _block(seed: int, block: int, even: bool) -> Floats:
    source = _philox(random_seed(seed, "stream", "domains", block))
    # 53 bits are what a float64 holds; the raw numbers of Philox are the same in every version.
    points: Floats = (source.random_raw(_BLOCK) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    if not even:
        return points
    places = np.argsort(points.reshape(-1, _WINDOW), axis=1, kind="stable")
    shift = (source.random_raw(_BLOCK) >> np.uint64(11)) * 2.0**-53
    found: Floats = (places.reshape(-1) + shift) / _WINDOW
    # Rounding may lift the very last point to 1.
    return found.clip(max=np.nextafter(1.0, 0.0))


def _philox(key: int) -> np.random.Philox:
    return np.random.Philox(key=key)


def _scrambled(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Every bit depends on every bit: multiplications and shifts of MurmurHash's last step."""
    found = numbers
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        found = (found ^ (found >> np.uint64(33))) * np.uint64(factor)
    return found ^ (found >> np.uint64(33))
