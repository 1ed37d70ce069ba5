"""GraNd: the length of an example's loss gradient, how hard it would push the weights.

    grand_t(x, y) = E_w || g_t(x, y) ||_2                                   (Definition 2.1)

where g_t is the gradient of the loss at step t with respect to all weights.

Source: Paul, Ganguli and Dziugaite, "Deep Learning on a Data Diet", NeurIPS 2021,
arXiv:2107.07075. The expectation runs over independently trained models, a few epochs in.

Departures: for a sequence the gradient is that of the sum over its n counted tokens, and `grand`
is its length divided by sqrt(n), as the gradients of tokens are nearly uncorrelated; `grand_sum` is
the length itself. With one position per example the two are the same. The paper's scores at
initialisation do not reproduce (Kirsch, 2023, "Does Deep Learning on a Data Diet reproduce?
Overall yes, but GraNd at initialization does not", arXiv:2303.14753): train first.
Cost: one forward and one backward pass per model in which no weight gradient is formed, less than
a training step; shared with every score of the forward pass. See `curate.models.gradients`.
Shapes: N examples.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from curate.config import STRICT


@dataclass(frozen=True, slots=True)
class GraNd:
    """Gradient norm over all parameters, averaged over checkpoints and seeds by the caller."""

    __pydantic_config__: ClassVar = STRICT

    needs: ClassVar[frozenset[str]] = frozenset({"grad_sq_norm", "num_positions"})
    columns: ClassVar[Mapping[str, str]] = {
        "grand": "gradient norm over the root of the counted positions, 0 and up; higher is harder",
        "grand_sum": "norm of the gradient of the summed loss; grows with the number of tokens",
    }

    def score(self, quantities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        norm = quantities["grad_sq_norm"].clamp(min=0).sqrt()
        return {"grand": norm / quantities["num_positions"].sqrt(), "grand_sum": norm}
