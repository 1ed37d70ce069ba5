"""Gradients of a batch's examples with respect to one parameter, never written out unless asked.

    Outer    G = sum_t left_t right_t^T        matrices: Linear, convolution, experts
    Lookup   G[id_t] += values_t               embeddings
    Whole    G itself                          vectors: biases, gains
    Routed   outer forms of single experts     fused experts of a mixture

All are linear in the loss, so that inner products, projections and the gradients themselves
of several uses of a parameter add up. Only squares have cross terms: `squares.py`.

Shapes: N examples, T positions, P rows and Q columns of the parameter, G groups, R rank.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


class LowRank(NamedTuple):
    """The matrix left right^T, of the parameter's shape."""

    left: Tensor
    """(P, R)"""
    right: Tensor
    """(Q, R)"""


class Outer(NamedTuple):
    """Sum over positions of outer products, in one block of rows for each group."""

    left: Tensor
    """(N * G, T, P / G)"""
    right: Tensor
    """(N * G, T, Q)"""
    groups: int = 1

    def dot(self, other: Tensor | LowRank) -> Tensor:
        """(N,) inner products with one matrix, by one more product per layer."""
        if isinstance(other, LowRank):
            a, b = other
            if self.groups > 1:
                return self.dot(a @ b.T)
            return (product(self.left, a) * product(self.right, b)).double().sum((1, 2))
        blocks = other.reshape(self.groups, -1, self.right.shape[-1])  # (G, P / G, Q)
        if self.groups == 1:
            moved = product(self.right, blocks[0].T)  # (N, T, P)
        else:
            right = self.right.reshape(-1, self.groups, *self.right.shape[1:])
            moved = product(right, blocks.mT).flatten(0, 1)
        found = (moved * self.left).sum(2).double().sum(1)
        return found.reshape(-1, self.groups).sum(1)

    def project(self, left: Tensor, right: Tensor) -> Tensor:
        """(N, p, q) left^T G right, for left (P, p) and right (Q, q)."""
        if self.groups > 1:
            return left.T @ self.whole() @ right
        return product(onto(self.left, left).mT, onto(self.right, right))

    def whole(self) -> Tensor:
        """(N, P, Q)"""
        found = product(self.left.mT, self.right)
        return found.reshape(-1, self.groups * found.shape[1], found.shape[2])


class Lookup(NamedTuple):
    """Rows that were looked up, with the gradient of each lookup."""

    ids: Tensor
    """(N, T) in [0, P)"""
    values: Tensor
    """(N, T, Q), zero where nothing is looked up"""
    num_rows: int

    def dot(self, other: Tensor | LowRank) -> Tensor:
        if isinstance(other, LowRank):
            moved = product(self.values, other.right) * other.left[self.ids]
        else:
            moved = self.values * other[self.ids]
        return moved.sum(2).double().sum(1)

    def project(self, left: Tensor, right: Tensor) -> Tensor:
        return product(left[self.ids].mT, product(self.values, right))

    def whole(self) -> Tensor:
        num, _, width = self.values.shape
        found = self.values.new_zeros(num, self.num_rows, width, dtype=raised(self.values).dtype)
        index = self.ids[..., None].expand_as(self.values)
        return found.scatter_add_(1, index, raised(self.values))


class Whole(NamedTuple):
    """The gradient of each example, of the parameter's shape."""

    values: Tensor
    """(N, ...)"""

    def dot(self, other: Tensor | LowRank) -> Tensor:
        if isinstance(other, LowRank):
            other = other.left @ other.right.T
        return (self.values * other).flatten(1).double().sum(1)

    def project(self, left: Tensor, right: Tensor) -> Tensor:
        return left.T @ self.values.reshape(len(self.values), len(left), -1) @ right

    def whole(self) -> Tensor:
        return self.values


class Routed(NamedTuple):
    """Outer products, each in the block of one expert."""

    outer: Outer
    """Of M pairs (example, expert)"""
    example: Tensor
    """(M,)"""
    expert: Tensor
    """(M,)"""
    num_examples: int
    num_experts: int

    def dot(self, other: Tensor | LowRank) -> Tensor:
        if isinstance(other, LowRank):
            other = other.left @ other.right.T
        blocks = other.reshape(self.num_experts, self.outer.left.shape[2], -1)  # (E, P, Q)
        found = torch.zeros(self.num_examples, dtype=torch.float64, device=blocks.device)
        for number in torch.unique(self.expert).tolist():
            chosen = self.expert == number
            part = Outer(self.outer.left[chosen], self.outer.right[chosen])
            found.index_add_(0, self.example[chosen], part.dot(blocks[number]))
        return found

    def project(self, left: Tensor, right: Tensor) -> Tensor:
        """(N, p, q) for left (E * P, p): each expert has rows of its own."""
        own = left.reshape(self.num_experts, -1, left.shape[1])[self.expert]  # (M, P, p)
        pairs = product(product(self.outer.left, own).mT, onto(self.outer.right, right))
        found = pairs.new_zeros(self.num_examples, *pairs.shape[1:])
        return found.index_add_(0, self.example, pairs)

    def whole(self) -> Tensor:
        """(N, E, P, Q)"""
        blocks = self.outer.whole()
        found = blocks.new_zeros(self.num_examples, self.num_experts, *blocks.shape[1:])
        found[self.example, self.expert] = blocks
        return found


Form = Outer | Lookup | Whole | Routed


def raised(values: Tensor) -> Tensor:
    """Half precision as float32."""
    return values.float() if values.dtype in _HALF else values


def product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product of half precision summed up, and given, in float32."""
    if left.dtype in _HALF or right.dtype in _HALF:
        if left.is_cuda and left.dim() == right.dim() == 3 and left.dtype == right.dtype:
            return torch.bmm(left, right, out_dtype=torch.float32)
        left, right = left.float(), right.float()
    return left @ right


def onto(values: Tensor, side: Tensor) -> Tensor:
    """(..., p) in float32 at least, of values (..., P) and a side (P, p) of a projection.

    On a GPU half precision stays so, the side too, and is summed up in float32.
    """
    if values.is_cuda and values.dtype in _HALF and values.dim() > 1:
        flat = torch.mm(values.flatten(0, -2), side.to(values.dtype), out_dtype=torch.float32)
        return flat.unflatten(0, values.shape[:-1])
    return product(values, side)
