"""Turns forms into what was asked for, as soon as they come.

What is linear in the gradient is added up form by form. Squares wait until all uses of a parameter
are in.

Shapes: N examples.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from curate.models.gradients.forms import Form, LowRank, Outer, raised
from curate.models.gradients.request import Gradients, Wanted
from curate.models.gradients.squares import Picked, Place, Squares


class Collector:
    """Results of one batch.

    Args:
        wanted: what to measure.
        parameters: name -> parameter, of all that are measured.
        num_examples: N.
        device: where results are kept.
        sharers: see `Squares`.
    """

    def __init__(
        self,
        wanted: Wanted,
        parameters: Mapping[str, Tensor],
        num_examples: int,
        device: torch.device,
        sharers: Mapping[Place, int] | None = None,
    ) -> None:
        self._wanted = wanted
        self._shapes = {name: value.shape for name, value in parameters.items()}
        self._dtypes = {
            name: torch.float64 if value.dtype == torch.float64 else torch.float32
            for name, value in parameters.items()
        }
        self._num_examples = num_examples
        self._device = device
        self._squares = Squares(wanted.sketch, sharers)
        self._waiting: dict[str, list[Form | Picked]] = {}
        self._blocks: dict[str, Tensor] = {}
        self._found = Gradients({}, {}, {}, {}, {})
        for name in wanted.directions:
            self._found.inner[name] = self._zeros()

    def take(
        self,
        name: str,
        form: Form,
        *,
        uses: int = 1,
        lookup_ids: Tensor | None = None,
        alone: bool = False,
    ) -> None:
        """One use of a parameter.

        Args:
            name: of the parameter.
            form: gradients of this use.
            uses: how many there will be.
            lookup_ids: (N, T) what the one other use looks up, where it is a lookup: then all of
                this one need not be kept.
            alone: whether the square of this use is wanted by itself too.
        """
        self._linear(name, form)
        if not self._wanted.squares:
            return
        entry: Form | Picked = form
        if lookup_ids is not None and isinstance(form, Outer) and form.groups == 1:
            entry = Picked.of(form, lookup_ids, self._squares, name)
        if alone and uses > 1:
            self._found.alone[name] = (
                entry.square if isinstance(entry, Picked) else self._squares.of([form], name)
            )
        self._put(name, entry, uses)

    def take_block(self, name: str, form: Form, examples: slice, rows: slice) -> None:
        """A part of one use: some rows of the parameter, for some examples.

        Args:
            name: of the parameter.
            form: gradients of these rows.
            examples: which of the batch.
            rows: of the parameter.
        """
        wanted, found = self._wanted, self._found
        for key, direction in wanted.directions.items():
            if name in direction:
                found.inner[key][examples] += form.dot(_part(direction[name], rows))
        if name in wanted.projections:
            left, right = wanted.projections[name]
            if name not in found.projections:
                found.projections[name] = self._empty_projection(name)
            found.projections[name][examples] += raised(form.project(left[rows], right))
        if name in wanted.whole:
            if name not in found.whole:
                found.whole[name] = self._empty_whole(name)
            part = found.whole[name][examples, rows]
            found.whole[name][examples, rows] += raised(form.whole()).reshape(part.shape)
        if wanted.squares:
            if name not in self._blocks:
                self._blocks[name] = self._zeros()
            self._blocks[name][examples] += self._squares.of([form], f"{name}[{rows.start}:]")

    def close_blocks(
        self, name: str, *, uses: int, others: tuple[Tensor, Tensor] | None, alone: bool = False
    ) -> None:
        """All blocks of one use are in.

        Args:
            name: of the parameter.
            uses: how many there will be.
            others: of a use that meets one lookup, the left side in the rows that are looked up
                and the right side, as `Picked` has them.
            alone: whether the square of this use is wanted by itself too.
        """
        if not self._wanted.squares:
            return
        square = self._blocks.pop(name) if name in self._blocks else self._zeros()
        if alone and uses > 1:
            self._found.alone[name] = square
        if others is None:
            assert uses == 1
            self._found.squares[name] = square
        else:
            self._put(name, Picked(square, *others), uses)

    def _put(self, name: str, entry: Form | Picked, uses: int) -> None:
        waiting = self._waiting.setdefault(name, [])
        waiting.append(entry)
        if len(waiting) == uses:
            self._found.squares[name] = self._here(self._squares.of(self._waiting.pop(name), name))

    def add_projection(self, name: str, values: Tensor) -> None:
        """The projection (N, p, q) of one use, where it was made elsewhere."""
        add = self._here(raised(values))
        before = self._found.projections.get(name)
        self._found.projections[name] = add if before is None else before + add

    def finish(self) -> Gradients:
        """The results; a parameter without a use has a gradient of zero."""
        for name, entries in self._waiting.items():  # a call whose output had no part in the loss
            self._found.squares[name] = self._here(self._squares.of(entries, name))
        self._waiting.clear()
        found = self._found
        for name in self._shapes:
            if self._wanted.squares:
                found.squares.setdefault(name, self._zeros())
            if name in self._wanted.whole and name not in found.whole:
                found.whole[name] = self._empty_whole(name)
            if name in self._wanted.projections and name not in found.projections:
                found.projections[name] = self._empty_projection(name)
        in_order = {name: found.squares[name] for name in self._shapes if name in found.squares}
        return found._replace(squares=in_order)

    def _linear(self, name: str, form: Form) -> None:
        found = self._found
        for key, direction in self._wanted.directions.items():
            if name in direction:
                found.inner[key] += self._here(form.dot(direction[name]))
        if name in self._wanted.projections:
            self.add_projection(name, form.project(*self._wanted.projections[name]))
        if name in self._wanted.whole:
            add = raised(form.whole()).reshape(self._num_examples, *self._shapes[name])
            before = found.whole.get(name)
            found.whole[name] = add if before is None else before + add

    def _here(self, values: Tensor) -> Tensor:
        """Results of a model on several devices come together on one."""
        return values.to(self._device, non_blocking=self._device.type != "cpu")

    def _zeros(self) -> Tensor:
        return torch.zeros(self._num_examples, dtype=torch.float64, device=self._device)

    def _empty_whole(self, name: str) -> Tensor:
        dtype = self._dtypes[name]
        return torch.zeros(
            self._num_examples, *self._shapes[name], dtype=dtype, device=self._device
        )

    def _empty_projection(self, name: str) -> Tensor:
        left, right = self._wanted.projections[name]
        size = (self._num_examples, left.shape[1], right.shape[1])
        return torch.zeros(size, dtype=self._dtypes[name], device=self._device)


def _part(direction: Tensor | LowRank, rows: slice) -> Tensor | LowRank:
    if isinstance(direction, LowRank):
        return LowRank(direction.left[rows], direction.right)
    return direction[rows]
