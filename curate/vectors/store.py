"""Vectors of many partitions as one long array, read block by block through memory maps.

A row whose numbers are NaN has no vector; positions count it all the same, so that they are those
of the row tables beside the arrays.

Shapes: N rows of all parts together, d dimensions.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from curate.data.files import misshapen

Floats = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int64]

BLOCK_ROWS = 1 << 16


class Vectors:
    """Rows of several arrays, one after the other; in memory or mapped.

    Args:
        parts: arrays (N_i, d) of float32 or float16, at least one.
    """

    def __init__(self, parts: Sequence[npt.NDArray[np.floating]]) -> None:
        self._parts = list(parts)
        sizes = [len(part) for part in self._parts]
        self.starts: Positions = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        """(parts + 1,) position of each part's first row, and N."""
        self.dim = int(self._parts[0].shape[1])

    @classmethod
    def open(cls, paths: Sequence[Path]) -> "Vectors":
        """Map files that `save` wrote.

        Raises:
            InputError: one of them is missing, damaged, or of another width.
        """
        parts = [_mapped(path) for path in paths]
        for path, part in zip(paths, parts, strict=True):
            if part.shape[1] != parts[0].shape[1]:
                raise misshapen(path, f"{part.shape[1]} dimensions, not {parts[0].shape[1]}")
        return cls(parts)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def part(self, index: int) -> Floats:
        """(N_i, d) the rows of one part, NaN where there is no vector."""
        return np.ascontiguousarray(self._parts[index], dtype=np.float32)

    def blocks(self, rows: int = BLOCK_ROWS) -> Iterator[tuple[Positions, Floats]]:
        """All vectors in order, a few rows at a time.

        Args:
            rows: most rows of a block.

        Yields:
            positions (n,) and vectors (n, d); rows without a vector are left out.
        """
        for start, part in zip(self.starts[:-1].tolist(), self._parts, strict=True):
            for first in range(0, len(part), rows):
                block = np.ascontiguousarray(part[first : first + rows], dtype=np.float32)
                there = ~np.isnan(block).any(axis=1)
                positions = start + first + np.flatnonzero(there)
                if len(positions):
                    yield positions, block if there.all() else block[there]

    def take(self, positions: npt.ArrayLike) -> Floats:
        """(n, d) the rows at some positions, in the order asked for."""
        wanted = np.asarray(positions, dtype=np.int64)
        found = np.empty((len(wanted), self.dim), dtype=np.float32)
        where = np.searchsorted(self.starts, wanted, side="right") - 1
        for index in np.unique(where).tolist():
            mine = np.flatnonzero(where == index)
            mine = mine[np.argsort(wanted[mine], kind="stable")]  # forwards through the file
            found[mine] = self._parts[index][wanted[mine] - self.starts[index]]
        return found

    def usable(self) -> Positions:
        """(n,) ascending positions of the rows that have a vector."""
        found = [positions for positions, _ in self.blocks()]
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def save(path: Path, vectors: npt.NDArray[np.floating]) -> None:
    """Write one part as `.npy`; equal arrays give equal bytes."""
    with path.open("wb") as file:  # a name without .npy would get one
        np.save(file, np.ascontiguousarray(vectors), allow_pickle=False)


def _mapped(path: Path) -> npt.NDArray[np.floating]:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise misshapen(path, str(error)) from error
    if found.ndim != 2 or found.dtype not in (np.float16, np.float32):
        raise misshapen(path, f"an array {found.shape} of {found.dtype}, not rows of floats")
    return found
