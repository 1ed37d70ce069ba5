"""Confidence: the probability a model gave to an example's label, averaged over its training.

    mu_i = 1/E sum_e p_e(y_i | x_i)                                              (Section 2)

Source: Swayamdipta, Schwartz, Lourie, Wang, Hajishirzi, Smith and Choi, "Dataset Cartography:
Mapping and Diagnosing Datasets with Training Dynamics", EMNLP 2020, arXiv:2009.10795.

Departures: correctness is the number of epochs in which the example was right, as in the authors'
code; the paper's figures show its share. For a sequence p is exp(-mean token loss), and it is right
where at least half of its tokens are; both are ours.
Cost: none beside training; reads the training log.
Shapes: E epochs, N examples.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from curate.config import STRICT
from curate.models.presentations import (
    check_rounds,
    mean_shown,
    num_shown,
    rounds,
    target_probabilities,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Confidence:
    """Mean probability of the label over a run, averaged over seeds by the caller."""

    __pydantic_config__: ClassVar = STRICT

    epochs: int | None = None
    """Look up to this epoch (the code's burn_out); by default at all of them."""
    history: Literal["log", "checkpoints"] = "log"
    """log: what training itself saw, epoch by epoch; checkpoints: what each checkpoint says, in
    order of step, for which they are all measured. Your own checkpoints have no log."""

    needs: ClassVar[frozenset[str]] = frozenset({"loss_by_epoch", "correct_by_epoch"})
    columns: ClassVar[Mapping[str, str]] = {
        "confidence": "mean probability of the label over the epochs, 0 to 1; low is hard or wrong",
        "correctness": "number of epochs in which the example was right",
        "threshold_closeness": "confidence times one less it, 0 to 0.25; high is near the border",
    }

    def __post_init__(self) -> None:
        check_rounds(epochs=self.epochs)

    def score(self, quantities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        losses = rounds(quantities["loss_by_epoch"], epochs=self.epochs)
        correct = rounds(quantities["correct_by_epoch"], epochs=self.epochs)
        mean = mean_shown(target_probabilities(losses))
        times = (correct >= 0.5).sum(dim=0).to(mean.dtype)
        return {
            "confidence": mean,
            "correctness": torch.where(num_shown(correct) > 0, times, torch.nan),
            "threshold_closeness": mean * (1 - mean),
        }
