"""Entropy: how undecided the model is, whatever the answer.

    entropy(x) = -sum_k p_k ln p_k

The one score of the forward pass that never looks at the label.

Source: Shannon, "A Mathematical Theory of Communication", 1948; as a measure of what to label
next, Lewis and Gale, "A Sequential Algorithm for Training Text Classifiers", SIGIR 1994.
Departures: for a sequence the mean over the positions that are counted.
Cost: one forward pass per model, shared with every other score of that pass.
Shapes: N examples.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from curate.config import STRICT


@dataclass(frozen=True, slots=True)
class Entropy:
    """Entropy of the prediction, averaged over checkpoints and seeds by the caller."""

    __pydantic_config__: ClassVar = STRICT

    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})
    columns: ClassVar[Mapping[str, str]] = {
        "entropy": "entropy of the prediction, nats, 0 to ln(classes); higher is less certain"
    }

    def score(self, quantities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"entropy": quantities["entropy"]}
