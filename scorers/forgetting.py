"""Forgetting events: how often a model that had an example right got it wrong again.

    F_i = #{t : correct_{t-1}(i) = 1 and correct_t(i) = 0}                   (Definition 2.1)

where t runs over the times that example i was shown in one training run. An example that was never
right in a run counts as forgotten at every epoch of it.

Source: Toneva, Sordoni, Tachet des Combes, Trischler, Bengio and Gordon, "An Empirical Study of
Example Forgetting during Deep Neural Network Learning", ICLR 2019, arXiv:1812.05159.

Departures: the paper gives examples that were never learned an infinite count, its code the number
of epochs; we follow the code, since one such run would make a mean infinite. The paper adds up the
runs of several seeds, the caller takes their mean, which ranks alike. The paper leaves the order
of equal counts open; `forgetting_ordered` breaks ties by the mean loss. A sequence is
right where at least half of its tokens are, which is ours and untested elsewhere.
Cost: none beside training; reads the training log.
Shapes: E epochs, N examples.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from curate.config import STRICT
from curate.models.presentations import check_rounds, mean_shown, num_shown, rounds

_TIE = 0.1
"""Ties move a count by less than this: below one event of one seed among ten."""


def forgetting_events(correct: Tensor) -> Tensor:
    """How often each example was right when shown and wrong when shown next.

    Args:
        correct: (E, N) share of right positions, right from 0.5; NaN where an example was not
            shown: then its next presentation follows on its last one.

    Returns:
        (N,) counts, 0 to E // 2; E where the example was shown and never right; NaN where it was
        never shown.
    """
    is_right = correct >= 0.5  # NaN is not
    events = torch.zeros_like(correct[0])
    was_right = torch.zeros_like(is_right[0])
    for right, shown in zip(is_right, correct.isfinite(), strict=True):
        events += was_right & shown & ~right
        was_right = torch.where(shown, right, was_right)
    events = torch.where(is_right.any(dim=0), events, float(len(correct)))
    return torch.where(num_shown(correct) > 0, events, torch.nan)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgetting:
    """Forgetting events of each run, averaged over seeds by the caller."""

    __pydantic_config__: ClassVar = STRICT

    epochs: int | None = None
    """Count up to this epoch; by default all of them."""
    history: Literal["log", "checkpoints"] = "log"
    """log: what training itself saw, epoch by epoch; checkpoints: what each checkpoint says, in
    order of step, for which they are all measured. Your own checkpoints have no log."""

    needs: ClassVar[frozenset[str]] = frozenset({"correct_by_epoch", "loss_by_epoch"})
    columns: ClassVar[Mapping[str, str]] = {
        "forgetting": "times an example was right and then wrong; the number of epochs where it was"
        " never right; 0 is never forgotten",
        "forgetting_ordered": "the same, and up to 0.1 more for a higher mean loss, to break ties",
    }

    def __post_init__(self) -> None:
        check_rounds(epochs=self.epochs)

    def score(self, quantities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        events = forgetting_events(rounds(quantities["correct_by_epoch"], epochs=self.epochs))
        loss = mean_shown(rounds(quantities["loss_by_epoch"], epochs=self.epochs))
        return {
            "forgetting": events,
            "forgetting_ordered": events + _TIE * loss / (1 + loss),
        }
