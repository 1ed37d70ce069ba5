"""AUM, the area under the margin: how far ahead of the others the label's logit was in training.

    M_t(x, y) = z_y - max_{k != y} z_k                                              (Eq. 1)
    AUM(x, y) = 1/T sum_t M_t(x, y)                                                 (Eq. 2)

Source: Pleiss, Zhang, Elenberg and Weinberger, "Identifying Mislabeled Data using the Area Under
the Margin Ranking", NeurIPS 2020, arXiv:2001.10528.

Departures: threshold samples are a scorer of their own, `aum_threshold`. For a sequence the margin
is the mean of its tokens' margins, which is ours.
Cost: none beside training; reads the training log.
Shapes: E epochs, N examples.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from curate.config import STRICT
from curate.models.presentations import check_rounds, mean_shown, rounds


@dataclass(frozen=True, slots=True, kw_only=True)
class AUM:
    """Mean margin over a run, averaged over seeds by the caller."""

    __pydantic_config__: ClassVar = STRICT

    epochs: int | None = None
    """Look up to this epoch, which should come before the network memorises wrong labels (in the
    paper the first drop of the learning rate); by default at all of them."""
    skip_first: int = 0
    """Epochs left out at the start; the authors' replication leaves out one."""
    history: Literal["log", "checkpoints"] = "log"
    """log: what training itself saw, epoch by epoch; checkpoints: what each checkpoint says, in
    order of step, for which they are all measured. Your own checkpoints have no log."""

    needs: ClassVar[frozenset[str]] = frozenset({"margin_by_epoch"})
    columns: ClassVar[Mapping[str, str]] = {
        "aum": "mean lead of the label's logit over the epochs; low or negative is mislabelled",
    }

    def __post_init__(self) -> None:
        check_rounds(skip_first=self.skip_first, epochs=self.epochs)

    def score(self, quantities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        margins = quantities["margin_by_epoch"]
        chosen = rounds(margins, skip_first=self.skip_first, epochs=self.epochs)
        return {"aum": mean_shown(chosen)}
