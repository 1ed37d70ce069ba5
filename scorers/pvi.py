"""PVI: how many bits the input gives a model about the answer, for each example.

    pvi(x -> y) = -log2 g_null(y) + log2 g(y | x)                           (Equation 4)

with g a model trained on (x, y) and g_null the same model trained on y with the input left empty.
Above 0 the input helps, below 0 it misleads; the mean over held-out examples is the V-information
that the input holds about the answer for this kind of model.

Source: Ethayarajh, Choi and Swayamdipta, "Understanding Dataset Difficulty with V-Usable
Information", ICML 2022, arXiv:2110.08420.

Departures: models are cross-fitted, so that every example is judged by one that was not trained on
it, as PVI of training data saturates; of every training the checkpoint with the lowest held-out
loss judges, which is the one with the most V-information, as the paper's falls again when a model
is trained for long. g_null is trained like g, not for a single epoch. For a prompt and its
response the mean over the tokens of the response.
Cost: `folds` + 1 trainings a seed, and two forward passes.
Shapes: N examples.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from curate.config import STRICT
from curate.errors import ConfigError
from curate.models.settings import Train


@dataclass(frozen=True, slots=True, kw_only=True)
class PVI:
    """Surprise at the answer without the input less that with it, averaged over seeds."""

    __pydantic_config__: ClassVar = STRICT

    folds: int = 3
    """Parts of the data; each is judged by a model that was trained on the others, 2 to 5."""
    train: Train | None = None
    """How these models are trained; by default as `checkpoints.train`."""
    stop: Literal["best", "last"] = "best"
    """Which saved state of a model judges: that with the lowest held-out loss, or the last."""

    needs: ClassVar[frozenset[str]] = frozenset({"given_bits", "null_bits"})
    columns: ClassVar[Mapping[str, str]] = {
        "pvi": "bits that the input gives about the answer; below 0 it misleads: hard or wrong",
    }

    def __post_init__(self) -> None:
        if not 2 <= self.folds <= 5:
            raise ConfigError(f"folds is {self.folds}, not 2 to 5", fix="set pvi.folds to 3")

    def score(self, quantities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"pvi": quantities["null_bits"] - quantities["given_bits"]}
