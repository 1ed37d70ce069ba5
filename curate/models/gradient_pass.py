"""Squared gradient norms of a batch, and what its logits say, from the same forward pass.

Shapes: N examples of a batch, M counted positions, V classes or tokens.
"""

import logging
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from curate.models.gradients import Engine, Gradients, Wanted, first_sweep, softmax_losses
from curate.models.gradients.groups import (
    HEAD,
    Squared,
    by_group,
    groups_of,
    last_layer,
    parse_name,
    selected,
)
from curate.models.gradients.sketch import Sketch
from curate.models.tasks import Batch, Task, Unheaded
from curate.models.terms import Terms, exact_losses, terms

log = logging.getLogger(__name__)

_COMPARED_EXAMPLES = 4


class Measured(NamedTuple):
    """What one batch gave."""

    terms: Terms
    """Of each counted position, (M,), without a graph."""
    owner: Tensor
    """(M,) example of each position."""
    squares: dict[str, Tensor]
    """Quantity -> (N,) float64 squared norm."""


class GradientPass:
    """The gradients of a task's loss, summed over the counted positions of each example.

    Args:
        model: in eval mode; parameters that require a gradient are measured.
        task: that makes the batches.
        wanted: quantities; those that are squared norms, as `gradients.groups` names them.

    Raises:
        ConfigError: a selection has no parameter.
    """

    def __init__(self, model: nn.Module, task: Task, wanted: Collection[str]) -> None:
        self._task = task
        self._seen: tuple[Terms, Tensor] | None = None
        names = sorted(set(wanted))
        asked = [parsed for name in names if (parsed := parse_name(name)) is not None]
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        needs_head = any(one.selection == HEAD or one.group is not None for one in asked)
        head = last_layer(model) if needs_head else None
        self._sums = _sums(asked, model, named, head)
        self.is_light = all(one.selection == HEAD for one in asked)
        """Whether the gradient goes no further back than the last layer."""
        measured = {name for names in self._sums.values() for name in names}
        # Where the exact norms are needed anyway, they do for both.
        self._sketch = Sketch() if all(one.sketched for one in asked) else None
        self._is_compared = self._sketch is None
        self._engine = Engine(
            model,
            only=measured.__contains__,
            head=head,
            head_only=self.is_light,
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the squared norms, groups of layers written out."""
        return tuple(self._sums)

    @property
    def slow(self) -> list[str]:
        """Parameters that are measured through the whole model; known after the first batch."""
        return self._engine.slow

    def measure(self, batch: Batch, num_examples: int) -> Measured:
        """What the counted positions of a batch say, and its squared norms."""
        if not self._is_compared:
            self._compare(batch, num_examples)
        wanted = Wanted(sketch=self._sketch)
        found = self._engine.measure(self.losses, batch, num_examples=num_examples, wanted=wanted)
        seen, self._seen = self._seen, None
        assert seen is not None  # the engine's last call of the losses is for the whole batch
        squares = {
            column: torch.stack([_square(found, name, column) for name in names]).sum(0)
            for column, names in self._sums.items()
        }
        return Measured(*seen, squares)

    def _compare(self, batch: Batch, num_examples: int) -> None:
        """Say how far sketched norms are from exact ones, on a few examples."""
        num = min(_COMPARED_EXAMPLES, num_examples)
        few = {key: value[:num] for key, value in batch.items()}
        exact, sketched = (
            self._engine.measure(self.losses, few, num_examples=num, wanted=wanted).total().sqrt()
            for wanted in (Wanted(), Wanted(sketch=self._sketch))
        )
        error = (sketched / exact - 1).abs()
        log.info("sketched gradient norms of %d examples are %.1f %% off, %.1f %% at most",
                 num, 100 * float(error.mean()), 100 * float(error.max()))  # fmt: skip
        self._is_compared = True

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """(N,) losses whose gradients are measured, summed over the counted positions."""
        before: Any = getattr(self._task, "before_head", None)
        rows: Unheaded | None = None if before is None else before(model, dict(batch))
        if rows is None:
            flat = self._task.logits_and_targets(model, dict(batch))
            owner = flat.owner
            with torch.no_grad():
                self._seen = terms(flat.logits.detach(), flat.targets), owner
            each = exact_losses(flat.logits, flat.targets)  # (M,)
        else:
            sweep = first_sweep(rows.head, rows.states, rows.targets, rows.owner)
            owner = rows.owner
            self._seen = sweep.terms, owner
            each = softmax_losses(rows.head, sweep)
        num_examples = len(next(iter(batch.values())))
        return torch.zeros(num_examples, dtype=each.dtype, device=each.device).index_add(
            0, owner, each
        )


def _sums(
    asked: Collection[Squared],
    model: nn.Module,
    named: Mapping[str, nn.Parameter],
    head: nn.Module | None,
) -> dict[str, list[str]]:
    """Quantity -> the parameters that it is the sum over."""
    at_head = set() if head is None else set(head.parameters(recurse=False))
    elsewhere = {
        parameter
        for module in model.modules()
        if module is not head
        for parameter in module.parameters(recurse=False)
    }
    head_names = {name for name, parameter in named.items() if parameter in at_head}
    own = {name for name in head_names if named[name] not in elsewhere}
    groups = groups_of([name for name, _ in model.named_parameters()], own)
    found: dict[str, list[str]] = {}
    for one in asked:
        names = selected(one.selection, list(named), head_names)
        if one.group is None:
            found[one.name] = names
        else:
            for group, members in by_group(names, groups).items():
                found[one._replace(group=group).name] = members
    return found


def _square(found: Gradients, name: str, column: str) -> Tensor:
    parsed = parse_name(column)
    assert parsed is not None
    if parsed.selection == HEAD:
        return found.alone.get(name, found.squares[name])
    return found.squares[name]
