"""Loss and perplexity: how surprising an example is to a model.

    loss(x, y) = -(1 / n) sum_t ln p(y_t | x, y_<t)        perplexity = exp(loss)

n counts the tokens that are predicted; for a class n is 1. The baseline of everything here.

Source: the cross-entropy of training itself; perplexity after Jelinek, Mercer, Bahl and Baker,
"Perplexity, a measure of the difficulty of speech recognition tasks", JASA 62 (S1), 1977.
Departures: the perplexity is cut at exp(88), the last that float32 can hold.
Cost: one forward pass per model, shared with every other score of that pass.
Shapes: N examples.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from curate.config import STRICT

_LARGEST = 88.0


@dataclass(frozen=True, slots=True)
class Loss:
    """Mean cross-entropy, averaged over checkpoints and seeds by the caller."""

    __pydantic_config__: ClassVar = STRICT

    needs: ClassVar[frozenset[str]] = frozenset({"loss"})
    columns: ClassVar[Mapping[str, str]] = {
        "loss": "mean cross-entropy, nats per counted token, 0 and up; higher is more surprising",
        "perplexity": "exp(loss), 1 and up; higher is more surprising",
    }

    def score(self, quantities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        loss = quantities["loss"]
        return {"loss": loss, "perplexity": loss.clamp(max=_LARGEST).exp()}
