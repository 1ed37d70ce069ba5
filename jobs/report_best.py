"""A few rows of very many, by one key: the ends of a score, or a seeded draw.

Shapes: N rows of a partition.
"""

from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from curate.data.partitions import Partition
from curate.plan.positions import Bits, file_hash, mixed_bits, row_hashes


class Place(NamedTuple):
    """Where an example stands."""

    part: int
    """Number of the partition in the run's order."""
    place: int
    """In the tables of that partition."""


def draws(part: Partition, rows: NDArray[np.int64], *, seed: int, label: str) -> Bits:
    """(N,) a seeded number for each row of a file; other labels give other numbers."""
    start = file_hash(part.source, part.file, seed=seed)
    return mixed_bits(row_hashes(start, rows) ^ np.uint64(xxhash.xxh3_64_intdigest(label.encode())))


class Best:
    """The rows with the smallest keys."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._keys: NDArray[Any] = np.zeros(0)
        self._ties: Bits = np.zeros(0, np.uint64)
        self._found = np.zeros((0, 2), np.int64)

    def add(self, keys: NDArray[Any], ties: Bits, part: int, places: NDArray[np.int64]) -> None:
        """Add rows; equal keys are in the order of `ties`.

        Args:
            keys: (N,) of one type throughout, none of them NaN.
            ties: (N,) such as `draws` gives.
            part: number of the partition.
            places: (N,) in its tables.
        """
        if not self._count or not len(keys):
            return
        # Sorting what cannot be among them would take long.
        limit = None
        if len(self._keys) == self._count:
            limit = self._keys[-1]
        elif len(keys) > self._count:
            limit = np.partition(keys, self._count - 1)[self._count - 1]
        if limit is not None:
            near = keys <= limit
            keys, ties, places = keys[near], ties[near], places[near]
        keys = np.concatenate([self._keys.astype(keys.dtype), keys])
        ties = np.concatenate([self._ties, ties])
        found = np.stack([np.full(len(places), part, np.int64), places], axis=1)
        found = np.concatenate([self._found, found])
        order = np.lexsort((ties, keys))[: self._count]
        self._keys, self._ties, self._found = keys[order], ties[order], found[order]

    def places(self) -> list[Place]:
        """The rows, smallest key first."""
        return [Place(part, place) for part, place in self._found.tolist()]
