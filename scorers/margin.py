"""Margin: by how much the model prefers the given answer to the best other one.

    margin(x, y) = z_y - max_{k != y} z_k           averaged over checkpoints: AUM    (Section 3)

z are the logits. Below 0 the model disagrees with the label.

Source: Pleiss, Zhang, Elenberg and Weinberger, "Identifying Mislabeled Data using the Area Under
the Margin Ranking", NeurIPS 2020, arXiv:2001.10528.
Departures: measured in eval mode at saved checkpoints, not during training in train mode; no
threshold class. For a sequence the mean over its counted tokens.
Cost: one forward pass per model, shared with every other score of that pass.
Shapes: N examples.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from curate.config import STRICT


@dataclass(frozen=True, slots=True)
class Margin:
    """Logit margin, averaged over checkpoints and seeds by the caller."""

    __pydantic_config__: ClassVar = STRICT

    needs: ClassVar[frozenset[str]] = frozenset({"margin"})
    columns: ClassVar[Mapping[str, str]] = {
        "margin": "target logit minus largest other, in logits; lower is harder, below 0 wrong"
    }

    def score(self, quantities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"margin": quantities["margin"]}
