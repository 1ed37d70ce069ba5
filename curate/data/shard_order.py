"""Where each row comes in the output, from its number alone: no list of all rows exists anywhere.

Two maps, both exact and both of any part of the rows at a time, so that every worker can place the
rows that it reads without knowing the others:

`Shuffle`: a random order within a component. Row i of n goes to place E(i), where E is a seeded
bijection of [0, n): a Feistel network over Z_a x Z_b, a b >= n, that walks on until it is back
below n (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002).

`Interleaving`: one stream of K components in which every prefix follows their sizes. A Huffman
tree is built over the sizes; a node merges its two children so that of its first m rows
round(m a / n) are the left child's, a of the node's n rows being its. Row r of a component climbs
from its leaf to the root, one division a level. For every m, the first m rows of the stream hold
each component within 1.68 rows of its share:

    |count_k(m) - m n_k / N| <= 1/2 (1 + n_k/w_1 + n_k/w_2 + ...)
                            <  1/2 (1 + 1 + 1/2 + 1/3 + 1/5 + ...)

Each merge is off by at most half a row, and what is off above a node with w rows reaches the leaf
as n_k / w of it. In a Huffman tree the other child of an ancestor weighs at least as much as the
lighter and the heavier node below, so the ancestors' weights w_1, w_2 ... grow at least like the
Fibonacci numbers, whose reciprocals sum to 3.36. The usual rule, row r of n_k at time
(r + 1/2) / n_k, has no such bound: small components stand together where their times agree.

Cost: of a row, 16 hashes and about log2(N / n_k) divisions. Exact to 2^40 rows.
Shapes: N rows, K components.
"""

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
_UIntArray = npt.NDArray[np.uint64]

LARGEST = 1 << 40
"""Rows that can be put in order."""

_ROUNDS = 8
_LEAST = 256
"""Smaller domains are embedded in one of this size: few rounds cannot reach all orders of them."""
_GOLDEN = 0x9E3779B97F4A7C15
_DIGIT_BITS = 20
_SAFE = 1 << 31
"""Products of two numbers up to here fit into 64 bits."""


class Shuffle:
    """A seeded random order within each of K components.

    Args:
        sizes: (K,) rows of each, up to `LARGEST`.
        keys: (K,) seeds, any 64 bits.
    """

    def __init__(self, sizes: IntArray, keys: Sequence[int]) -> None:
        self._sizes = sizes.astype(np.uint64)
        embedded = np.maximum(sizes, _LEAST)
        left = np.ceil(np.sqrt(embedded)).astype(np.int64)
        self._left = left.astype(np.uint64)
        self._right = (-(-embedded // left)).astype(np.uint64)
        key = np.array([value & 0xFFFFFFFFFFFFFFFF for value in keys], dtype=np.uint64)
        rounds = np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        self._keys = mixed(key[:, None] + rounds)  # (K, rounds)

    def places(self, component: IntArray, number: IntArray) -> IntArray:
        """Places of some rows in the order of their components.

        Args:
            component: (N,) in [0, K).
            number: (N,) of the row within its component, in the order of the input.

        Returns:
            (N,) places, in [0, rows of the component); different for different rows.
        """
        place = number.astype(np.uint64)
        sizes = self._sizes[component]
        walking = np.flatnonzero(sizes > 1)
        while len(walking):
            place[walking] = self._step(component[walking], place[walking])
            walking = walking[place[walking] >= sizes[walking]]
        return place.astype(np.int64)

    def _step(self, component: IntArray, place: _UIntArray) -> _UIntArray:
        """One bijection of [0, a b)."""
        a, b = self._left[component], self._right[component]
        x, y = place // b, place % b
        for number in range(0, _ROUNDS, 2):
            x = _added(x, _below(y ^ self._keys[component, number], a), a)
            y = _added(y, _below(x ^ self._keys[component, number + 1], b), b)
        return x * b + y


def _added(x: _UIntArray, y: _UIntArray, size: _UIntArray) -> _UIntArray:
    total = x + y
    return np.where(total >= size, total - size, total)


def _below(value: _UIntArray, size: _UIntArray) -> _UIntArray:
    """A hash in [0, size); sizes up to 2^20."""
    return ((mixed(value) >> np.uint64(20)) * size) >> np.uint64(44)


def mixed(value: _UIntArray) -> _UIntArray:
    """Every bit of the result depends on every bit of the value (David Stafford's 13th mix)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


class Interleaving:
    """One stream of K components, in which each keeps its own order.

    Args:
        sizes: (K,) rows of each, at least 1; at most `LARGEST` in all.
    """

    def __init__(self, sizes: IntArray) -> None:
        num_leaves = len(sizes)
        num_nodes = 2 * num_leaves - 1
        self._weight = np.zeros(num_nodes, dtype=np.int64)
        self._weight[:num_leaves] = sizes
        self._parent = np.full(num_nodes, -1, dtype=np.int64)
        self._offset = np.zeros(num_nodes, dtype=np.int64)
        heap = [(size, leaf) for leaf, size in enumerate(sizes.tolist())]
        heapq.heapify(heap)
        for node in range(num_leaves, num_nodes):
            (_, right), (_, left) = heapq.heappop(heap), heapq.heappop(heap)
            total = int(self._weight[left] + self._weight[right])
            self._weight[node] = total
            self._parent[[left, right]] = node
            # Of the first m rows, (m a + offset) // total are the child's: half rows go up on
            # one side and so down on the other.
            self._offset[left], self._offset[right] = total // 2, total - 1 - total // 2
            heapq.heappush(heap, (total, node))
        self._is_small = int(self._weight[-1]) <= _SAFE

    def places(self, component: IntArray, rank: IntArray) -> IntArray:
        """Places of some rows in the stream.

        Args:
            component: (N,) in [0, K).
            rank: (N,) place within the component.

        Returns:
            (N,) places, in [0, rows in all).
        """
        node, place = component.copy(), rank.astype(np.int64)
        climbing = np.flatnonzero(self._parent[node] >= 0)
        while len(climbing):
            child = node[climbing]
            parent = self._parent[child]
            # The first m of which (m a + offset) // total reaches place + 1, less one.
            place[climbing] = self._scaled(
                place[climbing] + 1, self._weight[parent], self._offset[child], self._weight[child]
            )
            node[climbing] = parent
            climbing = climbing[self._parent[parent] >= 0]
        return place

    def _scaled(self, x: IntArray, by: IntArray, less: IntArray, over: IntArray) -> IntArray:
        """(x by - less - 1) // over, exact; the numbers go up to `LARGEST`."""
        if self._is_small:
            return (x * by - less - 1) // over
        high, low = x >> _DIGIT_BITS, x & ((1 << _DIGIT_BITS) - 1)
        quotient, rest = np.divmod(high * by, over)
        return (quotient << _DIGIT_BITS) + ((rest << _DIGIT_BITS) + low * by - less - 1) // over
