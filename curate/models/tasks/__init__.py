"""Tasks: how a row becomes tensors, and which positions count."""

import logging
from functools import cache
from typing import Any

from curate.config import resolve
from curate.errors import ConfigError
from curate.models.tasks.protocol import Batch, Encoded, Flat, Task, Unheaded

__all__ = ["Batch", "Encoded", "Flat", "Task", "Unheaded", "build_task", "task_class"]


log = logging.getLogger(__name__)


def task_class(settings: Any) -> Any:
    """The class that implements a task.

    Args:
        settings: an instance of one of `curate.models.settings.TASKS`, or the user's own.

    Raises:
        ConfigError: the settings name no implementation, or it cannot be imported.
    """
    address = getattr(settings, "implementation", None)
    if not isinstance(address, str):
        raise ConfigError(
            f"{type(settings).__name__} does not say which class implements the task",
            fix='give it `implementation: ClassVar[str] = "package.module:Task"`',
        )
    return resolve({}, address, what="task")


def build_task(settings: Any, tokenizer: Any | None, *, max_positions: int | None = None) -> Task:
    """The task, ready to encode.

    Args:
        settings: an instance of one of `curate.models.settings.TASKS`, or the user's own.
        tokenizer: of the model; None for tables.
        max_positions: the longest input the model can take; texts are cut there at the latest.

    Raises:
        ConfigError: the task needs a tokenizer and there is none.
    """
    kind = task_class(settings)
    if tokenizer is None and kind.needs_tokenizer:
        raise ConfigError(
            f"task {settings.kind} needs a tokenizer, but the model has none",
            fix="name a model that has one, or set model.tokenizer",
        )
    if not kind.needs_tokenizer:
        return kind(settings, tokenizer)
    wanted = getattr(settings, "max_tokens", 0)
    if max_positions is not None and wanted > max_positions:
        _say_cut(wanted, max_positions)
    return kind(settings, tokenizer, max_positions=max_positions)


@cache
def _say_cut(wanted: int, max_positions: int) -> None:
    """Once in a process, not for every partition."""
    log.warning("task.max_tokens is %d, but the model has %d positions: longer examples are cut"
                " there", wanted, max_positions)  # fmt: skip
