"""Many small models trained at once, for the benchmark of attributions: one vmap over all of them.

Each model has its own examples, weights and shuffles, all from its seed, so that which others are
trained beside it does not matter but for rounding.

Shapes: M models, N examples, n of them in a model's subset, B examples of a batch, T positions.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from curate.models.tasks import Batch, Encoded, Flat

Weights = dict[str, Tensor]
"""Parameter -> (M, ...) values of all models."""

_TOGETHER = 25


class Data(NamedTuple):
    """Examples as a model takes them."""

    inputs: Tensor
    """(N, F) numbers, or (N, T) tokens"""
    targets: Tensor
    """(N,) classes, or (N, T) tokens that follow"""

    def at(self, rows: Any) -> "Data":
        return Data(self.inputs[rows], self.targets[rows])


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one model is trained."""

    epochs: int
    batch_size: int
    lr: float
    optimiser: str = "sgd"
    """sgd, with momentum 0.9, or adam"""
    weight_decay: float = 0.0
    """Of the loss: half of it times the squared length of all weights."""
    decays: bool = True
    """Whether the learning rate goes down to 0, in a straight line."""
    snapshots: int = 0
    """Checkpoints kept, evenly spaced, the last one at the end."""


@dataclass(frozen=True)
class Trained:
    """What came of it."""

    weights: Weights
    snapshots: list[Weights] = field(default_factory=list[Weights])
    rates: list[float] = field(default_factory=list[float])
    """Mean learning rate before each snapshot."""


class Characters(nn.Module):
    """A small transformer over characters; every matrix is a Linear layer."""

    def __init__(self, vocabulary: int, length: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T, V) logits of (B, T) tokens."""
        states = self.tokens(ids) + self.places[: ids.shape[1]]
        for block in self.blocks:
            states = block(states)
        return self.head(self.norm(states))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.queries = nn.Linear(width, 3 * width)
        self.values = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, states: Tensor) -> Tensor:
        size, length, width = states.shape
        parts = self.queries(self.norms[0](states)).view(size, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        weights = query @ key.mT / math.sqrt(width / self.heads)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = weights.masked_fill(future, -torch.inf).softmax(-1) @ value
        states = states + self.values(mixed.transpose(1, 2).reshape(size, length, width))
        return states + self.down(functional.gelu(self.up(self.norms[1](states))))


class PlainTask:
    """Inputs and targets as they are, for the engines of `curate.models`."""

    model_class: ClassVar[str] = ""
    needs_tokenizer: ClassVar[bool] = False

    def encoded(self, data: Data) -> Encoded:
        inputs, targets = data.inputs.numpy(), data.targets.numpy()
        count = len(inputs)
        length = 1 if targets.ndim == 1 else targets.shape[1]
        return Encoded(
            lengths=np.full(count, length),
            num_scored=np.full(count, length),
            truncated=np.zeros(count, dtype=bool),
            arrays={"inputs": inputs, "labels": targets},
            problems={},
        )

    def encode(self, fields: Any) -> Encoded:
        raise TypeError("examples of the benchmark are tensors")

    def collate(self, encoded: Encoded, indices: Sequence[int] | np.ndarray) -> Batch:
        rows = np.asarray(indices)
        return {key: torch.from_numpy(value[rows]) for key, value in encoded.arrays.items()}

    def logits_and_targets(self, model: nn.Module, batch: Batch) -> Flat:
        logits, targets = model(batch["inputs"]), batch["labels"]
        owner = torch.arange(len(targets)).repeat_interleave(targets[0].numel())
        return Flat(logits.reshape(-1, logits.shape[-1]), targets.flatten(), owner)

    def pieces(self, model: nn.Module, batch: Batch) -> Iterator[Flat]:
        yield self.logits_and_targets(model, batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        flat = self.logits_and_targets(model, batch)
        return functional.cross_entropy(flat.logits, flat.targets)

    def facts(self) -> dict[str, Any]:
        return {}


def train_many(
    make: Callable[[], nn.Module],
    data: Data,
    members: np.ndarray,
    seeds: Sequence[int],
    recipe: Recipe,
) -> Trained:
    """Train a model on each subset.

    Args:
        make: a fresh model, its weights from torch's random numbers.
        data: of all examples.
        members: (M, N) bool; all subsets have the same size.
        seeds: (M,) of weights and shuffles.
        recipe: how.
    """
    groups = [range(start, min(start + _TOGETHER, len(seeds)))
              for start in range(0, len(seeds), _TOGETHER)]  # fmt: skip
    found = [
        _group(make, data, [np.flatnonzero(members[i]) for i in group],
               [seeds[i] for i in group], recipe)
        for group in groups
    ]  # fmt: skip
    join = lambda parts: {name: torch.cat([p[name] for p in parts]) for name in parts[0]}  # noqa: E731
    snapshots = [join([each.snapshots[i] for each in found]) for i in range(recipe.snapshots)]
    return Trained(join([each.weights for each in found]), snapshots, found[0].rates)


def losses_of(make: Callable[[], nn.Module], weights: Weights, data: Data) -> np.ndarray:
    """(M, N) float64 mean loss of each example's positions, by each model."""
    model = make()
    rows: list[np.ndarray] = []
    for number in range(len(next(iter(weights.values())))):
        own = {name: value[number] for name, value in weights.items()}
        with torch.no_grad():
            logits = functional_call(model, own, (data.inputs,)).double()
        each = functional.cross_entropy(
            logits.flatten(0, -2), data.targets.flatten(), reduction="none"
        )
        rows.append(each.view(len(data.targets), -1).mean(1).numpy())
    return np.stack(rows)


def one_model(make: Callable[[], nn.Module], weights: Weights, number: int) -> nn.Module:
    """One of the models, in eval mode."""
    model = make().eval()
    model.load_state_dict({name: value[number].clone() for name, value in weights.items()})
    return model


def _group(
    make: Callable[[], nn.Module],
    data: Data,
    rows: Sequence[np.ndarray],
    seeds: Sequence[int],
    recipe: Recipe,
) -> Trained:
    model = make()

    def loss(weights: Weights, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = functional_call(model, weights, (inputs,))
        return functional.cross_entropy(logits.flatten(0, -2), targets.flatten())

    slopes = vmap(grad(loss))
    weights = _fresh(make, seeds)
    generators = [np.random.default_rng([seed, 1]) for seed in seeds]
    first = {name: torch.zeros_like(value) for name, value in weights.items()}
    second = {name: torch.zeros_like(value) for name, value in weights.items()}
    steps = len(rows[0]) // recipe.batch_size
    total = steps * recipe.epochs
    marks = {round(total * (i + 1) / recipe.snapshots) for i in range(recipe.snapshots)}
    snapshots: list[Weights] = []
    rates: list[float] = []
    since: list[float] = []
    number = 0
    for _ in range(recipe.epochs):
        order = np.stack([own[g.permutation(len(own))] for own, g in zip(rows, generators,
                                                                         strict=True)])  # fmt: skip
        for step in range(steps):
            chosen = order[:, step * recipe.batch_size : (step + 1) * recipe.batch_size]
            batch = data.at(torch.from_numpy(chosen))
            found = slopes(weights, batch.inputs, batch.targets)
            number += 1
            lr = recipe.lr * ((1 - (number - 1) / total) if recipe.decays else 1.0)
            since.append(lr)
            for name, value in weights.items():
                slope = found[name].add_(value, alpha=recipe.weight_decay)
                if recipe.optimiser == "sgd":
                    value.sub_(first[name].mul_(0.9).add_(slope), alpha=lr)
                    continue
                first[name].lerp_(slope, 0.1)
                second[name].lerp_(slope.square(), 0.01)
                scale = (second[name] / (1 - 0.99**number)).sqrt_().add_(1e-8)
                value.addcdiv_(first[name], scale, value=-lr / (1 - 0.9**number))
            if number in marks:
                snapshots.append({name: value.clone() for name, value in weights.items()})
                rates.append(sum(since) / len(since))
                since = []
    return Trained(weights, snapshots, rates)


def _fresh(make: Callable[[], nn.Module], seeds: Sequence[int]) -> Weights:
    models: list[nn.Module] = []
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            models.append(make())
    states = [dict(model.named_parameters()) for model in models]
    return {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}
