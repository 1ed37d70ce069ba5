"""AUM with threshold samples: which margins are as low as those of labels that are surely wrong.

In each of two runs some examples are given a class that does not exist. Their areas under the
margin show what a wrong label looks like:

    flagged in a run  <=>  more than 1 % of its threshold samples have a larger area   (Section 3.2)

and an example is flagged where every run flags it in which it was not a threshold sample itself.

Source: Pleiss, Zhang, Elenberg and Weinberger, "Identifying Mislabeled Data using the Area Under
the Margin Ranking", NeurIPS 2020, arXiv:2001.10528.

Departures: each example is a threshold sample with probability 1 / (C + 1) in either run, never in
both, by a hash of its key, so that their number is N / (C + 1) on average; the authors' code takes
N // C by a permutation.
Cost: two training runs as in `checkpoints.train`, with one more class; no pass.
Shapes: E epochs, N examples, S threshold samples, C classes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from curate.config import STRICT
from curate.errors import ConfigError
from curate.models.presentations import check_rounds

RUNS = 2
"""Trainings; their threshold samples are disjoint."""


def threshold_runs(draws: Tensor, num_classes: int) -> Tensor:
    """The run in which each example is a threshold sample; -1 where it is in none.

    Args:
        draws: (N,) uniform in [0, 1).
        num_classes: C, at least 2, the class that does not exist left out.
    """
    runs = (draws * (num_classes + 1)).floor().long()
    return torch.where(runs < RUNS, runs, -1)


def limit_of(samples: Tensor, percentile: float) -> float:
    """The area below which an example has more than its share of threshold samples above it.

    Args:
        samples: (S,) their areas, NaN where one was never shown.
        percentile: 0.99 allows 1 % of them above.

    Returns:
        An area; minus infinity without samples, as then nothing can be flagged.
    """
    known = samples[samples.isfinite()].sort(descending=True).values
    if not len(known):
        return -math.inf
    # Rounding must not move a whole number such as 100 * (1 - 0.99).
    allowed = math.floor(round((1 - percentile) * len(known), 9))
    return float(known[min(allowed, len(known) - 1)])


@dataclass(frozen=True, slots=True, kw_only=True)
class AUMThreshold:
    """Mean margins of the runs in which an example kept its label, and the flag."""

    __pydantic_config__: ClassVar = STRICT

    percentile: float = 0.99
    """Of the threshold samples' areas: below it an example is flagged."""
    skip_first: int = 0
    """Epochs left out at the start; the authors' replication leaves out one."""
    epochs: int | None = None
    """Look up to this epoch; by default at all of them."""

    needs: ClassVar[frozenset[str]] = frozenset({"area", "flagged"})
    columns: ClassVar[Mapping[str, str]] = {
        "aum_threshold": "mean lead of the label's logit over the epochs of the runs in which the"
        " example kept its label; low or negative is mislabelled",
        "aum_flag": "1 where that is as low as a wrong label's in every such run, else 0",
    }

    def __post_init__(self) -> None:
        check_rounds(skip_first=self.skip_first, epochs=self.epochs)
        if not 0 < self.percentile < 1:
            raise ConfigError(
                f"percentile is {self.percentile}, outside (0, 1)", fix="set it to 0.99"
            )

    def score(self, quantities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"aum_threshold": quantities["area"], "aum_flag": quantities["flagged"]}
