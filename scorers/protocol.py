"""What a scorer is: it names quantities, the engine measures them, it turns them into columns."""

from collections.abc import Mapping
from typing import ClassVar, Protocol

from torch import Tensor


class Scorer(Protocol):
    """A score made of per-example quantities.

    Quantities of `curate.models.quantities.FORWARD` come from one pass of each checkpoint, which
    all scorers share; those of `GRADIENT` from the same pass and the way back through it; those of
    `TABLE` need no model. A class may have a `version`: raise it when
    the same quantities give other columns.

    Shapes: N examples of a partition.
    """

    needs: ClassVar[frozenset[str]]
    """Names of per-example quantities: see `curate.models.quantities.QUANTITIES`, for gradients of
    some parameters only `curate.models.gradients.groups`. A property where options decide."""
    columns: ClassVar[Mapping[str, str]]
    """Column -> one line on its unit, its range and which end is which. Where the model decides
    which columns there are, a class also has `prefix`, with which those others begin."""

    def score(self, quantities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One column (N,) for each name in `columns`, from quantities (N,) of one checkpoint.

        The mean over checkpoints and seeds is taken by the caller.
        """
        ...
