"""Variability: how much the probability of an example's label moved during training.

    sigma_i = sqrt(1/E sum_e (p_e(y_i | x_i) - mu_i)^2)                          (Section 2)

Source: Swayamdipta, Schwartz, Lourie, Wang, Hajishirzi, Smith and Choi, "Dataset Cartography:
Mapping and Diagnosing Datasets with Training Dynamics", EMNLP 2020, arXiv:2009.10795.

Departures: null where an example was shown less than twice, where the formula would give 0.
`variability_ci` is the authors' code's option, sqrt(var + var^2 / (E - 1)). For a sequence p is
exp(-mean token loss), which is ours.
Cost: none beside training; reads the training log.
Shapes: E epochs, N examples.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from curate.config import STRICT
from curate.models.presentations import (
    check_rounds,
    num_shown,
    rounds,
    target_probabilities,
    variance_shown,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variability:
    """Spread of the label's probability over a run, averaged over seeds by the caller."""

    __pydantic_config__: ClassVar = STRICT

    epochs: int | None = None
    """Look up to this epoch (the code's burn_out); by default at all of them."""
    history: Literal["log", "checkpoints"] = "log"
    """log: what training itself saw, epoch by epoch; checkpoints: what each checkpoint says, in
    order of step, for which they are all measured. Your own checkpoints have no log."""

    needs: ClassVar[frozenset[str]] = frozenset({"loss_by_epoch"})
    columns: ClassVar[Mapping[str, str]] = {
        "variability": "standard deviation of the label's probability over the epochs, 0 to 0.5;"
        " high is ambiguous",
        "variability_ci": "the same with the uncertainty of the variance added; larger where the"
        " epochs are few",
    }

    def __post_init__(self) -> None:
        check_rounds(epochs=self.epochs)

    def score(self, quantities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        losses = rounds(quantities["loss_by_epoch"], epochs=self.epochs)
        variance = variance_shown(target_probabilities(losses))
        others = num_shown(losses) - 1
        return {
            "variability": variance.sqrt(),
            "variability_ci": (variance + variance.square() / others).sqrt(),
        }
