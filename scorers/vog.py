"""VoG: how much the model keeps revising which parts of an input speak for its class.

    S_k = d f_c(x; w_k) / dx           gradient of the logit of class c at checkpoint k
    vog_raw(x) = 1/N sum_j sqrt( 1/K sum_k (S_kj - mean of S_j over k)^2 )     (Section 3)
    vog(x) = (vog_raw(x) - mean_c) / std_c, over the examples of class c       (Section 3)

Despite the name each number contributes a standard deviation, not a variance: the authors' code and
their stored scores do so, and we follow them.

Source: Agarwal, D'souza and Hooker, "Estimating Example Difficulty using Variance of Gradients",
CVPR 2022, arXiv:2008.11600. `stage` takes three checkpoints, as the authors' early and late scores
do; `channel: mean` averages the colour channels first, as they do.

Departures: mean and deviation of a class are those of its training examples. A class with one
such example or without a spread gives 0. For text the input is the token embeddings, padding left
out. A language model has no class: f is the sum of the target logits, and the groups are domain by
length (powers of two). `output: probability`, `reduce: l2` (norms of token rows) and `unit` (every
gradient at length 1) are not the paper's. Averaging over seeds is ours too.
Cost: one forward and one backward pass to the input for each checkpoint, about two forward passes.
Memory: two numbers for each number of the inputs of a block of examples.
Shapes: N examples of a partition, K checkpoints.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from curate.config import STRICT

_NO_SPREAD = 1e-6
"""Deviations below this share of the mean are rounding: raw scores are kept in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VoG:
    """Variance of input gradients over the checkpoints of each seed, normalised by class."""

    __pydantic_config__: ClassVar = STRICT

    needs: ClassVar[frozenset[str]] = frozenset({"vog_raw", "group_mean", "group_std"})
    columns: ClassVar[Mapping[str, str]] = {
        "vog": "standard deviations above the mean of the class, signed; higher is harder",
        "vog_raw": "mean deviation of the input gradient, 0 and up; higher is harder",
    }

    stage: Literal["complete", "early", "middle", "late"] = "complete"
    """Which checkpoints of each seed: all, the first three, the middle three or the last three."""
    target: Literal["label", "predicted"] = "label"
    """Whose logit: that of the label, or of the class that the last checkpoint predicts, where the
    labels are not to be used."""
    output: Literal["logit", "probability"] = "logit"
    """What the gradient is of; probabilities are another score, near 0 where the model is sure."""
    channel: Literal["mean", "none"] = "mean"
    """Images: the mean over the colour channels before anything else, or each number by itself."""
    reduce: Literal["none", "l2"] = "none"
    """Text: every number of a token's gradient by itself, or its norm."""
    unit: bool = False
    """Divide each gradient by its length, so that later, larger logits do not weigh more."""

    def score(self, quantities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raw = quantities["vog_raw"]
        return {
            "vog": normalised(raw, quantities["group_mean"], quantities["group_std"]),
            "vog_raw": raw,
        }


class Statistics(NamedTuple):
    """Raw scores of one class in three numbers that can be put together."""

    num: int
    mean: float
    squares: float
    """Sum of squared deviations from the mean."""

    @property
    def std(self) -> float:
        """Population standard deviation; 0 for a single score, or where there is only rounding."""
        found = math.sqrt(self.squares / self.num)
        return found if self.num > 1 and found > _NO_SPREAD * abs(self.mean) else 0.0


def statistics(raw: np.ndarray) -> Statistics:
    """Statistics of the raw scores of one class.

    Args:
        raw: (N,) float64, finite, N at least 1.
    """
    mean = float(raw.mean())
    return Statistics(len(raw), mean, float(np.square(raw - mean).sum()))


def combined(first: Statistics, second: Statistics) -> Statistics:
    """Statistics of two sets of scores together (Chan, Golub and LeVeque, 1979)."""
    count = first.num + second.num
    delta = second.mean - first.mean
    squares = first.squares + second.squares
    squares += delta * delta * (first.num * second.num / count)
    return Statistics(count, first.mean + delta * (second.num / count), squares)


def normalised(raw: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Standard deviations above the mean of the class, with their sign.

    Args:
        raw: (N,) raw scores; NaN stays.
        mean: (N,) of each example's class.
        std: (N,) of each example's class; where it is 0 so is the result.
    """
    score = (raw - mean) / torch.where(std > 0, std, 1.0)
    return torch.where((std > 0) | raw.isnan(), score, 0.0)
