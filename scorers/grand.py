"""GraNd: the length of an example's loss gradient, how hard it would push the weights.

    grand_t(x, y) = E_w || g_t(x, y) ||_2                                   (Definition 2.1)

where g_t is the gradient of the loss at step t with respect to all weights, or to some of them.

Source: Paul, Ganguli and Dziugaite, "Deep Learning on a Data Diet", NeurIPS 2021,
arXiv:2107.07075. The expectation runs over independently trained models, a few epochs in.

Departures: for a sequence the gradient is that of the sum over its n counted tokens, and `grand`
is its length divided by sqrt(n), as the gradients of tokens are nearly uncorrelated; `grand_sum` is
the length itself. With one position per example the two are the same. The paper's scores at
initialisation do not reproduce (Kirsch, 2023, "Does Deep Learning on a Data Diet reproduce?
Overall yes, but GraNd at initialization does not", arXiv:2303.14753): train first.
With `parameters: head` it is the last layer's alone: for one position with features h, and a bias,
||p - y|| * sqrt(|h|^2 + 1), which is EL2N times the length of what the layer sees.
Cost: one forward and one backward pass per model in which no weight gradient is formed, less than
a training step; shared with every score of the forward pass. The last layer alone costs a forward
pass and its own products. With `norm: sketched`, less where sequences are longer than layers are
wide. See `curate.models.gradients`.
Shapes: N examples.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from curate.config import STRICT
from curate.errors import ConfigError
from curate.models.gradients.groups import HEAD, Squared, parse_name


@dataclass(frozen=True, slots=True)
class GraNd:
    """Gradient norm, averaged over checkpoints and seeds by the caller."""

    __pydantic_config__: ClassVar = STRICT

    parameters: str = "all"
    """all, head (the last layer), or a regular expression that is found in a parameter's name."""
    by_layer: bool = False
    """One more column for each group of layers: grand_embeddings, grand_layer_0 and so on."""
    norm: Literal["exact", "sketched"] = "exact"
    """sketched: an estimate for sequences much longer than the layers are wide, where the exact
    norm costs a quarter more; within a few per cent, and the log says how many."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.parameters)
        except re.error as error:
            raise ConfigError(
                f"grand.parameters is {self.parameters!r}, which is no regular expression: {error}",
                fix="use all, head, or an expression such as self_attn",
            ) from error
        if not self.parameters:
            raise ConfigError("grand.parameters is empty", fix="use all, or leave it out")
        if self.by_layer and self.parameters == HEAD:
            raise ConfigError(
                "grand.by_layer has nothing to divide where parameters is head",
                fix="remove one of the two",
            )

    @property
    def needs(self) -> frozenset[str]:
        """Squared norms of the chosen parameters, and how many positions count."""
        chosen = Squared(self.parameters, sketched=self.norm == "sketched")
        names = {chosen.name, "num_positions"}
        if self.by_layer:
            names.add(chosen._replace(group="*").name)
        return frozenset(names)

    @property
    def columns(self) -> Mapping[str, str]:
        """Without those of the groups of layers, which depend on the model."""
        return {
            "grand": "gradient norm over the root of the counted positions, 0 and up; higher is"
            " harder",
            "grand_sum": "norm of the gradient of the summed loss; grows with the number of tokens",
        }

    @property
    def prefix(self) -> str | None:
        """How the columns begin that depend on the model."""
        return "grand_" if self.by_layer else None

    def score(self, quantities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        chosen = Squared(self.parameters, sketched=self.norm == "sketched")
        total = _norm(quantities[chosen.name])
        root = quantities["num_positions"].sqrt()
        found = {"grand": total / root, "grand_sum": total}
        for name, squares in quantities.items():
            parsed = parse_name(name)
            if parsed is not None and parsed.group is not None:
                found[f"grand_{parsed.group}"] = _norm(squares) / root
        return found


def _norm(squares: Tensor) -> Tensor:
    return squares.clamp(min=0).sqrt()
