"""A mixture with a known answer: quadratic losses around a centre for each domain.

    l_i = |theta - c_i|^2 / 2,  target |theta - t|^2 / 2,  theta*(alpha) = sum_i alpha_i c_i

The target is reached where sum_i alpha_i c_i = t: with the centres here at (0.3, 0.6, 0.1), the
only interior fixed point. `train` is a loop of its own around any rule, plain descent for the
optimiser; every sequence is one token, the point that its loss pulls to.

Shapes: K domains, D coordinates, B points of a piece.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mixers.rules import Piece, Rule, Seen, Tokens

CENTRES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
TARGET = torch.tensor([0.2, 0.5], dtype=torch.float64)
BEST = torch.tensor([0.3, 0.6, 0.1], dtype=torch.float64)


class Quadratic(nn.Module):
    """Its only parameter is theta, from 0."""

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, points: Tensor) -> Tensor:
        return (self.theta - points).square().sum(1) / 2  # (B,)


@dataclass(kw_only=True)
class Toy:
    """The domains, the target, and how they are drawn."""

    centres: Tensor = field(default_factory=CENTRES.clone)
    """(K, D)"""
    target: Tensor = field(default_factory=TARGET.clone)
    """(D,)"""
    noise: Tensor | float = 0.0
    """(K,) or the same for all: standard deviation of a point's coordinates around its centre."""
    target_noise: float = 0.0
    sequences: int = 3
    """Points of a batch; they are split as the rule's shares say, what is over goes to the next."""
    random: bool = False
    """Draw the domains of a batch instead of splitting it."""
    seed: int = 0


@dataclass(kw_only=True)
class ToyStep:
    """One step, as `mixers.rules.Step` says; of one rank."""

    toy: Toy
    model: nn.Module
    number: int
    total_steps: int
    lr: float
    pieces: Sequence[Piece]
    generator: torch.Generator
    num_domains: int
    num_ranks: int = 1

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def tokens(self, piece: Piece, model: nn.Module | None = None) -> Tokens:
        losses = (self.model if model is None else model)(piece.batch["points"])
        return Tokens(losses, torch.arange(len(losses)), piece.domains)

    def second_moments(self) -> list[Tensor] | None:
        return None

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def total(self, values: Tensor) -> Tensor:
        return values

    def more(self, purpose: str, each: int | Tensor) -> list[Piece]:
        return by_domain(self.toy, torch.arange(self.num_domains).repeat_interleave(each), self)

    def target(self, purpose: str, count: int) -> list[Piece]:
        points = self.toy.target.expand(count, -1)
        noise = torch.randn(points.shape, generator=self.generator, dtype=torch.float64)
        return [_piece(points + self.toy.target_noise * noise, torch.zeros(count).long())]


class Trained(NamedTuple):
    """What a run left."""

    theta: Tensor
    weights: Tensor
    """(T, K) of every step."""
    seen: list[Seen]

    @property
    def target_loss(self) -> float:
        return float((self.theta - TARGET).square().sum() / 2)


def train(
    rule: Rule,
    *,
    steps: int,
    lr: float = 0.1,
    toy: Toy | None = None,
    start: Callable[[nn.Module], None] | None = None,
    schedule: Callable[[int], float] = lambda number: 1.0,
) -> Trained:
    """Descend as the rule says.

    Args:
        rule: of any kind.
        steps: of descent.
        lr: its rate, times `schedule` of the step's number, from 1.
        toy: the data; by default that of the module's head, without noise.
        start: called with the model before the first step, for a rule with models of its own.
        schedule: form of the learning rate.
    """
    toy = Toy() if toy is None else toy
    generator = torch.Generator().manual_seed(toy.seed)
    model = Quadratic(toy.centres.shape[1])
    if start is not None:
        start(model)
    over = torch.zeros(len(toy.centres), dtype=torch.float64)
    seen: list[Seen] = []
    for number in range(1, steps + 1):
        step = ToyStep(
            toy=toy,
            model=model,
            number=number,
            total_steps=steps,
            lr=lr * schedule(number),
            pieces=[],
            generator=generator,
            num_domains=len(toy.centres),
        )
        domains, over = _domains(toy, rule.shares(), over, generator)
        pieces = by_domain(toy, domains, step)
        step.pieces = pieces if rule.by_domain else [_joined(pieces)]
        seen.append(rule.step(step))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= step.lr * parameter.grad
                parameter.grad = None
    theta = copy.deepcopy(model.theta.detach())
    return Trained(theta, torch.stack([each.weights for each in seen]), seen)


def by_domain(toy: Toy, domains: Tensor, step: ToyStep) -> list[Piece]:
    """A piece of fresh points for each domain that is there."""
    scale = torch.as_tensor(toy.noise, dtype=torch.float64).expand(len(toy.centres))
    found: list[Piece] = []
    for domain in domains.unique().tolist():
        own = domains[domains == domain]
        points = toy.centres[domain].expand(len(own), -1)
        noise = torch.randn(points.shape, generator=step.generator, dtype=torch.float64)
        found.append(_piece(points + scale[domain] * noise, own))
    return found


def _domains(
    toy: Toy, shares: Tensor, over: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(B,) domain of each point, and what is left over for the next batch."""
    if toy.random:
        drawn = torch.multinomial(shares, toy.sequences, replacement=True, generator=generator)
        return drawn.sort().values, over
    wanted = over + shares * toy.sequences
    counts = (wanted + 1e-9).floor().clamp(min=0)
    while (rest := toy.sequences - int(counts.sum())) != 0:
        behind = torch.where((counts > 0) | (rest > 0), wanted - counts, torch.nan)
        place = behind.argmax() if rest > 0 else behind.nan_to_num(torch.inf).argmin()
        counts[place] += 1 if rest > 0 else -1
    return torch.arange(len(shares)).repeat_interleave(counts.long()), wanted - counts


def _piece(points: Tensor, domains: Tensor) -> Piece:
    return Piece({"points": points}, domains, torch.ones_like(domains))


def _joined(pieces: Sequence[Piece]) -> Piece:
    points = torch.cat([piece.batch["points"] for piece in pieces])
    return _piece(points, torch.cat([piece.domains for piece in pieces]))
