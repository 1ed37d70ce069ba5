"""What a mixer does inside the proxy's training: one rule, called at every step of the loop.

The loop (`mixers.proxy`) draws the batch, holds model and optimiser, saves and resumes; a rule says
which domains come next, turns losses into gradients, and moves its weights.

Shapes: K domains, B sequences of a piece, n counted tokens of a piece.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from curate.models.optimiser import Optimiser
from curate.models.tasks.protocol import Batch


class Piece(NamedTuple):
    """Sequences that go through the model together; a step may have several."""

    batch: Batch
    """On the device of the model."""
    domains: Tensor
    """(B,) int64 of each sequence, in [0, K); on the device. Of the target: 0."""
    counts: Tensor
    """(B,) int64 counted tokens of each sequence, n in all; on the device."""
    reference: Tensor | None = None
    """(n,) float32 losses of the reference, nats, of the same tokens in the same order."""
    seed: int = 0
    """Of dropout: every pass over the piece, by whatever model, has the same."""


class Tokens(NamedTuple):
    """What a model says of a piece; one row for each counted token, sequence by sequence."""

    losses: Tensor
    """(n,) float32 nats, with the graph where gradients are enabled."""
    owner: Tensor
    """(n,) int64 sequence within the piece, ascending."""
    domains: Tensor
    """(n,) int64"""


class Seen(NamedTuple):
    """What a step showed, over all ranks; what the trajectory is made of."""

    weights: Tensor
    """(K,) float64 of this step."""
    loss_sums: Tensor
    """(K,) float64 sum of the plain token losses of each domain, nats."""
    counts: Tensor
    """(K,) float64 tokens behind them; 0 where a domain was absent."""
    values: Mapping[str, Tensor] = {}
    """Column -> (K,) float64, the rule's own; NaN where there is none."""


class Step(Protocol):
    """One step of the loop, as a rule sees it."""

    number: int
    """From 1."""
    total_steps: int
    lr: float
    """Learning rate of this step."""
    num_domains: int
    """K."""
    num_ranks: int
    model: nn.Module
    """The proxy, in training mode."""
    pieces: Sequence[Piece]
    """This rank's share of the batch. One piece, unless memory asks for more; one for each domain
    that is present, in order of domain, where the rule's `by_domain` is set."""

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """Those that learn."""
        ...

    def tokens(self, piece: Piece, model: nn.Module | None = None) -> Tokens:
        """A forward pass, by the proxy or another model, under the run's precision."""
        ...

    def second_moments(self) -> Sequence[Tensor] | None:
        """AdamW's mean squares of `parameters`, corrected for their start; None in step 1."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradient to `.grad`; the loop sums `.grad` over the ranks afterwards."""
        ...

    def total(self, values: Tensor) -> Tensor:
        """The sum over all ranks; the same on each."""
        ...

    def more(self, purpose: str, each: int | Tensor) -> Sequence[Piece]:
        """Further sequences of the training domains, one piece for each domain, in their order.

        They are drawn apart from the batch, and from other purposes; this rank gets its share.

        Args:
            purpose: names the draw: a new order of the examples each.
            each: sequences of every domain, or (K,) int64 for each its own, over all ranks.
        """
        ...

    def target(self, purpose: str, count: int) -> Sequence[Piece]:
        """Sequences of the target, this rank's share of `count` of them."""
        ...


class Rule(Protocol):
    """A mixer inside the loop. Made anew for each run; `state` is all that a resume needs."""

    columns: ClassVar[Mapping[str, str]]
    """Column of the trajectory -> what it is, those of `Seen.values`."""
    by_domain: ClassVar[bool]
    """Whether each domain's sequences stand in a piece of their own."""

    def shares(self) -> Tensor:
        """(K,) float64 shares of the sequences of the next batch, summing to 1."""
        ...

    def step(self, step: Step) -> Seen:
        """Leave the step's gradient in `.grad`, as a sum over this rank's tokens, and move on.

        Raises:
            DivergedError: a loss is not finite.
        """
        ...

    def mixture(self) -> Tensor:
        """(K,) float64 what the run has found so far, summing to 1."""
        ...

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on."""
        ...

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Go back to what `state` gave."""
        ...


class ModelOwner(Protocol):
    """What a rule with models of its own has besides."""

    def start(self, optimiser: Optimiser) -> None:
        """Make them from the proxy in training; called once, before anything is loaded."""
        ...


def token_counts(step: Step) -> Tensor:
    """(K,) float64 counted tokens of each domain in the batch, over all ranks; on the CPU."""
    counts = torch.zeros(step.num_domains, dtype=torch.float64)
    for piece in step.pieces:
        counts.index_add_(0, piece.domains.cpu(), piece.counts.cpu().double())
    return step.total(counts)


def loss_sums(tokens: Tokens, num_domains: int) -> Tensor:
    """(K,) float64 sum of the losses of each domain's tokens in a piece; no graph."""
    losses = tokens.losses.detach().double()
    return losses.new_zeros(num_domains).index_add_(0, tokens.domains, losses).cpu()


def first_look(step: Step) -> list[Tokens]:
    """What the proxy says of each piece, before its weights are known.

    A step of one piece keeps the graph, so that this pass is the only one. Of several the graphs
    would need the memory that pieces are there to save: there `second_look` runs them again.
    """
    if len(step.pieces) == 1:
        return [step.tokens(step.pieces[0])]
    with torch.no_grad():
        return [step.tokens(piece) for piece in step.pieces]


def second_look(step: Step, looks: Sequence[Tokens]) -> Iterator[Tokens]:
    """The same with graphs, piece by piece; `backward` belongs before the next is asked for."""
    if len(step.pieces) == 1:
        yield looks[0]
    else:
        for piece in step.pieces:
            yield step.tokens(piece)
