"""What a mixer of the closed kind is: sizes in, mixture out."""

from collections.abc import Mapping
from typing import Protocol

from curate.plan.mixture import DomainSize, Mixture


class ClosedMixer(Protocol):
    """A mixture computed from sizes alone; the class is its own settings."""

    def mixture(self, sizes: Mapping[str, DomainSize], *, budget_tokens: float) -> Mixture:
        """The mixture for domains of these sizes.

        Args:
            sizes: domain -> its size; no size is 0.
            budget_tokens: tokens that training will see, repeats counted.
        """
        ...
