"""Squares of gradients in the eigenvectors' axes, a piece of a matrix at a time.

Shapes: B examples of a batch, T positions, O outputs and I inputs of a layer.
"""

import torch
from torch import Tensor

_PIECE_NUMBERS = {"cpu": 1 << 17, "cuda": 1 << 26}
"""Numbers of a matrix at a time; on a CPU they stay in its cache."""


def squares_summed(left: Tensor, right: Tensor) -> Tensor:
    """(O, I) sum over examples of (left_b^T right_b)^2, some rows at a time."""
    p, q = left.shape[2], right.shape[2]
    found = left.new_zeros(p, q)
    for start, stop, memory in _pieces(left, q):
        rows = found[start:stop]
        for n in range(len(left)):
            torch.mm(left[n, :, start:stop].T, right[n], out=memory)
            rows.addcmul_(memory, memory)
    return found


def weighted_squares(left: Tensor, right: Tensor, weights: Tensor) -> Tensor:
    """(B,) float64 sum over the entries of weights * (left_b^T right_b)^2."""
    found = torch.zeros(len(left), dtype=torch.float64, device=left.device)
    for start, stop, memory in _pieces(left, right.shape[2]):
        rows = weights[start:stop]
        other = torch.empty_like(memory)
        for n in range(len(left)):
            torch.mm(left[n, :, start:stop].T, right[n], out=memory)
            torch.mul(memory, rows, out=other)
            found[n] += torch.dot(other.flatten(), memory.flatten())
    return found


def _pieces(left: Tensor, width: int) -> list[tuple[int, int, Tensor]]:
    """Rows of the matrix at a time, and the memory for them."""
    rows = left.shape[2]
    size = min(rows, max(16, _PIECE_NUMBERS["cuda" if left.is_cuda else "cpu"] // width))
    memory = left.new_empty(size, width)
    return [
        (start, min(start + size, rows), memory[: min(size, rows - start)])
        for start in range(0, rows, size)
    ]
