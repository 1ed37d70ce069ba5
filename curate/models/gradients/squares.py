"""Squared norms of per-example gradients from their forms.

For an outer form, with A = left and B = right of one example,

    |A^T B|^2 = sum_ts (A A^T)_ts (B B^T)_ts      Gram form: T^2 (P + Q) products, upper half only
              = sum_pq (A^T B)_pq^2               matrix form: T P Q products

whichever is cheaper; layers that share an input share its Gram matrix. Uses of one parameter are
put together before the square: the sum of their squares would lack the cross terms.

Source: Li, Tramer, Liang and Hashimoto, "Large language models can be strong differentially
private learners", ICLR 2022, arXiv:2110.05679 (Gram form); for tied weights, derived.
Departures: none.
Cost: as above; memory of one block of the matrix, or T^2 numbers for each example.

Shapes: N examples, T positions, P rows and Q columns of the parameter.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from curate.models.gradients.forms import (
    Form,
    Lookup,
    Outer,
    Routed,
    Whole,
    product,
    raised,
)

_BLOCK_POSITIONS = 32
_BLOCKS = 4
_GRAM_FAVOUR = 0.8
"""The Gram form must be this much cheaper: it loses digits where T is large."""
_PIECE_NUMBERS = {"cpu": 1 << 17, "cuda": 1 << 26}
"""Numbers of the matrix form at a time; on a CPU they stay in its cache."""
_KEPT_GRAMS = 2


class _Gram(NamedTuple):
    values: Tensor
    """Keeps the memory alive, so that no other tensor can have its address."""
    blocks: list[list[Tensor]]


class Picked(NamedTuple):
    """What is left of an outer form to be squared together with a lookup, whose ids are known."""

    square: Tensor
    """(N,) its own square"""
    columns: Tensor
    """(N, T of outer, T of lookup) its left side in the rows that are looked up"""
    right: Tensor
    """(N, T of outer, Q)"""

    @classmethod
    def of(cls, outer: Outer, ids: Tensor, squares: "Squares") -> "Picked":
        index = ids[:, None, :].expand(-1, outer.left.shape[1], -1)
        return cls(squares.of([outer]), raised(outer.left.gather(2, index)), outer.right)

    def cross(self, lookup: Lookup) -> Tensor:
        """(N,) inner products of the two gradients: tied embedding and head."""
        moved = product(self.right, lookup.values.mT)
        return (self.columns * moved).sum(2).double().sum(1)


class Squares:
    """Squares of forms; remembers the last inputs' Gram matrices for the layers that share them."""

    def __init__(self) -> None:
        self._grams: dict[tuple[int, ...], _Gram] = {}

    def of(self, entries: Sequence[Form | Picked]) -> Tensor:
        """(N,) float64 squared norms of the sum of all forms, which belong to one parameter."""
        forms = [entry for entry in entries if not isinstance(entry, Picked)]
        picked = [entry for entry in entries if isinstance(entry, Picked)]
        if picked:
            assert len(picked) == 1
            return picked[0].square + sum(
                self._single(form) + 2 * picked[0].cross(form)
                for form in forms
                if isinstance(form, Lookup)
            )
        merged = _merge(forms)
        if len(merged) == 1:
            return self._single(merged[0])
        first, second = merged[0], merged[1]
        if isinstance(first, Lookup) and isinstance(second, Outer) and len(merged) == 2:
            return self.of([Picked.of(second, first.ids, self), first])
        return _sum_of_squares(_added(merged))

    def _single(self, form: Form) -> Tensor:
        if isinstance(form, Lookup):
            return lookup_squares(form)
        if isinstance(form, Whole):
            return _sum_of_squares(form.values)
        if isinstance(form, Routed):
            pairs = self._outer(form.outer.left, form.outer.right)
            return pairs.new_zeros(form.num_examples).index_add_(0, form.example, pairs)
        found = self._outer(form.left, form.right)
        return found.reshape(-1, form.groups).sum(1)

    def _outer(self, left: Tensor, right: Tensor) -> Tensor:
        positions, p, q = left.shape[1], left.shape[2], right.shape[2]
        blocks = max(1, min(_BLOCKS, positions // _BLOCK_POSITIONS))
        width = p if _address(right) in self._grams else p + q
        share = (blocks + 1) / (2 * blocks)
        if positions * width * share < _GRAM_FAVOUR * p * q:
            return self._by_gram(left, right, blocks)
        return by_matrix(left, right)

    def _by_gram(self, left: Tensor, right: Tensor, blocks: int) -> Tensor:
        key = _address(right)
        if key not in self._grams:
            while len(self._grams) >= _KEPT_GRAMS:
                del self._grams[next(iter(self._grams))]
            self._grams[key] = _Gram(right, gram_blocks(right, blocks))
        found = torch.zeros(len(left), dtype=torch.float64, device=left.device)
        for i, row in enumerate(gram_blocks(left, blocks)):
            for j, block in enumerate(row):
                other = self._grams[key].blocks[i][j]
                found += (1 if i == j else 2) * torch.linalg.vecdot(
                    block.flatten(1), other.flatten(1)
                )
        return found


def gram_blocks(values: Tensor, blocks: int) -> list[list[Tensor]]:
    """Lower block triangle of values values^T, for values (N, T, D)."""
    pieces = values.chunk(blocks, 1)
    return [[product(pieces[i], pieces[j].mT) for j in range(i + 1)] for i in range(len(pieces))]


def by_matrix(left: Tensor, right: Tensor) -> Tensor:
    """(N,) |left^T right|^2 from the product, a piece of it at a time."""
    num, _, p = left.shape
    q = right.shape[2]
    found = torch.zeros(num, dtype=torch.float64, device=left.device)
    piece = _PIECE_NUMBERS["cuda" if left.is_cuda else "cpu"]
    if left.is_cuda or num * p * q <= piece:
        size = max(1, piece // (p * q))
        for start in range(0, num, size):
            stop = start + size
            block = product(left[start:stop].mT, right[start:stop]).flatten(1)
            found[start:stop] = torch.linalg.vecdot(block, block)
        return found
    left, right = raised(left), raised(right)
    size = min(p, max(16, piece // q))
    memory = left.new_empty(size * q)
    for n in range(num):
        for start in range(0, p, size):
            stop = min(start + size, p)
            block = memory[: (stop - start) * q]
            torch.mm(left[n, :, start:stop].T, right[n], out=block.view(stop - start, q))
            found[n] += torch.dot(block, block)
    return found


def lookup_squares(form: Lookup) -> Tensor:
    """(N,) squares of the gradients of looked-up rows, equal ids summed first."""
    values = raised(form.values)
    num, _, width = values.shape
    if values.is_cuda:  # unique would wait for the device
        same = form.ids[:, :, None] == form.ids[:, None, :]
        return (product(values, values.mT) * same).double().sum((1, 2))
    example = torch.arange(num)[:, None]
    keys, place = torch.unique(example * form.num_rows + form.ids, return_inverse=True)
    summed = values.new_zeros(len(keys), width)
    summed.index_add_(0, place.flatten(), values.flatten(0, 1))
    found = torch.zeros(num, dtype=torch.float64)
    owner = torch.div(keys, form.num_rows, rounding_mode="floor")
    return found.index_add_(0, owner, torch.linalg.vecdot(summed, summed).double())


def _merge(forms: Sequence[Form]) -> list[Form]:
    """Lookups as one, outers as one, wholes as one; in that order."""
    lookups = [form for form in forms if isinstance(form, Lookup)]
    outers = [form for form in forms if isinstance(form, Outer)]
    wholes = [form for form in forms if isinstance(form, Whole)]
    routed = [form for form in forms if isinstance(form, Routed)]
    merged: list[Form] = [*lookups] if len(lookups) == 1 else []
    if len(lookups) > 1:
        ids = torch.cat([form.ids for form in lookups], 1)
        values = torch.cat([form.values for form in lookups], 1)
        merged.append(Lookup(ids, values, lookups[0].num_rows))
    if len(outers) == 1 or len({form.groups for form in outers}) > 1:
        merged += outers
    elif outers:
        left = torch.cat([form.left for form in outers], 1)
        right = torch.cat([form.right for form in outers], 1)
        merged.append(Outer(left, right, outers[0].groups))
    if wholes:
        merged.append(Whole(_added(wholes)))
    return merged + routed


def _added(forms: Sequence[Form]) -> Tensor:
    whole = raised(forms[0].whole())
    for form in forms[1:]:
        whole = whole + form.whole().reshape(whole.shape)
    return whole


def _sum_of_squares(values: Tensor) -> Tensor:
    return raised(values).flatten(1).double().square().sum(1)


def _address(values: Tensor) -> tuple[int, ...]:
    return (values.data_ptr(), *values.shape, *values.stride())
