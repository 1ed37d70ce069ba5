"""Projections of the updates that Adam would make of single examples.

    phi = P_o^T Gamma P_i

Gamma is not linear in the gradient, so that each gradient is written out, but never more than a
piece of them: some examples, or some rows of one.

Shapes: N examples, P rows and Q columns of a parameter, p and q of its projection.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from curate.models.adam import Moment, Update, factored_scales
from curate.models.gradients import Seen, Sides
from curate.models.gradients.forms import Form, Lookup, Outer, Routed, Whole, raised

_PIECE_NUMBERS = 1 << 24
"""Numbers of gradients that are written out at a time."""


class AdamProjector:
    """Collects what a backward pass shows of a batch's gradients, and gives their projections.

    Args:
        updates: parameter -> what is made of its gradient, on the device of its sides.
        sides: parameter -> what the update is projected on, in the order of a row.
        piece: numbers of gradients written out at a time.
    """

    def __init__(
        self,
        updates: Mapping[str, Update],
        sides: Mapping[str, Sides],
        piece: int | None = None,
    ) -> None:
        self._updates = updates
        self._sides = sides
        self._piece = piece or _PIECE_NUMBERS
        self._waiting: dict[str, list[Form]] = {}
        self._found: dict[str, Tensor] = {}
        self._divisors: Callable[[], Tensor] | None = None
        self.whole: tuple[str, ...] = ()
        """Parameters that a pass does not tell of, whose gradients it must be asked for."""

    def most_examples(self) -> int | None:
        """How many fit in a batch if gradients must be asked for; None: any number."""
        total = sum(
            len(self._sides[name].left) * len(self._sides[name].right) for name in self.whole
        )
        return max(1, self._piece // total) if total else None

    def begin(self, divisors: Callable[[], Tensor]) -> None:
        """Before each pass, one that ran out of memory included.

        Args:
            divisors: gives, on the way back, (N,) what each gradient is divided by first.
        """
        self._waiting, self._found, self._divisors = {}, {}, divisors

    def see(self, seen: Seen) -> None:
        """Told of every use of a parameter."""
        if seen.name not in self._sides or seen.name in self.whole:
            return
        waiting = self._waiting.setdefault(seen.name, [])
        waiting.append(seen.form)
        if len(waiting) == seen.uses:
            self._found[seen.name] = self._project(seen.name, self._waiting.pop(seen.name))

    def finish(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """(N, p, q) of each parameter; None where the pass must be made once more.

        Args:
            whole: gradients (N, ...) of the parameters in `self.whole`.
        """
        for name in self.whole:
            self._found[name] = self._project(name, [Whole(whole[name])])
        self._waiting = {}
        missing = [name for name in self._sides if name not in self._found]
        if missing:
            self.whole += tuple(missing)
            return None
        found, self._found = self._found, {}
        return found

    def _project(self, name: str, forms: list[Form]) -> Tensor:
        left, right = self._sides[name]
        assert self._divisors is not None
        divisors = self._divisors().to(left.device, left.dtype)
        size = len(left) * len(right)
        step = max(1, self._piece // size)
        found = left.new_zeros(len(divisors), left.shape[1], right.shape[1])
        for start in range(0, len(divisors), step):
            some = slice(start, min(start + step, len(divisors)))
            parts = [_examples(form, some) for form in forms]
            for rows in self._bands(parts, len(left), size):
                gradients = sum(
                    (_written(part, rows, len(left)) for part in parts[1:]),
                    _written(parts[0], rows, len(left)),
                )
                gradients = gradients.to(left.device, left.dtype) / divisors[some, None, None]
                update = self._updates[name].rows(rows).of(gradients)
                found[some] += left[rows].T @ (update @ right)
        return found

    def _bands(self, parts: list[Form], num_rows: int, size: int) -> list[slice]:
        """Rows of a parameter of which one example's gradient alone is too large."""
        is_cut = size > self._piece and all(not isinstance(part, Routed) for part in parts)
        is_cut = is_cut and all(part.groups == 1 for part in parts if isinstance(part, Outer))
        step = max(1, self._piece * num_rows // size) if is_cut else num_rows
        return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def scaled_sides(moments: Mapping[str, Moment], sides: Mapping[str, Sides]) -> dict[str, Sides]:
    """Sides on which a gradient is projected as its factored update would be on the given ones.

    Args:
        moments: parameter -> its moments (P, Q), on the device of its sides.
        sides: parameter -> its sides.
    """
    found: dict[str, Sides] = {}
    for name, (left, right) in sides.items():
        rows, columns = factored_scales(moments[name])
        found[name] = Sides(left * rows[:, None], right * columns[:, None])
    return found


def _examples(form: Form, some: slice) -> Form:
    """The form of some examples."""
    if isinstance(form, Outer):
        place = slice(some.start * form.groups, some.stop * form.groups)
        return Outer(form.left[place], form.right[place], form.groups)
    if isinstance(form, Lookup):
        return Lookup(form.ids[some], form.values[some], form.num_rows)
    if isinstance(form, Whole):
        return Whole(form.values[some])
    chosen = (form.example >= some.start) & (form.example < some.stop)
    return Routed(
        Outer(form.outer.left[chosen], form.outer.right[chosen]),
        form.example[chosen] - some.start,
        form.expert[chosen],
        some.stop - some.start,
        form.num_experts,
    )


def _written(form: Form, rows: slice, num_rows: int) -> Tensor:
    """(n, rows, Q) the gradients themselves; only some rows of what is not fused or grouped."""
    if isinstance(form, Outer) and form.groups == 1:
        form = Outer(form.left[..., rows], form.right)
    elif isinstance(form, Lookup):
        is_here = (form.ids >= rows.start) & (form.ids < rows.stop)
        ids = torch.where(is_here, form.ids - rows.start, 0)
        form = Lookup(ids, form.values * is_here[..., None], rows.stop - rows.start)
    elif isinstance(form, Whole):
        return raised(form.values).reshape(len(form.values), num_rows, -1)[:, rows]
    found = raised(form.whole())
    return found.reshape(len(found), rows.stop - rows.start, -1)
