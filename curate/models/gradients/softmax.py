"""Cross-entropy of a large output head, of which no (positions x vocabulary) tensor is kept.

Two sweeps. The first goes by positions and gives each its log-sum-exp and loss. The second runs on
the way back, by examples and pieces of the vocabulary: it computes a piece of the logits again,
turns it into errors p - y, and hands these out for the gradient of the states, of the weight and of
the bias. Rows of the weight belong to one piece each, so that squares of the pieces add up. Where
all logits are few they are kept, and nothing is computed twice.

Departure from sweeping the vocabulary twice: the first sweep needs no sum over positions, and by
positions each logit is seen once.
Cost: one more product with the head where logits are not kept.

Shapes: M counted positions, D width, V vocabulary, N examples of a batch; of one block m positions,
n examples, v columns, S positions of its longest example; T positions of a lookup.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from curate.models.gradients.forms import raised
from curate.models.gradients.layout import Layout
from curate.models.terms import Terms, exact_losses, terms

KEPT_NUMBERS = {"cpu": 1 << 25, "cuda": 1 << 28}
"""Logits of a batch that are kept from the first sweep to the second."""
BLOCK_NUMBERS = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Logits that exist at a time where they are not kept."""
_HALF = (torch.float16, torch.bfloat16)


class Sweep(NamedTuple):
    """The first sweep over the counted positions."""

    given: Tensor
    """(M, D) what goes into the head, with a graph."""
    targets: Tensor
    """(M,)"""
    owner: Tensor
    """(M,) example of each position, ascending."""
    terms: Terms
    """Without a graph."""
    log_sums: Tensor
    """(M,) log-sum-exp of the logits."""
    logits: Tensor | None
    """(M, V) where they are few enough to be kept."""


class Block(NamedTuple):
    """Errors of some positions in some columns."""

    positions: slice
    examples: slice
    columns: slice
    errors: Tensor
    """(m, v) weight of the position times (p - y)"""


def first_sweep(head: nn.Linear, given: Tensor, targets: Tensor, owner: Tensor) -> Sweep:
    """Losses and all that goes with them.

    Args:
        head: gives the logits.
        given: (M, D); half precision is raised, or multiplied with sums in float32.
        targets: (M,) in [0, V).
        owner: (M,) ascending.
    """
    with torch.no_grad():
        states = given.detach()
        size = max(1, _limit(BLOCK_NUMBERS, states) // head.out_features)
        is_kept = len(states) * head.out_features <= _limit(KEPT_NUMBERS, states)
        size = max(1, len(states)) if is_kept else size
        found: list[Terms] = []
        sums: list[Tensor] = []
        logits: Tensor | None = None
        for start in range(0, max(1, len(states)), size):
            logits = logits_of(head, states[start : start + size])
            chosen = targets[start : start + size]
            found.append(terms(logits, chosen))
            sums.append(logits.gather(1, chosen[:, None])[:, 0] + found[-1].loss)
        joined = Terms(*(torch.cat(columns) for columns in zip(*found, strict=True)))
        return Sweep(given, targets, owner, joined, torch.cat(sums), logits if is_kept else None)


def blocks(head: nn.Linear, sweep: Sweep, weights: Tensor) -> Iterator[Block]:
    """The second sweep: all errors, some at a time, those of an example in one block or in a row.

    Args:
        head: gives the logits.
        sweep: the first one.
        weights: (M,) gradient of what is differentiated with respect to each loss.
    """
    given = sweep.given.detach()
    num_columns = head.out_features
    if sweep.logits is not None:
        everything = slice(0, len(given))
        errors = _errors(sweep.logits, sweep, everything, slice(0, num_columns), weights)
        yield Block(everything, slice(None), slice(0, num_columns), errors)
        return
    limit = _limit(BLOCK_NUMBERS, given)
    for positions, examples in _pieces(sweep.owner, limit // num_columns):
        count = positions.stop - positions.start
        width = num_columns if count * num_columns <= limit else max(1, limit // count)
        for start in range(0, num_columns, width):
            columns = slice(start, min(start + width, num_columns))
            logits = logits_of(head, given[positions], columns)
            errors = _errors(logits, sweep, positions, columns, weights)
            yield Block(positions, examples, columns, errors)


def errors_at(
    head: nn.Linear, sweep: Sweep, weights: Tensor, layout: Layout, ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Errors in the columns that an example looks up.

    Args:
        head: gives the logits.
        sweep: the first one.
        weights: (M,)
        layout: of the counted positions.
        ids: (N, T) what is looked up.

    Returns:
        (N, S, T) errors; and (N, S, D) what went into the head.
    """
    given = layout.rows(raised(sweep.given.detach()))
    weight = raised(head.weight.detach()[ids])  # (N, T, D)
    logits = given @ weight.mT
    bias = _bias(head)
    if bias is not None:
        logits += raised(bias.detach()[ids])[:, None, :]
    rows = [layout.rows(each[:, None]) for each in (sweep.log_sums, sweep.terms.loss, weights)]
    errors = (logits - rows[0]).exp()
    is_target = ids[:, None, :] == layout.rows(sweep.targets, 0)[:, :, None]
    return torch.where(is_target, torch.expm1(-rows[1]), errors) * rows[2], given


def watched_losses(losses: Tensor, given: Tensor, anchor: Tensor, tell: Any) -> Tensor:
    """(M,) losses whose gradient is told on the way back.

    Args:
        losses: (M,) without a graph.
        given: (M, D) with or without one.
        anchor: a scalar that requires a gradient.
        tell: called with (gradient (M,) of the losses, whether a gradient of `given` is wanted);
            gives that one, or None.
    """
    found: Any = _Losses.apply(losses, given, anchor, tell)
    return found


def plain_losses(head: nn.Linear, given: Tensor, targets: Tensor) -> Tensor:
    """(M,) losses by autograd alone, logits some at a time, computed again on the way back."""
    weight, bias = head.weight, _bias(head)
    if len(given) * head.out_features <= _limit(KEPT_NUMBERS, given):
        return _losses(given, weight, bias, targets)
    size = max(1, _limit(BLOCK_NUMBERS, given) // head.out_features)
    found: Any = _Recomputed.apply(given, weight, bias, targets, size)
    return found


def logits_of(head: nn.Linear, given: Tensor, columns: slice = slice(None)) -> Tensor:
    """(M, v) logits, summed up and given in float32 at least."""
    weight, bias = head.weight.detach()[columns], _bias(head)
    bias = None if bias is None else raised(bias.detach()[columns])
    if given.dtype in _HALF and given.is_cuda:
        logits = torch.mm(given, weight.T, out_dtype=torch.float32)
        return logits if bias is None else logits.add_(bias)
    return functional.linear(raised(given), raised(weight), bias)


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: Tensor, given: Tensor, anchor: Tensor, tell: Any) -> Tensor:
        ctx.tell = tell
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.tell(grads[0], ctx.needs_input_grad[1]), None, None


class _Recomputed(torch.autograd.Function):
    """`_losses`, some positions at a time; torch's checkpoints keep more than a piece of it."""

    @staticmethod
    def forward(
        ctx: Any, given: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, size: int
    ) -> Tensor:
        ctx.save_for_backward(given, weight, bias, targets)
        ctx.size = size
        pieces = zip(given.split(size), targets.split(size), strict=True)
        return torch.cat([_losses(each, weight, bias, own) for each, own in pieces])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        given, weight, bias, targets = ctx.saved_tensors
        all_three: tuple[Any, Any, Any] = (given, weight, bias)
        needed = [place for place in range(3) if ctx.needs_input_grad[place]]
        found = [torch.zeros_like(raised(all_three[place])) for place in needed]
        for start in range(0, len(given), ctx.size):
            part = slice(start, start + ctx.size)
            each: list[Any] = [given[part], weight, bias]
            for place in needed:
                each[place] = each[place].detach().requires_grad_()
            with torch.enable_grad():
                losses = _losses(each[0], each[1], each[2], targets[part])
                wanted: list[Tensor] = [each[place] for place in needed]
                own = torch.autograd.grad(losses, wanted, grads[0][part])
            for place, total, value in zip(needed, found, own, strict=True):
                (total[part] if place == 0 else total).add_(value)
        result: list[Tensor | None] = [None] * 5
        for place, total in zip(needed, found, strict=True):
            result[place] = total.to(all_three[place].dtype)
        return tuple(result)


def _losses(given: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    logits = functional.linear(
        raised(given), raised(weight), None if bias is None else raised(bias)
    )
    return exact_losses(logits, targets)


def _errors(
    logits: Tensor, sweep: Sweep, positions: slice, columns: slice, weights: Tensor
) -> Tensor:
    """(m, v) weight times (p - y), in the memory of the logits."""
    errors = logits.sub_(sweep.log_sums[positions, None]).exp_()
    place = sweep.targets[positions, None] - columns.start
    inside = (place >= 0) & (place < errors.shape[1])
    place = place.clamp(0, errors.shape[1] - 1)
    # p_y - 1 from the loss: the difference would cancel where p_y is nearly 1.
    missed = torch.expm1(-sweep.terms.loss[positions, None])
    errors.scatter_(1, place, torch.where(inside, missed, errors.gather(1, place)))
    return errors.mul_(weights[positions, None].to(errors.dtype))


def _pieces(owner: Tensor, size: int) -> Iterator[tuple[slice, slice]]:
    """Whole examples with at most `size` positions together, or a longer one alone."""
    if not len(owner):
        return
    ends = owner.bincount().cumsum(0).tolist()
    start = first = 0
    for example, end in enumerate(ends):
        following = ends[example + 1] if example + 1 < len(ends) else None
        if following is None or following - start > size:
            if end > start:
                yield slice(start, end), slice(first, example + 1)
            start, first = end, example + 1


def _bias(head: nn.Linear) -> Tensor | None:
    return cast(Tensor | None, head.bias)


def _limit(numbers: dict[str, int], given: Tensor) -> int:
    return numbers["cuda" if given.is_cuda else "cpu"]
