"""What a task is: how an example becomes numbers, and which positions of it count.

Shapes: N examples of a partition, B examples of a batch, M counted positions, V classes or tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import polars as pl
from torch import Tensor, nn

Batch = dict[str, Tensor]
"""What `collate` makes and a model's forward takes, plus `targets` or `labels`; the first axis of
every tensor is the example."""


class Flat(NamedTuple):
    """One row for each position that counts, those of one example together and in order."""

    logits: Tensor
    """(M, V) the model's outputs, float32 or float64."""
    targets: Tensor
    """(M,) the right class or the next token."""
    owner: Tensor
    """(M,) position of the example within its batch, ascending."""


class Unheaded(NamedTuple):
    """What a linear output head would turn into the rows of a `Flat`.

    A task of many classes may have `before_head(model, batch) -> Unheaded | None`: then gradients
    are measured without all its logits at once. None where the model is more than such a head.
    """

    states: Tensor
    """(M, D) what goes into the head, with gradients where they are enabled."""
    head: nn.Linear
    targets: Tensor
    """(M,)"""
    owner: Tensor
    """(M,) position of the example within its batch, ascending."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """The examples of a partition as numbers; small enough to stay in memory."""

    lengths: np.ndarray
    """(N,) int64 what an example costs in a batch: its tokens after the cut, 1 for a table."""
    num_scored: np.ndarray
    """(N,) int64 how many tokens the score stands on; 0 where nothing counts (unscored)."""
    truncated: np.ndarray
    """(N,) bool, True where the text was cut."""
    arrays: dict[str, np.ndarray]
    """The task's own: `tokens` with `starts`, `features`, `labels` ...; a name that ends in
    `starts` holds (N + 1,) places in a flat array, the last one its end."""
    problems: dict[int, str]
    """Example -> why it could not be encoded; such examples have `num_scored` 0."""
    scored_share: np.ndarray | None = None
    """(N,) float64 share of the tokens that count which the score stands on, where it is known."""

    def __len__(self) -> int:
        return len(self.lengths)


class Task(Protocol):
    """A task; the class takes its settings and the tokenizer (None where it needs none).

    A user's own task settings name theirs in `implementation: ClassVar[str] = "package.module:T"`.
    """

    model_class: ClassVar[str]
    """Class that loads the model, `transformers:AutoModelForCausalLM` for instance."""
    needs_tokenizer: ClassVar[bool]
    """Whether `tokenizer` must be there."""

    def encode(self, fields: pl.DataFrame) -> Encoded:
        """The examples of a table with the columns of `curate.data.reading.read_fields`.

        Raises:
            ConfigError: the table lacks the columns that the task reads.
        """
        ...

    def collate(self, encoded: Encoded, indices: Sequence[int] | np.ndarray) -> Batch:
        """The named examples as one padded batch, on the CPU."""
        ...

    def logits_and_targets(self, model: nn.Module, batch: Batch) -> Flat:
        """All counted positions of a batch, with gradients where they are enabled."""
        ...

    def pieces(self, model: nn.Module, batch: Batch) -> Iterator[Flat]:
        """The rows of `logits_and_targets` in order, a bounded number at a time."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy over the counted positions of the batch, in nats."""
        ...

    def facts(self) -> dict[str, Any]:
        """What the numbers depend on beside settings, tokenizer and model; JSON values."""
        ...
