"""Random: the yardstick that a score must beat at the same number of tokens.

    random(x) = h(seed, key of x) / 2^24, uniform in [0, 1)

A hash of the key and not a stream of draws: the number of an example depends on nothing else in
the data.

Source: none; a yardstick.
Departures: none.
Cost: one hash per example; no model.
Shapes: N examples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import xxhash
from torch import Tensor

from curate.config import STRICT


def uniform(keys: Sequence[tuple[str, str, int]], *, seed: int) -> Tensor:
    """(N,) float32 in [0, 1), each drawn from the seed and one key.

    Args:
        keys: (source, file, row) of each example.
        seed: of the run.
    """
    # 24 bits are what float32 holds: with more, a draw could be rounded up to 1.
    draws = [
        xxhash.xxh3_64_intdigest(f"{seed}\0random\0{source}\0{file}\0{row}".encode()) >> 40
        for source, file, row in keys
    ]
    return torch.tensor(draws, dtype=torch.float32) / 2**24


@dataclass(frozen=True, slots=True)
class Random:
    """A uniform draw for each example."""

    __pydantic_config__: ClassVar = STRICT

    needs: ClassVar[frozenset[str]] = frozenset({"uniform"})
    columns: ClassVar[Mapping[str, str]] = {
        "random": "uniform in [0, 1), from the run's seed and the example's key"
    }

    def score(self, quantities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"random": quantities["uniform"]}
