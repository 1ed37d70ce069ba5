"""How well each domain's gradient points where the target's does, one gradient at a time.

    W_j = <g_j, g_tgt>,   g_j = gradient of the mean token loss of domain j

By `dots` each domain's gradient is found, multiplied with the target's and dropped before the next:
two gradients at a time, not K + 1. By `forward` W_j is the derivative of domain j's loss along
g_tgt, a forward-mode pass without a gradient of its own; lengths of g_j are then not known.

Over several ranks W_j is a sum of <this rank's part of g_j, g_tgt>, exact with one gradient, the
target's, summed over the ranks. Lengths need each g_j summed. Without either (`across` False) every
rank multiplies what it has, and the mean of that is taken: right on average, and noisier.

Cost: by dots a plain step's for domains and target together, by forward about three forward passes
for the domains. Memory: by dots two gradients, besides what `keep` holds; by forward one.
Source: as `mixers.doge`.
Shapes: K domains, n tokens of a piece.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from curate.errors import ConfigError
from mixers.rules import Piece, Step

How = Literal["dots", "forward"]
"""The two ways to the same numbers."""

Part = Sequence[Tensor | None]
"""This rank's part of the gradient of a domain's mean loss, in the order of the parameters; None
where a parameter has none. Whoever keeps one copies it."""

_ADAM_EPS = 1e-8


class Gradient(NamedTuple):
    """What the domains are held against."""

    tensors: list[Tensor]
    """In the order of `Step.parameters`, and of their type: float32 in training."""
    norm: float
    """Its length."""
    loss_sum: float
    """Nats, over all tokens behind it; with `across`, of all ranks."""
    num_tokens: float
    """Those tokens."""


class Alignments(NamedTuple):
    """What the domains of a step are worth; the same on every rank, on the CPU."""

    products: Tensor
    """(K,) float64 <g_j, g_tgt>; NaN where a domain was absent."""
    norms: Tensor | None
    """(K,) float64 length of g_j, NaN where absent; None where not asked for, or not known."""
    loss_sums: Tensor
    """(K,) float64 nats, over all tokens of all ranks."""
    counts: Tensor
    """(K,) float64 those tokens; 0 where absent."""


def piece_counts(pieces: Sequence[Piece], num_domains: int) -> Tensor:
    """(K,) float64 counted tokens of each domain on this rank."""
    counts = torch.zeros(num_domains, dtype=torch.float64)
    for piece in pieces:
        counts.index_add_(0, piece.domains.cpu(), piece.counts.cpu().double())
    return counts


def target_gradient(
    step: Step,
    pieces: Sequence[Piece],
    *,
    each_domain: bool = False,
    across: bool = True,
    moments: Sequence[Tensor] | None = None,
) -> Gradient:
    """Gradient of the loss that is to fall. `.grad` is left as it is.

    Args:
        step: whose proxy it is.
        pieces: this rank's share of the target; it may have none.
        each_domain: the sum over domains of the gradients of their mean losses, in place of the
            gradient of the mean loss of all tokens.
        across: of the target of all ranks; False: of this rank's own.
        moments: `Step.second_moments()`, to multiply by Adam's 1 / (sqrt(v) + eps): the direction
            in which a step along a domain's gradient moves. Where no gradient has been yet (v is
            0) that is not known, and 0.
    """
    counts = piece_counts(pieces, step.num_domains)
    counts = step.total(counts) if across else counts
    total = float(counts.sum())
    loss_sum = torch.zeros(1, dtype=torch.float64)
    # Losses are weighed by numbers around 1 and divided later: float16 has no smaller ones.
    weights = total / counts if each_domain else torch.ones_like(counts)

    def losses() -> Iterator[Tensor]:
        for piece in filter(_has_tokens, pieces):
            tokens = step.tokens(piece)
            loss_sum.add_(tokens.losses.detach().double().sum().cpu())
            yield (tokens.losses * weights.to(tokens.losses)[tokens.domains]).sum()

    found = [
        torch.zeros_like(parameter) if grad is None else grad.div_(total)
        for parameter, grad in zip(step.parameters, _gradients(step, losses()), strict=True)
    ]
    if across:
        loss_sum = step.total(loss_sum)
        if step.num_ranks > 1:
            for place, tensor in enumerate(found):
                found[place] = step.total(tensor)
    if moments is not None:
        for tensor, square in zip(found, moments, strict=True):
            scale = (square.sqrt() + _ADAM_EPS).reciprocal()
            tensor.mul_(torch.where(square > 0, scale, 0.0))
    return Gradient(found, float(_square(found).sqrt()), float(loss_sum), total)


def alignments(
    step: Step,
    pieces: Sequence[Piece],
    gradient: Gradient,
    *,
    how: How = "dots",
    norms: bool = True,
    across: bool = True,
    keep: Callable[[int, Part], None] | None = None,
) -> Alignments:
    """The products of every domain's gradient with the target's. `.grad` is left as it is.

    Args:
        step: whose proxy it is.
        pieces: this rank's share of every domain, the sequences of a piece all of one.
        gradient: of the target, with the same `across`.
        how: the way; the numbers are the same to rounding.
        norms: lengths of the gradients too, by `dots`.
        across: exact over all ranks; False: the mean of what each rank finds in its own tokens.
        keep: called by `dots` with each domain that this rank has and its part of that gradient;
            the parts of all ranks sum to it.

    Raises:
        ConfigError: the model has an operation, such as fused attention, that forward mode cannot
            go through.
    """
    if how == "forward" and keep is not None:
        raise ValueError("forward mode has no gradients to keep")
    own = piece_counts(pieces, step.num_domains)
    counts = step.total(own)
    ways = _Forward(step, gradient) if how == "forward" else _Dots(step, gradient)
    ways.norms = norms and how == "dots"
    ways.reduced = across and step.num_ranks > 1
    ways.keep = keep
    by_domain: dict[int, list[Piece]] = {}
    for piece in pieces:
        if _has_tokens(piece):
            by_domain.setdefault(int(piece.domains[0]), []).append(piece)
    rows = torch.zeros(3, step.num_domains, dtype=torch.float64)  # products, squares, losses
    for domain in range(step.num_domains):
        if counts[domain]:
            rows[:, domain] = ways.one(domain, by_domain.get(domain, []), float(counts[domain]))
    products, squares, losses = rows
    if across:
        products, present = step.total(products), counts
    else:
        has = (own > 0).double() * float(gradient.num_tokens > 0)
        present = step.total(has)
        # A rank's own mean instead of its part of the mean of all.
        up = torch.where(own > 0, counts / own.clamp(min=1), 0.0)
        products = step.total(products * up * has) / present.clamp(min=1)
        squares = step.total(squares * up.square() * has) / present.clamp(min=1)
    losses = step.total(losses)
    absent = torch.where(present > 0, 0.0, torch.nan)
    lengths = squares.sqrt() + absent if ways.norms else None
    return Alignments(products + absent, lengths, losses, counts)


class _Dots:
    """A backward pass for each domain."""

    norms = True
    reduced = False
    """Whether a gradient is in parts on several ranks that belong together."""
    keep: Callable[[int, Part], None] | None = None

    def __init__(self, step: Step, gradient: Gradient) -> None:
        self._step, self._target = step, gradient.tensors

    def one(self, domain: int, pieces: Sequence[Piece], count: float) -> Tensor:
        """(3,) float64 product, squared length, sum of losses. Called for all domains by all."""
        loss_sum = torch.zeros((), dtype=torch.float64)

        def losses() -> Iterator[Tensor]:
            for piece in pieces:
                tokens = self._step.tokens(piece)
                loss_sum.add_(tokens.losses.detach().double().sum().cpu())
                yield tokens.losses.sum()

        part = _gradients(self._step, losses())
        for grad in part:
            if grad is not None:
                grad.div_(count)
        product = _square(self._target, part)
        square = torch.zeros_like(product)
        if self.norms:
            square = self._square(part)
        if self.keep is not None and pieces:
            self.keep(domain, part)
        return torch.stack([product.cpu(), square.cpu(), loss_sum])

    def _square(self, part: Part) -> Tensor:
        """Squared length of what the parts of all ranks sum to; one tensor at a time."""
        if not self.reduced:
            held = [tensor for tensor in part if tensor is not None]
            return _square(held) if held else torch.zeros((), dtype=torch.float64)
        square = torch.zeros((), dtype=torch.float64, device=self._target[0].device)
        for tensor, like in zip(part, self._target, strict=True):
            square += _square(
                [self._step.total(torch.zeros_like(like) if tensor is None else tensor)]
            )
        return square


class _Forward(_Dots):
    """A forward-mode pass for each domain."""

    def __init__(self, step: Step, gradient: Gradient) -> None:
        super().__init__(step, gradient)
        along = {id(p): t for p, t in zip(step.parameters, gradient.tensors, strict=True)}
        named = [
            (f"model.{name}", p) for name, p in step.model.named_parameters() if id(p) in along
        ]
        self._values = {name: parameter.detach() for name, parameter in named}
        self._along = {name: along[id(parameter)].to(parameter) for name, parameter in named}
        self._losses = _Losses(step)

    def one(self, domain: int, pieces: Sequence[Piece], count: float) -> Tensor:
        found = torch.zeros(3, dtype=torch.float64)
        for piece in pieces:
            losses, slopes = self._pass(piece)
            found[0] += slopes.double().sum().cpu() / count
            found[2] += losses.double().sum().cpu()
        return found

    @torch.no_grad()
    def _pass(self, piece: Piece) -> tuple[Tensor, Tensor]:
        def losses(values: Mapping[str, Tensor]) -> Tensor:
            return functional_call(self._losses, dict(values), (piece,))

        # Fused attention has no derivative in forward mode; the plain form has.
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of torch, about itself
            try:
                found: Any = jvp(losses, (self._values,), (self._along,))
            except (NotImplementedError, RuntimeError) as error:
                if "forward" not in str(error) and "jvp" not in str(error):
                    raise
                raise ConfigError(
                    f"forward mode cannot go through this model: {str(error).splitlines()[0]}",
                    fix="use how: dots, or load the model with attn_implementation sdpa or eager",
                ) from error
        return found


class _Losses(nn.Module):
    """The losses of a piece as a module, so that the proxy's parameters can be replaced."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.model = step.model
        self._step = step

    def forward(self, piece: Piece) -> Tensor:
        return self._step.tokens(piece).losses


def _has_tokens(piece: Piece) -> bool:
    return len(piece.domains) > 0 and bool(piece.counts.any())


def _gradients(step: Step, losses: Iterable[Tensor]) -> list[Tensor | None]:
    """Of the sum of losses, each let go before the next; past the scale of float16 in `.grad`."""
    before = [parameter.grad for parameter in step.parameters]
    for parameter in step.parameters:
        parameter.grad = None
    try:
        for loss in losses:
            loss.backward()
        return [parameter.grad for parameter in step.parameters]
    finally:
        for parameter, grad in zip(step.parameters, before, strict=True):
            parameter.grad = grad


def _square(one: Sequence[Tensor], two: Part | None = None) -> Tensor:
    """<one, two>, or <one, one>: float32 within a tensor, float64 over them; on their device."""
    total = torch.zeros((), dtype=torch.float64, device=one[0].device)
    for left, right in zip(one, one if two is None else two, strict=True):
        if right is not None:
            total += torch.dot(left.flatten(), right.flatten()).double()
    return total
