"""What the training loop is handed: examples of several partitions as one, and where files go."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from curate.models.epochs import Lengths
from curate.models.tasks.protocol import Encoded


class Data(NamedTuple):
    """What the loop trains on, handed in by the stage, which knows tables."""

    lengths: Sequence[Lengths]
    """Of each partition; 0 where an example is not trained on."""
    encoded: Callable[[tuple[int, ...]], Encoded]
    """The examples of some partitions, one after the other."""
    held_out: Encoded | None
    """Examples to evaluate on at each checkpoint."""
    write_log: Callable[[int, int, npt.NDArray[np.float32] | None], object]
    """Called with epoch, partition and (3, N) loss, correct, margin of its examples."""
    weights: Callable[[tuple[int, ...]], npt.NDArray[np.float32]] | None = None
    """Loss weights (N,) of the examples of some partitions; None where all weigh 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Where a training run writes."""

    root: Path
    """The run's folder of checkpoints."""
    seed: int
    """As the user numbers the runs; it names the folder."""
    fingerprint: str
    """Of everything the run depends on; a state with another one is not resumed."""
    write_model: Callable[[Path], object]
    """Saves the model, and its tokenizer, into a folder."""

    @property
    def folder(self) -> Path:
        return self.root / f"seed-{self.seed}"

    @property
    def state(self) -> Path:
        return self.folder / "resume" / "state.safetensors"

    @property
    def curve(self) -> Path:
        return self.folder / "curve.parquet"


def join(parts: Sequence[Encoded]) -> Encoded:
    """Encoded examples of several partitions, one after the other.

    A task's arrays have one entry per example or per token along their first axis; `starts`, or
    what ends in it, counts tokens and is shifted.
    """
    if len(parts) == 1:
        return parts[0]
    arrays: dict[str, np.ndarray] = {}
    for key in parts[0].arrays:
        pieces = [part.arrays[key] for part in parts]
        if key.endswith("starts"):
            offsets = np.cumsum([0, *(piece[-1] for piece in pieces)])
            shifted = [p[:-1] + o for p, o in zip(pieces, offsets[:-1], strict=True)]
            pieces = [*shifted, offsets[-1:]]
        arrays[key] = np.concatenate(pieces)
    sizes = np.cumsum([0, *(len(part) for part in parts)])
    return Encoded(
        lengths=np.concatenate([part.lengths for part in parts]),
        num_scored=np.concatenate([part.num_scored for part in parts]),
        truncated=np.concatenate([part.truncated for part in parts]),
        arrays=arrays,
        problems={
            int(offset) + index: why
            for offset, part in zip(sizes, parts, strict=False)
            for index, why in part.problems.items()
        },
    )
