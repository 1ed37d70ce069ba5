"""Which example each row of a tensor belongs to.

Shapes: N examples, B rows of the batch, T positions, S positions of the longest example, D width.
"""

import math

import torch
from torch import Tensor

from curate.errors import CurateError


class NoExampleAxisError(CurateError):
    """A layer saw a tensor that does not say which example its rows belong to."""


class Layout:
    """Cuts tensors of a forward pass into examples.

    Args:
        num_examples: N.
        owner: the example at each position, any shape, -1 where there is none: (B, T) for packed
            rows, (M,) for chosen positions. None: the first axis of every tensor is the example,
            or a multiple of it, example by example.
    """

    def __init__(self, num_examples: int, owner: Tensor | None = None) -> None:
        self.num_examples = num_examples
        self.owner = owner
        self._index: tuple[Tensor, Tensor] | None = None
        self._even = owner is not None and _is_even(owner, num_examples)

    def rows(self, values: Tensor, tail: int = 1) -> Tensor:
        """(N, S, ...) the positions of each example; zeros fill the shorter ones up.

        Args:
            values: any shape whose last `tail` axes are kept; those before them are positions.

        Raises:
            NoExampleAxisError: the shape does not say where an example begins.
        """
        lead = values.shape[: values.dim() - tail]
        kept = values.shape[values.dim() - tail :]
        if self.owner is None:
            if not lead or lead[0] % self.num_examples:
                raise _no_axis(values, self.num_examples)
            return values.reshape(self.num_examples, math.prod(lead) // self.num_examples, *kept)
        flat = self._positions(values, lead)  # (positions, inner, ...)
        if self._even:
            size = len(flat) // self.num_examples
            return flat.reshape(self.num_examples, size * flat.shape[1], *kept)
        index, present = (part.to(flat.device) for part in self._gather())
        found = flat[index]  # (N, S, inner, ...)
        found = found.masked_fill(~present.reshape(*present.shape, *[1] * (found.dim() - 2)), 0)
        return found.flatten(1, 2)

    def owners(self, count: int) -> Tensor | None:
        """(count,) the example of each of the batch's positions; None if they are not so many."""
        if self.owner is not None:
            return self.owner.flatten() if self.owner.numel() == count else None
        if count % self.num_examples:
            return None
        return torch.arange(self.num_examples).repeat_interleave(count // self.num_examples)

    def shared(self, values: Tensor) -> Tensor:
        """What one row holds for the whole batch, repeated for each of its rows."""
        count = self.num_examples if self.owner is None else len(self.owner)
        return values.expand(count, *values.shape[1:])

    def _positions(self, values: Tensor, lead: torch.Size) -> Tensor:
        owner = self.owner
        assert owner is not None
        kept = values.shape[len(lead) :]
        if lead[: owner.dim()] == owner.shape:
            return values.reshape(owner.numel(), -1, *kept)
        if lead[:1] == (owner.numel(),):
            return values.reshape(owner.numel(), -1, *kept)
        # Heads stand before positions in some attentions: (B, heads, T, D).
        if owner.dim() == 2 and len(lead) == 3 and (lead[0], lead[2]) == tuple(owner.shape):
            return values.transpose(1, 2).reshape(owner.numel(), lead[1], *kept)
        raise _no_axis(values, self.num_examples)

    def _gather(self) -> tuple[Tensor, Tensor]:
        """(N, S) positions of each example in a flat tensor, and which of them exist."""
        if self._index is None:
            assert self.owner is not None
            owner = self.owner.flatten()
            order = owner.argsort(stable=True)
            order = order[owner[order] >= 0]
            counts = owner[order].bincount(minlength=self.num_examples)
            column = torch.arange(int(counts.max()) if len(order) else 0, device=owner.device)
            present = column < counts[:, None]
            starts = counts.cumsum(0) - counts
            index = (starts[:, None] + column).clamp(max=max(len(order) - 1, 0))
            self._index = order[index], present
        return self._index


def _is_even(owner: Tensor, num_examples: int) -> bool:
    """Whether all examples have equally many positions, one after the other."""
    if owner.numel() == 0 or owner.numel() % num_examples:
        return False
    straight = torch.arange(num_examples, device=owner.device)
    return torch.equal(owner.flatten(), straight.repeat_interleave(owner.numel() // num_examples))


def _no_axis(values: Tensor, num_examples: int) -> NoExampleAxisError:
    return NoExampleAxisError(
        f"a tensor of shape {tuple(values.shape)} has no axis of {num_examples} examples",
        fix="leave the layer out of the parameters that are measured, or score without gradients",
    )
