"""DVGS: how well the gradient of an example agrees with that of a trusted target, step by step.

    V_i = mean over steps s of sim(g_T(s), g_i(s))
    g_T(s) = gradient of the mean loss of the target's minibatch s, just before its update
    g_i(s) = gradient of the loss of example i with the same weights
    sim    = <g_T, g_i> / max(|g_T| |g_i|, 1e-8)            cosine, the published choice
             <g_T, g_i>                                     dot
             <g_T, g_i> / |g_T|                             projection
             -|g_T - g_i|                                   distance

where the weights are trained on the target only.

Source: Evans, Mills, Wu, Song and McWeeney, "Data Valuation with Gradient Similarity", 2024,
arXiv:2405.08217.

Departures: both gradients are taken in eval mode, as each example's own dropout mask would blur the
similarity; only the update is in train mode. About 100 steps are evaluated, spread evenly, where
the authors evaluate each (`every: 1`). The loss of an example is the mean over its counted tokens,
as that of the target is. With `subsample: r` the steps come in blocks of r, the last one shorter,
and an example is evaluated at one random step of each block, which counts for the whole block: the
expectation is the full average.
Cost: training on the target, and for each evaluated step one forward and backward pass over the
pool in which no weight gradient is formed (1/r of the pool with `subsample`). On disk the weights
and one gradient for each evaluated step and seed.
Shapes: N examples, S evaluated steps.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from curate.config import STRICT
from curate.errors import ConfigError

SIMILARITIES = ("cosine", "dot", "projection", "distance")

_SMALLEST = 1e-8
"""Of the product of two norms: a gradient of zero has the cosine 0."""


def similarities(dot: Tensor, square: Tensor, target_square: float) -> dict[str, Tensor]:
    """All four similarities, from numbers that one pass gives together.

    `distance` is the root of a difference: where two gradients nearly agree it is exact to about
    the root of the rounding of its parts, 3e-4 of their norm in float32.

    Args:
        dot: (N,) float64 inner products of each example's gradient with the target's.
        square: (N,) float64 squared norms of the examples' gradients.
        target_square: squared norm of the target's.

    Returns:
        (N,) each: cosine in [-1, 1], 0 where a gradient is zero; dot and projection, any number;
        distance, minus the Euclidean distance, at most 0.
    """
    norm = target_square**0.5
    own = square.clamp(min=0).sqrt()
    return {
        "cosine": (dot / (own * norm).clamp(min=_SMALLEST)).clamp(-1, 1),
        "dot": dot,
        "projection": dot / norm if norm > 0 else torch.zeros_like(dot),
        "distance": -(square - 2 * dot + target_square).clamp(min=0).sqrt(),
    }


class Turn(NamedTuple):
    """A step's place among the blocks of `subsample`."""

    block: int
    place: int
    size: int
    """Steps of the block: what is evaluated at this one counts for so many."""


def turns(num_steps: int, subsample: int) -> Iterator[Turn]:
    """The places of S steps in blocks of `subsample`; the last block may be shorter."""
    for step in range(num_steps):
        block, place = divmod(step, subsample)
        yield Turn(block, place, min(subsample, num_steps - block * subsample))


def takes_turn(draws: npt.NDArray[np.uint64], turn: Turn) -> npt.NDArray[np.bool_]:
    """(N,) which examples are evaluated at a step: each at exactly one step of a block.

    Args:
        draws: (N,) 64 random bits of each example.
        turn: of the step.
    """
    # splitmix64, so that the places of an example in several blocks have nothing in common.
    mixed = draws + np.uint64(((turn.block + 1) * 0x9E3779B97F4A7C15) % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed % np.uint64(turn.size) == np.uint64(turn.place)


class Running:
    """Weighted sums over steps, in float64: nothing of a single step is kept.

    Args:
        names: what is summed.
        num_examples: N.
    """

    def __init__(self, names: tuple[str, ...], num_examples: int) -> None:
        self._sums = {n: torch.zeros(num_examples, dtype=torch.float64) for n in names}
        self._weight = 0.0

    def add(
        self, rows: Tensor, values: Mapping[str, Tensor], *, weight: float, stands_for: int
    ) -> None:
        """One step.

        Args:
            rows: (n,) the examples that were evaluated.
            values: (n,) of each name, float64.
            weight: of the step.
            stands_for: steps that the evaluation of an example counts for, itself included.
        """
        for name, sums in self._sums.items():
            sums[rows] += stands_for * weight * values[name]
        self._weight += weight

    def means(self) -> dict[str, Tensor]:
        """(N,) of each name; 0 where all weights are."""
        return {name: sums / (self._weight or 1.0) for name, sums in self._sums.items()}


def percentile_ranks(values: npt.NDArray[np.float64], grid: npt.NDArray[np.float64]) -> np.ndarray:
    """(n,) share of the pool below each value, ties half, in [0, 1].

    Args:
        values: (n,) finite.
        grid: ascending values of the pool, all of them or an even choice.
    """
    below = np.searchsorted(grid, values, side="left")
    through = np.searchsorted(grid, values, side="right")
    return (below + through) / (2 * max(len(grid), 1))


def grid_of(values: npt.NDArray[np.float64], size: int) -> np.ndarray:
    """An even choice of at most `size` of the values, ascending: all of them where they fit."""
    ordered = np.sort(values)
    if len(ordered) <= size:
        return ordered
    # The middle of each of `size` equal stretches.
    return ordered[(np.arange(size) * len(ordered) + len(ordered) // 2) // size]


@dataclass(frozen=True, slots=True, kw_only=True)
class DVGS:
    """Similarity with the gradient of `target`, averaged over its training and over seeds."""

    __pydantic_config__: ClassVar = STRICT

    similarity: Literal["cosine", "dot", "projection", "distance"] = "cosine"
    """Which one the column `dvgs` is; all of them are in the table."""
    aggregate: Literal["mean", "rank"] = "mean"
    """mean over the steps, or mean over the steps of the percentile rank in the pool."""
    epochs: float = 100.0
    """Passes over the target."""
    seeds: tuple[int, ...] = (0,)
    """One training on the target each."""
    lr: float | None = None
    """Of Adam; 1e-3, the published rate, for a model from scratch, 5e-5 for one that is loaded."""
    batch_size: int = 100
    """Target examples in a step."""
    batch_tokens: int = 8192
    """Target tokens in a step, padding included: long examples make smaller batches."""
    every: int | Literal["auto"] = "auto"
    """Evaluate every so many steps; auto evaluates at most 100."""
    subsample: int = 1
    """Evaluate a random 1/r of the pool at each of these steps."""
    weight_by_norm: bool = False
    """Weigh the steps by the norm of the target's gradient: late ones may be all noise."""
    parameters: str = "all"
    """all, or a regular expression: the parameters in whose names it is found."""
    copies: Literal["keep", "drop"] = "keep"
    """Examples that stand in the target too: keep their score, or drop it (null)."""

    columns: ClassVar[Mapping[str, str]] = {
        "dvgs": "the chosen similarity or its mean rank; low conflicts with the target",
        "dvgs_cosine": "mean cosine, -1 to 1; 0 is irrelevant, below 0 conflicts",
        "dvgs_dot": "mean inner product; grows with both gradients",
        "dvgs_projection": "mean length along the target's gradient, any number",
        "dvgs_distance": "mean of minus the distance of the gradients, at most 0",
        "dvgs_target_loss": "loss under the model trained on the target, nats: the baseline",
    }

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(
                f"seeds are {list(self.seeds)}", fix="list different seeds: [0, 1, 2]"
            )
        for name in ("epochs", "lr", "batch_size", "batch_tokens", "every", "subsample"):
            value = getattr(self, name)
            if isinstance(value, int | float) and value <= 0:
                raise ConfigError(f"{name} is {value}, not above 0", fix=f"raise dvgs.{name}")
        try:
            re.compile(self.parameters)
        except re.error as error:
            raise ConfigError(
                f"parameters {self.parameters!r} is no regular expression: {error}",
                fix="use all, or part of a name such as lora_ or layers.11",
            ) from error

    @property
    def needs(self) -> frozenset[str]:
        ranks = {"rank"} if self.aggregate == "rank" else set[str]()
        return frozenset({*SIMILARITIES, "target_loss", *ranks})

    def measures(self, name: str) -> bool:
        """Whether a parameter of this name is measured."""
        return self.parameters == "all" or re.search(self.parameters, name) is not None

    def score(self, quantities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        chosen = "rank" if self.aggregate == "rank" else self.similarity
        others = {f"dvgs_{name}": quantities[name] for name in (*SIMILARITIES, "target_loss")}
        return {"dvgs": quantities[chosen], **others}
