"""Which domain each position of a stream draws from, and how often that domain was drawn before.

Shapes: K domains, n positions.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mixers.changes import Changes
from mixers.orders import Integers, uniform_points

_STRETCH = 1 << 20
"""Positions that are drawn together where nobody reads them."""


class Place(NamedTuple):
    """Where a stream stands."""

    position: int
    """Examples before it, over all ranks."""
    drawn: Integers
    """(K,) how many of them each domain gave."""


class Taken(NamedTuple):
    """A stretch of the stream."""

    domains: Integers
    """(n,) domain of each position."""
    numbers: Integers
    """(n,) how often the domain was drawn before."""
    place: Place
    """Behind it."""
    is_over: bool
    """Whether the stream ends there."""


class Draws:
    """The draws of a stream, a function of its seed and of the probabilities at each position.

    Args:
        sizes: (K,) examples of each domain.
        seed: of the stream.
        even: spread the domains over every stretch of positions.
        stop: end where a domain that is drawn has no example left.
    """

    def __init__(self, sizes: Integers, seed: int, *, even: bool, stop: bool) -> None:
        self._sizes, self._seed, self._even, self._stop = sizes, seed, even, stop

    def take(self, place: Place, last: int, changes: Changes) -> Taken:
        """Draw the positions from a place to before `last`."""
        first = place.position
        points = uniform_points(self._seed, first, last, even=self._even)
        domains = np.empty(last - first, np.int64)
        for start, end, row in changes.pieces(first, last):
            chosen = slice(start - first, end - first)
            domains[chosen] = np.searchsorted(_edges(row), points[chosen], side="right")
        counts = np.bincount(domains, minlength=len(self._sizes))
        by_domain = np.argsort(domains, kind="stable")
        befores = np.repeat(place.drawn - (counts.cumsum() - counts), counts)
        numbers = np.empty_like(domains)
        numbers[by_domain] = np.arange(len(domains)) + befores
        missing = numbers >= self._sizes[domains]
        if not (self._stop and missing.any()):
            return Taken(domains, numbers, Place(last, place.drawn + counts), False)
        cut = int(missing.argmax())
        counts = np.bincount(domains[:cut], minlength=len(self._sizes))
        return Taken(domains[:cut], numbers[:cut], Place(first + cut, place.drawn + counts), True)

    def skip(self, place: Place, last: int, changes: Changes) -> tuple[Place, bool]:
        """Go on to `last` without reading, and say whether the stream ends before."""
        while place.position < last:
            taken = self.take(place, min(last, place.position + _STRETCH), changes)
            place = taken.place
            if taken.is_over:
                return place, True
        return place, False


def _edges(row: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Upper ends (K,) of the domains' parts of [0, 1); rounding gives nothing to the absent."""
    edges = row.cumsum()
    edges[row.nonzero()[0][-1] :] = 2.0
    return edges
