"""A model compiled by torch for the passes that need no gradients."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

from torch import nn

_compiled: WeakKeyDictionary[nn.Module, Callable[..., Any]] = WeakKeyDictionary()


@contextmanager
def compiled(model: nn.Module) -> Generator[None]:
    """Calls of the model's body run as compiled code; once compiled it is kept with the model.

    What a task does around the body (the head in pieces, losses) stays as it is. Gradients need
    the layers' hooks: they are measured outside of this.
    """
    body = cast(Any, getattr(model, "base_model", model))
    if body not in _compiled:
        body.compile(dynamic=True)  # lengths differ from batch to batch
        _compiled[body] = body._compiled_call_impl
    body._compiled_call_impl = _compiled[body]
    try:
        yield
    finally:
        body._compiled_call_impl = None
