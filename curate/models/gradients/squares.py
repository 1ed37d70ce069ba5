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

from collections.abc import Mapping, Sequence
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
from curate.models.gradients.sketch import Sketch

Place = tuple[int, int]

_STRIP_POSITIONS = 32
_STRIPS = 8
_GRAM_FAVOUR = 0.8
"""The Gram form must be this much cheaper: it loses digits where T is large."""
_PIECE_NUMBERS = {"cpu": 1 << 17, "cuda": 1 << 26}
"""Numbers of the matrix form at a time; on a CPU they stay in its cache."""
_KEPT_GRAMS = 2


class _Gram(NamedTuple):
    values: Tensor
    """Keeps the memory alive, so that no other tensor can have its address."""
    strips: list[Tensor]


class Picked(NamedTuple):
    """What is left of an outer form to be squared together with a lookup, whose ids are known."""

    square: Tensor
    """(N,) its own square"""
    columns: Tensor
    """(N, T of outer, T of lookup) its left side in the rows that are looked up"""
    right: Tensor
    """(N, T of outer, Q)"""

    @classmethod
    def of(cls, outer: Outer, ids: Tensor, squares: "Squares", name: str = "") -> "Picked":
        index = ids[:, None, :].expand(-1, outer.left.shape[1], -1)
        square = squares.of([outer], name)
        return cls(square, raised(outer.left.gather(2, index)), outer.right)

    def cross(self, lookup: Lookup) -> Tensor:
        """(N,) inner products of the two gradients: tied embedding and head."""
        moved = product(self.right, lookup.values.mT)
        return (self.columns * moved).sum(2).double().sum(1)


class Squares:
    """Squares of forms; remembers the last inputs' Gram matrices for the layers that share them.

    Args:
        sketch: how they are estimated where that is much cheaper.
        sharers: `place_of` a right side -> how many layers have it; one where it is missing.
    """

    def __init__(
        self, sketch: Sketch | None = None, sharers: Mapping[Place, int] | None = None
    ) -> None:
        self._sketch = sketch
        self._sharers = {} if sharers is None else sharers
        self._grams: dict[tuple[int, ...], _Gram] = {}

    def of(self, entries: Sequence[Form | Picked], name: str = "") -> Tensor:
        """(N,) float64 squared norms of the sum of all forms, which belong to parameter `name`."""
        forms = [entry for entry in entries if not isinstance(entry, Picked)]
        picked = [entry for entry in entries if isinstance(entry, Picked)]
        if picked:
            assert len(picked) == 1
            return picked[0].square + sum(
                self._single(form, name) + 2 * picked[0].cross(form)
                for form in forms
                if isinstance(form, Lookup)
            )
        merged = _merge(forms)
        if len(merged) == 1:
            return self._single(merged[0], name)
        first, second = merged[0], merged[1]
        if isinstance(first, Lookup) and isinstance(second, Outer) and len(merged) == 2:
            return self.of([Picked.of(second, first.ids, self, name), first], name)
        return _sum_of_squares(_added(merged))

    def _single(self, form: Form, name: str) -> Tensor:
        if isinstance(form, Lookup):
            return lookup_squares(form)
        if isinstance(form, Whole):
            return _sum_of_squares(form.values)
        if isinstance(form, Routed):
            pairs = self._outer(form.outer.left, form.outer.right, name)
            return pairs.new_zeros(form.num_examples).index_add_(0, form.example, pairs)
        found = self._outer(form.left, form.right, name)
        return found.reshape(-1, form.groups).sum(1)

    def _outer(self, left: Tensor, right: Tensor, name: str) -> Tensor:
        positions, p, q = left.shape[1], left.shape[2], right.shape[2]
        strips = max(1, min(_STRIPS, positions // _STRIP_POSITIONS))
        width = p
        if _address(right) not in self._grams:
            width += q / self._sharers.get(place_of(right), 1)
        share = (strips + 1) / (2 * strips)
        exact = min(positions * width * share, p * q)
        if self._sketch is not None and self._sketch.pays(p, q, exact):
            return by_matrix(*self._sketch.sides(left, right, name))
        if positions * width * share < _GRAM_FAVOUR * p * q:
            return self._by_gram(left, right, strips)
        return by_matrix(left, right)

    def _by_gram(self, left: Tensor, right: Tensor, strips: int) -> Tensor:
        key = _address(right)
        if key not in self._grams:
            while len(self._grams) >= _KEPT_GRAMS:
                del self._grams[next(iter(self._grams))]
            self._grams[key] = _Gram(right, gram_strips(right, strips))
        found = torch.zeros(len(left), dtype=torch.float64, device=left.device)
        pairs = zip(gram_strips(left, strips), self._grams[key].strips, strict=True)
        for one, other in pairs:
            size = one.shape[1]
            # What stands left of the diagonal stands above it too.
            found += 2 * torch.linalg.vecdot(one.flatten(1), other.flatten(1))
            one, other = one[..., -size:], other[..., -size:]
            found -= torch.linalg.vecdot(one.flatten(1), other.flatten(1))
        return found


def gram_strips(values: Tensor, strips: int) -> list[Tensor]:
    """Rows of values values^T up to the diagonal, some at a time, for values (N, T, D)."""
    size = -(-values.shape[1] // strips)
    ends = range(size, values.shape[1] + size, size)
    return [product(values[:, end - size : end], values[:, :end].mT) for end in ends]


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


def place_of(values: Tensor) -> Place:
    """Where numbers are in memory, in whatever shape they are seen."""
    return values.data_ptr(), values.numel()


def _address(values: Tensor) -> tuple[int, ...]:
    return (values.data_ptr(), *values.shape, *values.stride())
