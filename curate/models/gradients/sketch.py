"""Squared norms of outer forms from a sketch: both sides folded to fewer columns, at random.

Each of the P columns of the left side gets a random sign, and columns j, j + k, j + 2k, ... are
added up; likewise the Q columns of the right side. G = left^T right becomes F of k by k,

    F = S G R^T,   S_ij = sign_j where j mod k = i, else 0       E |F|^2 = |G|^2

as different columns meet with independent signs. The spread is that of the meetings: for a gradient
of rank one about 2 / sqrt(k) of its square at most, less for one of higher rank, and layers average
it. The signs follow from (seed, parameter, side): all examples of all runs meet the same ones,
so that much of the error is a factor that they share and an order hardly changes.

Source: Charikar, Chen and Farach-Colton, "Finding frequent items in data streams", ICALP 2002 (the
sketch); Woodruff, "Sketching as a tool for numerical linear algebra", 2014, arXiv:1411.4357.
Departures: columns meet by their position, not by a hash, which folding makes fast; k is odd, so
that the same place of two attention heads does not meet.
Cost: T (P + Q) additions and T k^2 products, where the exact norm takes T P Q or T^2 (P + Q) / 2.

Shapes: N examples, T positions, P rows and Q columns of the parameter, k columns of a folded side.
"""

import torch
import xxhash
from torch import Tensor

from curate.errors import ConfigError

_GAIN = 0.5
"""A sketch is taken where it costs at most this share of the exact square."""
_FOLD_PRODUCTS = 8
"""What adding up a number costs, in products of a matrix product."""
_PIECE_NUMBERS = 1 << 26
"""Numbers folded at a time on a GPU."""


class Sketch:
    """How squares are sketched; may be used for any number of batches.

    Args:
        size: k, about; even ones are made odd. The error falls as its root.
        seed: of the signs.

    Raises:
        ConfigError: `size` is below 8.
    """

    def __init__(self, size: int = 127, seed: int = 0) -> None:
        if size < 8:
            raise ConfigError(f"a sketch of size {size} says nothing", fix="take 63 or more")
        self.size = size - 1 + size % 2
        self.seed = seed
        self._signs: dict[tuple[str, int, torch.device, torch.dtype], Tensor] = {}

    def pays(self, p: int, q: int, exact: float) -> bool:
        """Whether a sketch is much cheaper than the exact square.

        Args:
            p: columns of the left side.
            q: columns of the right side.
            exact: products that the exact square takes for each position.
        """
        folded = [width for width in (p, q) if width > self.size]
        if not folded:
            return False
        products = min(p, self.size) * min(q, self.size) + _FOLD_PRODUCTS * sum(folded)
        return products <= _GAIN * exact

    def sides(self, left: Tensor, right: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Both sides with at most `size` columns.

        Args:
            left: (N, T, P)
            right: (N, T, Q)
            name: of the parameter.
        """
        return self._folded(left, f"{name}/left"), self._folded(right, f"{name}/right")

    def _folded(self, values: Tensor, key: str) -> Tensor:
        width = values.shape[2]
        if width <= self.size:
            return values
        signs = self._drawn(key, width, values)
        return (_fold_pieces if values.is_cuda else fold)(values, signs, self.size)

    def _drawn(self, key: str, width: int, like: Tensor) -> Tensor:
        """(width,) signs, the same on every device."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        place = (key, width, like.device, dtype)
        if place not in self._signs:
            draw = torch.Generator().manual_seed(
                xxhash.xxh3_64_intdigest(f"{self.seed}/{key}".encode()) >> 1
            )
            signs = torch.randint(0, 2, (width,), generator=draw) * 2 - 1
            self._signs[place] = signs.to(like.device, dtype)
        return self._signs[place]


def fold(values: Tensor, signs: Tensor, size: int) -> Tensor:
    """(N, T, size) sums of every size-th column, each with its sign.

    Args:
        values: (N, T, D) with D above `size`; half precision is summed up in float32.
        signs: (D,) float32 or float64.
        size: columns that are left.
    """
    found = values[..., :size] * signs[:size]
    for start in range(size, values.shape[2], size):
        part = values[..., start : start + size]
        found[..., : part.shape[2]].addcmul_(part.to(found.dtype), signs[start : start + size])
    return found


def _fold_pieces(values: Tensor, signs: Tensor, size: int) -> Tensor:
    """`fold` in few calls, for a GPU."""
    num, positions, width = values.shape
    rows = values.reshape(-1, width)
    whole = width - width % size
    found = torch.empty(len(rows), size, dtype=signs.dtype, device=values.device)
    step = max(1, _PIECE_NUMBERS // width)
    for start in range(0, len(rows), step):
        moved = rows[start : start + step] * signs
        piece = found[start : start + step]
        torch.sum(moved[:, :whole].unflatten(1, (-1, size)), 1, out=piece)
        piece[:, : width - whole] += moved[:, whole:]
    return found.view(num, positions, size)
