"""What the second sweep over an output head gives: gradients of its states, weight and bias.

Shapes: M counted positions, D width, V vocabulary, N examples, S positions of the longest one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curate.models.gradients.collector import Collector
from curate.models.gradients.forms import Outer, Whole, product, raised
from curate.models.gradients.layout import Layout
from curate.models.gradients.softmax import Block, Sweep, blocks, errors_at

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class HeadPart:
    """One use of a head on the way back."""

    head: nn.Linear
    sweep: Sweep
    weights: Tensor
    """(M,) gradient of what is differentiated with respect to each loss, no loss scale in it."""
    own: Mapping[str, str]
    """`weight`, `bias` -> the parameter's name, of those that are measured."""
    collector: Collector

    def run(
        self,
        layout: Layout,
        uses: Mapping[str, tuple[int, Tensor | None]],
        *,
        wants_states: bool,
        alone: bool,
    ) -> Tensor | None:
        """The second sweep.

        Args:
            layout: of the counted positions.
            uses: parameter -> how often it is used in this pass, and the ids of its one other use
                where that is a lookup.
            wants_states: whether the gradient of the states is wanted.
            alone: whether the squares of this use are wanted by themselves too.

        Returns:
            (M, D) gradient of the states, float32 or float64.
        """
        given = raised(self.sweep.given.detach())
        states = torch.zeros_like(given) if wants_states else None
        # A weight with a third use must be squared as a whole.
        entire = {name for name, (count, ids) in uses.items() if count != 1 and ids is None}
        kept: list[Block] = []
        seen: tuple[slice, Layout, Tensor] | None = None
        for block in blocks(self.head, self.sweep, self.weights):
            if states is not None:
                states[block.positions] += self._back(block)
            if entire:
                kept.append(block)
            if not self.own:
                continue
            if seen is None or seen[0] != block.positions:
                where = self._part(layout, block)
                # The same tensor for all columns: its Gram matrix is remembered by its address.
                seen = (block.positions, where, where.rows(self._right(given, block)))
            self._give(block, seen[1], seen[2], entire)
        for name in self.own.values():
            count, ids = uses[name]
            if name in entire:
                self._give_entire(name, kept, layout, count, alone=alone)
                continue
            others = None
            if count != 1:
                assert ids is not None
                others = errors_at(self.head, self.sweep, self.weights, layout, ids)
            self.collector.close_blocks(name, uses=count, others=others, alone=alone)
        return states

    def _back(self, block: Block) -> Tensor:
        weight = self.head.weight.detach()[block.columns]
        if block.errors.is_cuda and weight.dtype in _HALF:
            return product(block.errors.to(weight.dtype)[None], weight[None])[0]
        return block.errors @ raised(weight)

    def _right(self, given: Tensor, block: Block) -> Tensor:
        source = self.sweep.given.detach() if self._is_half(block) else given
        return source[block.positions]

    def _is_half(self, block: Block) -> bool:
        """On a GPU products of bfloat16 are summed up in float32, many times faster."""
        return block.errors.is_cuda and self.sweep.given.dtype == torch.bfloat16

    def _part(self, layout: Layout, block: Block) -> Layout:
        if block.examples == slice(None):
            return layout
        first, last = block.examples.start, block.examples.stop
        return Layout(last - first, self.sweep.owner[block.positions] - first)

    def _give(self, block: Block, where: Layout, right: Tensor, entire: set[str]) -> None:
        errors = block.errors.to(right.dtype) if self._is_half(block) else block.errors
        left = where.rows(errors)  # (n, S, v)
        for short, name in self.own.items():
            if name in entire:
                continue
            form = Outer(left, right) if short == "weight" else Whole(raised(left).sum(1))
            self.collector.take_block(name, form, block.examples, block.columns)

    def _give_entire(
        self, name: str, kept: list[Block], layout: Layout, count: int, *, alone: bool
    ) -> None:
        """All errors at once."""
        num = len(self.sweep.given)
        errors = kept[0].errors.new_zeros(num, self.head.out_features)
        for block in kept:
            errors[block.positions, block.columns] = block.errors
        left = layout.rows(errors)
        short = next(key for key, value in self.own.items() if value == name)
        right = layout.rows(raised(self.sweep.given.detach()))
        form = Outer(left, right) if short == "weight" else Whole(left.sum(1))
        self.collector.take(name, form, uses=count, alone=alone)
