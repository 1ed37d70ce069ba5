"""How far projected gradients are from whole ones, on a few examples.

Shapes: N examples, k numbers of a projected gradient.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from curate.models.gradients import Engine, Wanted
from curate.models.gradients.fallback import Batch, Losses

_EXACT_NUMBERS = 1 << 27
"""Of whole gradients, in memory at a time."""


class Agreement(NamedTuple):
    """How well inner products of projected gradients order pairs of examples."""

    spearman: float
    pairs: int

    def __str__(self) -> str:
        return (
            f"Spearman correlation {self.spearman:.3f} of projected with exact inner products,"
            f" {self.pairs:,} pairs"
        )


def agreement(rows: Tensor, exact: Tensor) -> Agreement:
    """Rank correlation over all pairs of different examples.

    Args:
        rows: (N, k) projected gradients.
        exact: (N, N) from `exact_products`.
    """
    from scipy.stats import spearmanr

    place = torch.triu_indices(len(rows), len(rows), 1)
    values = rows.double() @ rows.double().T
    found: Any = spearmanr(values[place[0], place[1]], exact[place[0], place[1]])
    return Agreement(float(found.statistic), place.shape[1])


def exact_products(
    model: nn.Module, losses: Losses, batch: Batch, names: Sequence[str], *, num_examples: int
) -> Tensor:
    """(N, N) float64 inner products of the whole gradients of some parameters.

    For a few dozen examples: their gradients are written out, some parameters at a time.

    Args:
        model: in eval mode.
        losses: gives (N,) losses of the batch.
        batch: of N examples.
        names: of the parameters.
        num_examples: N.
    """
    known = dict(model.named_parameters())
    found = torch.zeros(num_examples, num_examples, dtype=torch.float64)
    for group in _groups(names, lambda name: num_examples * known[name].numel()):
        engine = Engine(model, only=set(group).__contains__)
        wanted = Wanted(squares=False, whole=group)
        gradients = engine.measure(losses, batch, num_examples=num_examples, wanted=wanted).whole
        for value in gradients.values():
            flat = value.flatten(1)
            found += (flat @ flat.T).double().cpu()
    return found


def _groups(names: Sequence[str], size: Callable[[str], int]) -> list[list[str]]:
    """Names with at most `_EXACT_NUMBERS` numbers together, or one alone."""
    found: list[list[str]] = []
    total = 0
    for name in names:
        if not found or total + size(name) > _EXACT_NUMBERS:
            found.append([])
            total = 0
        found[-1].append(name)
        total += size(name)
    return found
