"""Exact selection in bounded memory: where to cut an order so that a budget is met.

Every row has a position in its group: 128 bits, the upper half from its score, the lower a seeded
hash of its key that breaks ties. Smaller positions come first. A cut is a position too; the rows in
front of it are those with a smaller one. Cuts are found by radix: a pass over the data counts rows
and tokens by the leading bits, the next pass looks only into the bin where the budget runs out,
and what is left of it is collected and sorted once it is small.

Shapes: N rows of a block.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from curate.plan.positions import Bits

END = 1 << 128
"""The cut behind every row."""

_COLLECT_ROWS = 1 << 19
_BINS = 1 << 20
_MOST_BITS = 16


class Block(NamedTuple):
    """Rows that take part in a selection."""

    group: NDArray[np.int64]
    """(N,) index of the group; negative takes no part."""
    key: Bits
    """(N,) upper half of the position."""
    tie: Bits
    """(N,) lower half of the position."""
    tokens: NDArray[np.int64]
    """(N,) number of tokens, 0 or more."""


@dataclass(frozen=True, slots=True)
class Target:
    """How far to go in the order of one group."""

    group: int
    amount: int
    """Rows or tokens."""
    unit: Literal["rows", "tokens"]
    cover: bool = False
    """False: the longest run from the start that stays at or below the amount. True: the shortest
    that reaches it."""


@dataclass(frozen=True, slots=True)
class Found:
    """A cut and what lies in front of it."""

    cut: int
    rows: int
    tokens: int


def is_before(
    key: Bits, tie: Bits, cuts: Sequence[int], group: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """(N,) whether each row lies in front of its group's cut.

    Args:
        key: (N,) upper half of the position.
        tie: (N,) lower half.
        cuts: one for each group.
        group: (N,) index into `cuts`.
    """
    if not any(cuts):
        return np.zeros(len(key), np.bool_)
    whole = np.array([cut >= END for cut in cuts])
    if whole.all():
        return np.ones(len(key), np.bool_)
    high = np.array([min(cut, END - 1) >> 64 for cut in cuts], np.uint64)
    low = np.array([min(cut, END - 1) & ((1 << 64) - 1) for cut in cuts], np.uint64)
    at = high[group]
    return whole[group] | (key < at) | ((key == at) & (tie < low[group]))


def find_cuts(
    blocks: Callable[[], Iterable[Block]], targets: Sequence[Target], sizes: Mapping[int, int]
) -> list[Found]:
    """The cut for each target, by as many passes over the blocks as it takes.

    Args:
        blocks: iterates over all blocks, each time from the start.
        targets: what is wanted.
        sizes: group -> number of its rows in all blocks.

    Returns:
        One cut for each target, in their order.
    """
    search = Search(targets, sizes)
    while not search.is_done():
        for block in blocks():
            search.add(block)
        search.end_pass()
    return search.found()


@dataclass(slots=True)
class _Node:
    """Rows of a group whose positions share their leading bits."""

    group: int
    depth: int
    """Number of leading bits."""
    prefix: int
    rows: int
    """Number of rows in it."""
    rows_before: int = 0
    """Rows of the group in front of it."""
    tokens_before: int = 0
    targets: list[int] = field(default_factory=list[int])
    width: int = 0
    """Bits that this pass tells apart; 0 where the rows are collected."""
    histogram: NDArray[np.int64] | None = None
    """(2, 2^width) rows and tokens in each bin."""
    collected: list[tuple[Bits, Bits, NDArray[np.int64]]] = field(
        default_factory=list[tuple[Bits, Bits, NDArray[np.int64]]]
    )

    def mask(self, key: Bits, tie: Bits) -> NDArray[np.bool_]:
        """(N,) which rows belong to it."""
        if self.depth <= 64:
            return (key >> np.uint64(64 - self.depth)) == np.uint64(self.prefix)
        rest = self.depth - 64
        same = key == np.uint64(self.prefix >> rest)
        if rest == 64:
            return same & (tie == np.uint64(self.prefix & ((1 << 64) - 1)))
        return same & ((tie >> np.uint64(64 - rest)) == np.uint64(self.prefix & ((1 << rest) - 1)))

    def digits(self, key: Bits, tie: Bits) -> NDArray[np.intp]:
        """(N,) the bin of each row."""
        half, depth = (key, self.depth) if self.depth < 64 else (tie, self.depth - 64)
        shifted = half >> np.uint64(64 - depth - self.width)
        return (shifted & np.uint64((1 << self.width) - 1)).astype(np.intp)


class Search:
    """The cuts of many targets at once: `add` every block, `end_pass`, until `is_done`."""

    def __init__(
        self,
        targets: Sequence[Target],
        sizes: Mapping[int, int],
        *,
        same: int = 0,
        collect: int = _COLLECT_ROWS,
    ) -> None:
        """Start with all rows.

        Args:
            targets: what is wanted.
            sizes: group -> number of its rows in all blocks.
            same: this many leading bits are 0 in all positions, and need no pass.
            collect: so many rows may be held in memory.
        """
        self._targets = targets
        self._same = same
        self._collect = collect
        self._found: list[Found | None] = [None] * len(targets)
        roots: dict[int, _Node] = {}
        for index, target in enumerate(targets):
            nothing = target.cover or target.unit == "rows"  # else rows without tokens come in
            if target.amount < 0 or (target.amount == 0 and nothing):
                self._found[index] = Found(0, 0, 0)
                continue
            root = _Node(target.group, same, 0, sizes.get(target.group, 0))
            roots.setdefault(target.group, root).targets.append(index)
        self._open(list(roots.values()))

    def is_done(self) -> bool:
        return not self._nodes

    def found(self) -> list[Found]:
        """The cuts, once the search is done."""
        return [found for found in self._found if found is not None]

    def add(self, block: Block) -> None:
        """Count, or collect, the rows of a block."""
        codes, keys, ties, amounts = block
        if len(codes) and (codes != codes[0]).any():
            # Few groups are sorted by counting.
            narrow = codes.astype(np.int16) if codes.max() < 1 << 15 else codes
            order = np.argsort(narrow, kind="stable")
            codes, keys, ties, amounts = codes[order], keys[order], ties[order], amounts[order]
        starts = np.searchsorted(codes, self._groups, "left")
        sizes = np.searchsorted(codes, self._groups, "right") - starts
        for at in np.flatnonzero(sizes).tolist():
            node, rows = self._nodes[at], slice(starts[at], starts[at] + sizes[at])
            key, tie, tokens = keys[rows], ties[rows], amounts[rows]
            if node.depth > self._same:
                mask = node.mask(key, tie)
                key, tie, tokens = key[mask], tie[mask], tokens[mask]
            if node.histogram is None:
                # Copies: what is kept must not keep the rows of all other groups.
                node.collected.append((key.copy(), tie.copy(), tokens.copy()))
            else:
                digits = node.digits(key, tie)
                np.add.at(node.histogram[0], digits, 1)
                np.add.at(node.histogram[1], digits, tokens)

    def end_pass(self) -> None:
        """Draw the conclusions from a whole pass."""
        following: dict[tuple[int, int, int], _Node] = {}
        for node in self._nodes:
            if node.histogram is None:
                self._sort(node)
            else:
                self._descend(node, node.histogram, following)
        self._open(list(following.values()))

    def _open(self, nodes: list[_Node]) -> None:
        """Decide which nodes are collected and how many bits the others tell apart."""
        self._nodes = nodes
        self._groups = np.array([node.group for node in nodes], np.int64)
        room, counted = self._collect, list[_Node]()
        for node in sorted(nodes, key=lambda node: node.rows):
            room -= node.rows
            if room < 0:
                counted.append(node)
        for node in counted:
            bits = min(_MOST_BITS, max(1, (_BINS // len(counted)).bit_length() - 1))
            node.width = min(bits, 64 - node.depth % 64)
            node.histogram = np.zeros((2, 1 << node.width), np.int64)

    def _limit(self, index: int, node: _Node) -> int:
        """How much of the node is within the target: the first row beyond it is the cut."""
        target = self._targets[index]
        before = node.rows_before if target.unit == "rows" else node.tokens_before
        return target.amount - before - int(target.cover)

    def _sort(self, node: _Node) -> None:
        key, tie, tokens = (
            np.concatenate([part[i] for part in node.collected])
            if node.collected
            else np.zeros(0, np.uint64)
            for i in range(3)
        )
        order = np.lexsort((tie, key)) if self._same < 64 else np.argsort(tie, kind="stable")
        sums = np.cumsum(tokens[order].astype(np.int64))
        counts = np.arange(1, len(order) + 1)
        for index in node.targets:
            target = self._targets[index]
            measure = counts if target.unit == "rows" else sums
            at = int(np.searchsorted(measure, self._limit(index, node), "right"))
            if at == len(order):
                cut, taken = END, at
            else:
                cut = (int(key[order[at]]) << 64 | int(tie[order[at]])) + int(target.cover)
                taken = at + int(target.cover)
            in_front = int(sums[taken - 1]) if taken else 0
            self._found[index] = Found(cut, node.rows_before + taken, node.tokens_before + in_front)

    def _descend(
        self,
        node: _Node,
        histogram: NDArray[np.int64],
        following: dict[tuple[int, int, int], _Node],
    ) -> None:
        sums = np.cumsum(histogram, axis=1)
        depth = node.depth + node.width
        for index in node.targets:
            target = self._targets[index]
            measure = sums[0 if target.unit == "rows" else 1]
            at = int(np.searchsorted(measure, self._limit(index, node), "right"))
            if at == len(measure):  # only at the root: all of the group is within the target
                rows, tokens = (int(total) for total in sums[:, -1])
                self._found[index] = Found(END, rows, tokens)
                continue
            rows, tokens = (int(total) for total in sums[:, at - 1]) if at else (0, 0)
            rows, tokens = rows + node.rows_before, tokens + node.tokens_before
            prefix = node.prefix << node.width | at
            if depth == 128:  # rows that nothing tells apart stay together
                inside = (int(count) for count in histogram[:, at])
                taken = tuple(inside) if target.cover else (0, 0)
                self._found[index] = Found(
                    prefix + int(target.cover), rows + taken[0], tokens + taken[1]
                )
                continue
            inner = _Node(node.group, depth, prefix, int(histogram[0, at]), rows, tokens)
            following.setdefault((node.group, depth, prefix), inner).targets.append(index)
