"""Turns forms into what was asked for, as soon as they come.

What is linear in the gradient is added up form by form. Squares wait until all uses of a parameter
are in.

Shapes: N examples.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from curate.models.gradients.forms import Form, Outer, raised
from curate.models.gradients.request import Gradients, Wanted
from curate.models.gradients.squares import Picked, Squares


class Collector:
    """Results of one batch.

    Args:
        wanted: what to measure.
        shapes: parameter -> its shape, of all parameters that are measured.
        num_examples: N.
        device: where results are kept.
    """

    def __init__(
        self,
        wanted: Wanted,
        shapes: Mapping[str, torch.Size],
        num_examples: int,
        device: torch.device,
    ) -> None:
        self._wanted = wanted
        self._shapes = shapes
        self._num_examples = num_examples
        self._device = device
        self._squares = Squares()
        self._waiting: dict[str, list[Form | Picked]] = {}
        self._found = Gradients({}, {}, {}, {})
        for name in wanted.directions:
            self._found.inner[name] = self._zeros()

    def take(
        self, name: str, form: Form, *, uses: int = 1, lookup_ids: Tensor | None = None
    ) -> None:
        """One use of a parameter.

        Args:
            name: of the parameter.
            form: gradients of this use.
            uses: how many there will be.
            lookup_ids: (N, T) what the one other use looks up, where it is a lookup: then all of
                this one need not be kept.
        """
        self._linear(name, form)
        if not self._wanted.squares:
            return
        entry: Form | Picked = form
        if lookup_ids is not None and isinstance(form, Outer) and form.groups == 1:
            entry = Picked.of(form, lookup_ids, self._squares)
        waiting = self._waiting.setdefault(name, [])
        waiting.append(entry)
        if len(waiting) == uses:
            self._found.squares[name] = self._here(self._squares.of(self._waiting.pop(name)))

    def finish(self) -> Gradients:
        """The results; a parameter without a use has a gradient of zero."""
        for name, entries in self._waiting.items():  # a call whose output had no part in the loss
            self._found.squares[name] = self._here(self._squares.of(entries))
        self._waiting.clear()
        num, found = self._num_examples, self._found
        for name, shape in self._shapes.items():
            if self._wanted.squares:
                found.squares.setdefault(name, self._zeros())
            if name in self._wanted.whole and name not in found.whole:
                found.whole[name] = torch.zeros(num, *shape, device=self._device)
            sides = self._wanted.projections.get(name)
            if sides is not None and name not in found.projections:
                size = (num, sides.left.shape[1], sides.right.shape[1])
                found.projections[name] = torch.zeros(size, device=self._device)
        in_order = {name: found.squares[name] for name in self._shapes if name in found.squares}
        return found._replace(squares=in_order)

    def _linear(self, name: str, form: Form) -> None:
        found = self._found
        for key, direction in self._wanted.directions.items():
            if name in direction:
                found.inner[key] += self._here(form.dot(direction[name]))
        if name in self._wanted.projections:
            add = self._here(raised(form.project(*self._wanted.projections[name])))
            before = found.projections.get(name)
            found.projections[name] = add if before is None else before + add
        if name in self._wanted.whole:
            add = raised(form.whole()).reshape(self._num_examples, *self._shapes[name])
            before = found.whole.get(name)
            found.whole[name] = add if before is None else before + add

    def _here(self, values: Tensor) -> Tensor:
        """Results of a model on several devices come together on one."""
        return values.to(self._device, non_blocking=self._device.type != "cpu")

    def _zeros(self) -> Tensor:
        return torch.zeros(self._num_examples, dtype=torch.float64, device=self._device)
