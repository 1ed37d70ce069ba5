"""The output head applied to chosen positions only, so that (B, T, V) logits never exist.

Shapes: B examples, T positions, M chosen positions, D width, V tokens of the vocabulary.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from curate.models.gradients import watched
from curate.models.sharded import is_spread

log = logging.getLogger(__name__)

_PIECE_NUMBERS = {"cpu": 1 << 23, "cuda": 1 << 28}
"""Logits that exist at a time."""
_HALF = (torch.float16, torch.bfloat16)


class Before(NamedTuple):
    """What an output head would turn into logits."""

    states: Tensor
    """(M, D) of the chosen positions, with a graph where gradients are enabled."""
    head: nn.Linear


@dataclass(frozen=True, slots=True)
class _Parts:
    """A model in two: `head(body(...)[0])` is what the model itself returns as logits."""

    body: nn.Module
    head: nn.Linear


_known: WeakKeyDictionary[nn.Module, _Parts | None] = WeakKeyDictionary()


def counted_logits(
    model: nn.Module,
    inputs: dict[str, Tensor],
    rows: Tensor,
    columns: Tensor,
    *,
    whole: bool,
    owner: Tensor | None = None,
) -> Iterator[Tensor]:
    """(m, V) logits of the chosen positions, in order, in pieces; m sums to M.

    The model's body runs once; its head sees the chosen positions only. Half precision is raised
    before the product with the head: at |logit| = 20 the spacing of bfloat16 is 0.125. A model
    that does more than a linear head (scaled or capped logits) gives its own logits, raised after.

    Args:
        model: a causal language model of transformers.
        inputs: its forward's arguments.
        rows: (M,) which row of the batch.
        columns: (M,) which position of it.
        whole: all in one piece, as training needs.
        owner: (M,) which example, where examples have several rows.
    """
    parts = _split(model, inputs)
    if parts is None:
        logits = model(**inputs, use_cache=False).logits[rows, columns]
        yield logits.float() if logits.dtype in _HALF else logits
        return
    states = parts.body(**inputs, use_cache=False)[0][rows, columns]  # (M, D)
    weight: Tensor = parts.head.weight
    bias = cast(Tensor | None, parts.head.bias)
    limit = _PIECE_NUMBERS["cuda" if states.is_cuda else "cpu"]
    size = max(1, len(states) if whole else limit // len(weight))
    if states.dtype in _HALF:
        states, weight = states.float(), weight.float()
        bias = None if bias is None else bias.float()
    for start in range(0, max(len(states), 1), size):
        given = states[start : start + size]
        logits = functional.linear(given, weight, bias)
        owners = rows if owner is None else owner
        yield watched(parts.head, given, logits, owners[start : start + size])


def counted_states(
    model: nn.Module, inputs: dict[str, Tensor], rows: Tensor, columns: Tensor
) -> Before | None:
    """What the head is given at the chosen positions; None where it is more than a linear head.

    Args:
        model: a causal language model of transformers.
        inputs: its forward's arguments.
        rows: (M,) which example.
        columns: (M,) which position of it.
    """
    parts = _split(model, inputs)
    if parts is None:
        return None
    return Before(parts.body(**inputs, use_cache=False)[0][rows, columns], parts.head)


def _split(model: nn.Module, inputs: dict[str, Tensor]) -> _Parts | None:
    """The model's body and head, or None where they are not all there is to it."""
    if model not in _known:
        _known[model] = parts = _find(model, inputs)
        if parts is None:
            log.info("%s is more than a linear head on its body: its own logits are used",
                     type(model).__name__)  # fmt: skip
    return _known[model]


def _find(model: nn.Module, inputs: dict[str, Tensor]) -> _Parts | None:
    """Run one short row; see whether the head reads the body's output and nothing follows it.

    The head's output is replaced by large numbers for that run. If the model returns just these,
    it neither scales nor caps its logits; comparing logits themselves could miss a cap, as it
    hardly shows while they are small.
    """
    if is_spread(model):  # a weight may be elsewhere while its layer does not run
        return None
    head = cast(Any, model).get_output_embeddings()
    body = cast(Any, model).base_model
    if type(head) is not nn.Linear or body is model or not isinstance(body, nn.Module):
        return None
    seen: dict[str, Tensor] = {}

    def on_body(_module: nn.Module, _args: Any, output: Any) -> None:
        seen["body"] = output[0]

    def on_head(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen["input"] = args[0]
        ramp = torch.linspace(-100, 100, output.numel(), device=output.device)
        seen["output"] = ramp.reshape(output.shape).to(output.dtype)
        return seen["output"]

    hooks = [body.register_forward_hook(on_body), head.register_forward_hook(on_head)]
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()
            logits = model(input_ids=inputs["input_ids"][:1, :8], use_cache=False).logits
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    is_plain = (
        {"body", "input", "output"} <= seen.keys()
        and torch.equal(seen["body"], seen["input"])
        and logits.shape == seen["output"].shape
        and torch.equal(logits.to(seen["output"].dtype), seen["output"])
    )
    return _Parts(body, head) if is_plain else None
