"""Per-example gradients: norms, inner products, projections, without forming weight gradients."""

from curate.models.gradients.capture import watched
from curate.models.gradients.engine import Engine
from curate.models.gradients.forms import LowRank
from curate.models.gradients.request import Gradients, Sides, Wanted

__all__ = ["Engine", "Gradients", "LowRank", "Sides", "Wanted", "watched"]
