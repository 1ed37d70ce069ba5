"""Per-example gradients: norms, inner products, projections, without forming weight gradients."""

from curate.models.gradients.capture import softmax_losses, watched
from curate.models.gradients.engine import Engine
from curate.models.gradients.forms import LowRank
from curate.models.gradients.request import Gradients, Seen, Sides, Wanted
from curate.models.gradients.softmax import Sweep, first_sweep

__all__ = [
    "Engine",
    "Gradients",
    "LowRank",
    "Seen",
    "Sides",
    "Sweep",
    "Wanted",
    "first_sweep",
    "softmax_losses",
    "watched",
]
