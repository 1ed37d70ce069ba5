"""The gradient of one logit of each example with respect to the example's input.

In eval mode the examples of a batch do not meet, so that one backward pass of the sum of their
chosen logits gives each example's own gradient. Parameters are frozen for the pass: no weight
gradient is formed.

The input is `features` or `pixel_values` itself, and for `input_ids` what the token embedding gives
out, before positions are added. A hook puts a leaf in its place. Passing `inputs_embeds` gives the
same gradient where a model takes it, but a classifier of the GPT kind finds the end of a text by
its token ids, and without them silently reads the padding.

Shapes: B examples of a batch, T positions, D numbers at a position, M counted positions, V classes
or tokens, R rows: the positions of all examples one after the other without padding, or one for
each example where the input has no positions.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from curate.errors import ConfigError
from curate.models.tasks import Batch, Task

_INPUTS = ("input_ids", "pixel_values", "features")
_FP16_SCALE = 1024.0


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """Which gradient, and in which form; `scorers.vog.VoG` says what each choice is for."""

    target: Literal["label", "predicted"] = "label"
    output: Literal["logit", "probability"] = "logit"
    channel: Literal["mean", "none"] = "mean"
    reduce: Literal["none", "l2"] = "none"
    unit: bool = False


class Found(NamedTuple):
    """Input gradients of a batch."""

    values: Tensor
    """(R, D) float32, or float64 where the model is; NaN where the chosen logit is not finite."""
    owner: Tensor
    """(R,) the example of each row, ascending."""
    chosen: Tensor
    """(M,) class or token whose logit it is."""


def input_gradients(
    model: nn.Module,
    task: Task,
    batch: Batch,
    *,
    num_examples: int,
    how: How,
    chosen: Tensor | None = None,
) -> Found:
    """The gradient of each example's chosen logit, summed over its counted positions.

    Args:
        model: in eval mode.
        task: that made the batch.
        batch: on the model's device.
        num_examples: B.
        how: which logit, and what becomes of the gradient.
        chosen: (M,) whose logits to take; None takes the targets, or with `target: predicted` the
            largest logits.

    Raises:
        ConfigError: the model's input is none that a gradient can be taken of, or holds several
            sequences for one example.
    """
    key = next((name for name in _INPUTS if name in batch), None)
    is_text = key == "input_ids"
    if key is None or len(batch[key]) != num_examples or (is_text and batch[key].ndim != 2):
        shape = f"{key} {tuple(batch[key].shape)}" if key else ", ".join(sorted(batch))
        raise ConfigError(
            f"the gradient with respect to the input needs one of {', '.join(_INPUTS)} with a row"
            f" for each example; the task's batch of {num_examples} holds {shape}",
            fix="choose another scorer for this task",
        )
    with _frozen(model), torch.enable_grad():
        if is_text:
            with _embedding_leaf(model, batch[key].shape) as seen:
                outputs = _chosen(model, task, batch, how, chosen)
            leaf = _only(seen, model)
        else:
            leaf = batch[key].detach().requires_grad_()
            outputs = _chosen(model, task, {**batch, key: leaf}, how, chosen)
        is_fp16 = any(p.dtype == torch.float16 for p in model.parameters())
        scale = _FP16_SCALE if is_fp16 else 1.0  # small gradients vanish below 6e-8 in fp16
        grads = _gradient(outputs.total * scale, leaf, model)
    if grads.dtype in (torch.float16, torch.bfloat16):
        grads = grads.float()
    values, owner = _rows(grads / scale if is_fp16 else grads, batch, key, how)
    if how.unit:
        values = _unit(values, owner, num_examples)
    # The way back through ReLU makes a plain 0 of NaN.
    broken = torch.zeros(num_examples, dtype=torch.bool, device=values.device)
    broken[outputs.broken] = True
    return Found(values.masked_fill(broken[owner, None], torch.nan), owner, outputs.picked)


class _Outputs(NamedTuple):
    total: Tensor
    """() sum of the chosen outputs of a batch."""
    picked: Tensor
    """(M,) which they are."""
    broken: Tensor
    """Examples with a chosen output that is not finite."""


def _chosen(
    model: nn.Module, task: Task, batch: Batch, how: How, chosen: Tensor | None
) -> _Outputs:
    total: Tensor | None = None
    picked: list[Tensor] = []
    broken: list[Tensor] = []
    start = 0
    # In pieces: what gather needs for the way back is the index, not a (M, V) tensor.
    for flat in task.pieces(model, batch):
        stop = start + len(flat.logits)
        if chosen is not None:
            index = chosen[start:stop]
        else:
            index = flat.targets if how.target == "label" else flat.logits.detach().argmax(1)
        outputs = flat.logits if how.output == "logit" else flat.logits.softmax(1)
        values = outputs.gather(1, index[:, None])[:, 0]
        total = values.sum() if total is None else total + values.sum()
        picked.append(index)
        broken.append(flat.owner[~values.detach().isfinite()])
        start = stop
    assert total is not None
    return _Outputs(total, torch.cat(picked), torch.cat(broken))


def _gradient(total: Tensor, leaf: Tensor, model: nn.Module) -> Tensor:
    found = None
    if total.requires_grad:
        (found,) = torch.autograd.grad(total, leaf, allow_unused=True)
    if found is None:
        raise ConfigError(
            f"the outputs of {type(model).__name__} have no gradient with respect to its input",
            fix="choose another scorer for this model",
        )
    return found.detach()


def _rows(grads: Tensor, batch: Batch, key: str, how: How) -> tuple[Tensor, Tensor]:
    """(R, D) numbers that count, and (R,) whose they are."""
    if key != "input_ids":
        if key == "pixel_values" and how.channel == "mean" and grads.ndim == 4:
            grads = grads.mean(1)  # (B, H, W) with their sign
        return grads.flatten(1), torch.arange(len(grads), device=grads.device)
    if how.reduce == "l2":
        grads = torch.linalg.vector_norm(grads, dim=-1, keepdim=True)  # (B, T, 1)
    mask = batch.get("attention_mask")
    if mask is None:
        owner = torch.arange(len(grads), device=grads.device).repeat_interleave(grads.shape[1])
        return grads.flatten(0, 1), owner
    owner, column = torch.nonzero(mask, as_tuple=True)
    return grads[owner, column], owner


def _unit(values: Tensor, owner: Tensor, num_examples: int) -> Tensor:
    """Every example's gradient at length 1; one of length 0 stays."""
    squares = values.new_zeros(num_examples).index_add(0, owner, values.square().sum(1))
    length = squares.sqrt()[owner, None]
    return torch.where(length > 0, values / length, values)


@contextmanager
def _frozen(model: nn.Module) -> Generator[None]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def _embedding_leaf(model: nn.Module, shape: Sequence[int]) -> Generator[list[Tensor]]:
    """While it lasts, what the token embedding gives out is a leaf, and is noted."""
    table = embedding_of(model)
    seen: list[Tensor] = []

    def begin(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        # The model's head may be tried out without gradients: see `curate.models.head`.
        if not torch.is_grad_enabled():
            return output
        if output.shape[:-1] != torch.Size(shape):
            raise _no_input(model, f"looks tokens up as {tuple(output.shape)}")
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    handle = table.register_forward_hook(begin) if table is not None else None
    try:
        yield seen
    finally:
        if handle is not None:
            handle.remove()


def embedding_of(model: nn.Module) -> nn.Module | None:
    """The module that looks tokens up, where the model says which it is."""
    try:
        return cast(Any, model).get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _only(seen: list[Tensor], model: nn.Module) -> Tensor:
    if len(seen) != 1:
        raise _no_input(model, f"calls its token embedding {len(seen)} times in one pass")
    return seen[0]


def _no_input(model: nn.Module, fact: str) -> ConfigError:
    return ConfigError(
        f"{type(model).__name__} {fact}, so that there is no one input to take a gradient of",
        fix="score vog with an encoder or a decoder model, or choose another scorer",
    )
