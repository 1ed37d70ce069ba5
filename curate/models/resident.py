"""The checkpoints of one training run, one at a time in one model."""

import copy
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from curate.errors import ConfigError

log = logging.getLogger(__name__)

_KEEP_BYTES = {"cpu": 1 << 30, "cuda": 1 << 33}
"""Weights of all checkpoints together that are kept at hand."""


class Resident:
    """Checkpoints that take turns in memory.

    Where the weights of all of them fit into `keep_bytes` they are read once, and a turn copies
    them into one resident model; else a turn loads the checkpoint.

    Args:
        names: K, for the messages.
        load: the model of a checkpoint, in eval mode; a call may end the life of the one before.
        keep_bytes: None takes 1 GB, or 8 GB on a GPU.

    Raises:
        ConfigError: a checkpoint has another architecture than the first.
    """

    def __init__(
        self,
        names: Sequence[str],
        load: Callable[[int], nn.Module],
        *,
        keep_bytes: int | None = None,
    ) -> None:
        self._names, self._load = list(names), load
        self._states: list[dict[str, Tensor]] = []
        self._model: nn.Module | None = None
        model = load(0)
        self._shapes = _shapes(model)
        device = next(model.parameters()).device.type
        limit = _KEEP_BYTES.get(device, 0) if keep_bytes is None else keep_bytes
        is_plain = all(p.is_floating_point() for p in model.parameters())
        if not is_plain or _bytes(model) * len(self._names) > limit:
            log.info("%d checkpoints are loaded in turn: together they are too large to keep",
                     len(self._names))  # fmt: skip
            return
        self._model = copy.deepcopy(model)
        self._states = [_copy(model)]
        for index in range(1, len(self._names)):
            self._states.append(_copy(self._checked(index)))

    def __len__(self) -> int:
        return len(self._names)

    def at(self, index: int) -> nn.Module:
        """Checkpoint `index` as a model; its weights change with the next call."""
        if self._model is None:
            return self._checked(index)
        self._model.load_state_dict(self._states[index])
        return self._model

    def _checked(self, index: int) -> nn.Module:
        model = self._load(index)
        shapes = _shapes(model)
        for name in sorted(self._shapes.keys() | shapes.keys()):
            first, found = self._shapes.get(name), shapes.get(name)
            if first != found:
                raise other_architecture(
                    self._names[index], self._names[0], f"{name} is {found}, not {first}"
                )
        return model


def other_architecture(name: str, first: str, fact: str) -> ConfigError:
    """The error of a checkpoint that is no state of the same model."""
    return ConfigError(
        f"checkpoint {name} has another architecture than {first}: {fact}",
        fix="name checkpoints of one training run in score.checkpoints or checkpoints.paths",
    )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _bytes(model: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


def _copy(model: nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: value.detach().clone() for name, value in model.state_dict().items()}
