"""Which sequences make up each batch of a proxy: a function of seed, step and shares.

A batch holds, of each domain, its share of the sequences rounded up or down, so that shares that
divide the batch are kept exactly in every step. A domain goes through its sequences in a random
order, a new one in each epoch; what is left to remember is how many of each were drawn.

Shapes: K domains, B sequences of a batch.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from curate.models.epochs import random_seed
from mixers.orders import Order, uniform_points

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def stratified_counts(shares: Floats, size: int, seed: int) -> Integers:
    """(K,) sequences of each domain: the share of the batch, rounded up or down at random.

    Systematic sampling: one random number for all, evenly spaced points. Each count has just its
    share of `size` as the mean, and no more variance than rounding needs.

    Args:
        shares: (K,) not negative, summing to 1.
        size: B.
        seed: of this batch.
    """
    edges = np.cumsum(shares) * size
    edges[-1] = size
    # Sums of shares that should fall on a whole number may miss it by a rounding.
    whole = np.rint(edges)
    edges = np.where(np.abs(edges - whole) < 1e-9 * size, whole, edges)
    point = uniform_points(seed, 0, 1)[0]
    upto = np.ceil(edges - point).clip(0, size).astype(np.int64)
    return np.diff(upto, prepend=0)


class Draw:
    """The sequences of every domain, in an order of their own for each purpose.

    Args:
        domains: names; the order of a domain follows from its name, not from its place.
        sizes: (K,) sequences of each; 0 where there are none.
        seed: of the run.
        purpose: what the draw is for.
    """

    def __init__(self, domains: Sequence[str], sizes: Integers, *, seed: int, purpose: str) -> None:
        self._domains, self._sizes = tuple(domains), sizes
        self._seed, self._purpose = seed, purpose
        self.drawn = np.zeros(len(sizes), dtype=np.int64)
        """(K,) how many were drawn; all that a resume needs."""
        self._orders: dict[int, tuple[int, Order]] = {}

    @property
    def epochs(self) -> Floats:
        """(K,) how often each domain was gone through; NaN where it is empty."""
        return np.where(self._sizes > 0, self.drawn / np.maximum(self._sizes, 1), np.nan)

    def take(self, counts: Integers) -> tuple[Integers, Integers]:
        """The next sequences: (B,) domain and (B,) place in it, domain by domain.

        Args:
            counts: (K,) how many of each; 0 where a domain is empty.
        """
        domains = np.repeat(np.arange(len(counts)), counts)
        places = [self._places(int(d), int(counts[d])) for d in counts.nonzero()[0]]
        self.drawn = self.drawn + counts
        return domains, np.concatenate([np.zeros(0, np.int64), *places])

    def _places(self, domain: int, count: int) -> Integers:
        numbers = self.drawn[domain] + np.arange(count)
        epochs, within = np.divmod(numbers, self._sizes[domain])
        found = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            found[chosen] = self._order(domain, int(epoch)).at(within[chosen])
        return found

    def _order(self, domain: int, epoch: int) -> Order:
        known = self._orders.get(domain)
        if known is None or known[0] != epoch:
            key = random_seed(self._seed, "proxy", self._purpose, self._domains[domain], epoch)
            known = (epoch, Order(int(self._sizes[domain]), key))
            self._orders[domain] = known
        return known[1]
