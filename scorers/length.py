"""Length: the baseline that many a score turns out to be in disguise.

    num_tokens(x), num_chars(x)

Tokens are those of `plan.tokenizer`, by default the scoring model's; nothing is cut.

Source: none; a yardstick.
Departures: none.
Cost: one pass of the tokenizer; no model.
Shapes: N examples.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from curate.config import STRICT


@dataclass(frozen=True, slots=True)
class Length:
    """Tokens, null where there is no tokenizer, and characters."""

    __pydantic_config__: ClassVar = STRICT

    needs: ClassVar[frozenset[str]] = frozenset({"num_tokens", "num_chars"})
    columns: ClassVar[Mapping[str, str]] = {
        "num_tokens": "tokens of the whole example; null where no tokenizer is set",
        "num_chars": "characters of the whole example",
    }

    def score(self, quantities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: quantities[name] for name in self.columns}
