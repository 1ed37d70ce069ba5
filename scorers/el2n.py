"""EL2N: the length of the error vector, an early sign of how hard an example is.

    el2n(x, y) = E_w || p(w, x) - y ||_2                                    (Definition 2.3)

Source: Paul, Ganguli and Dziugaite, "Deep Learning on a Data Diet", NeurIPS 2021,
arXiv:2107.07075. The expectation runs over independently trained models, a few epochs in.

Departures: for a sequence the mean over its counted tokens, which does not depend on their number,
and beside it `el2n_frob`, the norm of the whole (tokens x vocabulary) error matrix, which does.
With one position per example the two are the same.
Cost: one forward pass per model, shared with every other score of that pass; the stable form of
the norm is in `curate.models.quantities`.
Shapes: N examples.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from curate.config import STRICT


@dataclass(frozen=True, slots=True)
class EL2N:
    """Error norm, averaged over checkpoints and seeds by the caller."""

    __pydantic_config__: ClassVar = STRICT

    needs: ClassVar[frozenset[str]] = frozenset({"error_norms", "error_frob"})
    columns: ClassVar[Mapping[str, str]] = {
        "el2n": "mean softmax error norm, 0 to sqrt(2); higher is harder",
        "el2n_frob": "norm of all error vectors together; grows with the number of tokens",
    }

    def score(self, quantities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"el2n": quantities["error_norms"], "el2n_frob": quantities["error_frob"]}
