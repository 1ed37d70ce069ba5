"""Data curation inside your own training: all that a trainer needs, in one place.

`MixtureStream` mixes domains by probabilities that may change, and resumes exactly.
`MixtureCallback` drives it in a `Trainer`: a schedule such as cooldown, or a live mixer.
`apply_weights` lets a `Trainer` or TRL's `SFTTrainer` weigh examples by a column, by their losses
(`LossReweighting`), or tokens by their probability (`TokenWeights`).
`align_mixture` lets a stream follow the gradient of a target while a `Trainer` trains (`DGA`).

The maths stands in `mixers.loss_weights`, `mixers.token_weights` and `mixers.phases`, for a loop of
your own. See docs/online.md.
"""

from mixers.dga import DGA
from mixers.live_alignment import LiveAlignment, align_mixture
from mixers.loss_weights import LossReweighting
from mixers.phases import example_probabilities
from mixers.stream import MixtureStream
from mixers.token_weights import TokenWeights
from mixers.trainer_stream import MixtureCallback
from mixers.trainer_weights import apply_weights
from mixers.weighted_loss import WeightedLoss

__all__ = [
    "DGA",
    "LiveAlignment",
    "LossReweighting",
    "MixtureCallback",
    "MixtureStream",
    "TokenWeights",
    "WeightedLoss",
    "align_mixture",
    "apply_weights",
    "example_probabilities",
]
