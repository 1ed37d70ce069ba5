"""Columns that a loss needs and a model does not take: weights and domains, carried past the model.

The collator wrapper puts them into the batch as tensors; a hook before the model's forward takes
them out again. Without it they would vanish in the model's keyword arguments.

Shapes: B examples of a batch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curate.config import nearest
from curate.errors import InputError

Collator = Callable[[list[Any]], Any]


class CarryingCollator:
    """A collator that hands on weights and domains beside what another one makes.

    Args:
        inner: the collator of the task; it sees only the columns in `keep`.
        keep: what the model and the inner collator take.
        weight_column: weights from 0 up; None where there are none.
        domain_column: names of domains, which become indices; None where there are none.
        domains: the names, in the order of the indices.
    """

    def __init__(
        self,
        inner: Collator,
        *,
        keep: Sequence[str],
        weight_column: str | None = None,
        domain_column: str | None = None,
        domains: Sequence[str] = (),
    ) -> None:
        self._inner = inner
        self._keep = frozenset(keep)
        self._weight_column = weight_column
        self._domain_column = domain_column
        self._numbers = {name: number for number, name in enumerate(domains)}

    def __call__(self, examples: list[Mapping[str, Any]]) -> Any:
        batch = self._inner(
            [{key: value for key, value in each.items() if key in self._keep} for each in examples]
        )
        # Examples to evaluate on may have neither: the loss asks for them in training only.
        weights = _column(examples, self._weight_column)
        if self._weight_column and weights:
            batch[self._weight_column] = torch.tensor(
                [_weight(value, self._weight_column) for value in weights]
            )
        domains = _column(examples, self._domain_column)
        if self._domain_column and domains:
            batch[self._domain_column] = torch.tensor([self._number(name) for name in domains])
        return batch

    def _number(self, name: Any) -> int:
        if name not in self._numbers:
            raise InputError(
                f"an example is of domain {name!r}, which is not among those given",
                fix=nearest(str(name), self._numbers) or "pass all names as domains",
            )
        return self._numbers[name]


class Carried:
    """Takes the columns out of a model's arguments, at every call.

    Args:
        model: the model that the trainer calls, without the wrappers of several devices.
        names: of the columns.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self.columns: dict[str, Tensor] = {}
        """Column -> (B,) values of the last call; those that the batch had."""
        self._hook = model.register_forward_pre_hook(self._take, with_kwargs=True)

    def _take(
        self, model: nn.Module, args: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.columns = {name: given[name] for name in self._names if name in given}
        return args, {key: value for key, value in given.items() if key not in self._names}


def _column(examples: Sequence[Mapping[str, Any]], name: str | None) -> list[Any]:
    if name is None or not all(name in each for each in examples):
        return []
    return [each[name] for each in examples]


def _weight(value: Any, column: str) -> float:
    if value is None or not (math.isfinite(value) and value >= 0):
        raise InputError(
            f"an example has the {column} {value}", fix="give every example a weight from 0 up"
        )
    return float(value)
