"""A task whose examples have lost their input: what is left to learn is how answers are spread.

Texts and prompts are empty, what users say in a chat is empty, numbers and pixels are 0. The
answers stay, and as many of their tokens count as with the input, so that the two compare.

Shapes: N examples of a partition, B examples of a batch, L tokens of an example.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from curate.errors import ConfigError
from curate.models.tasks.protocol import Batch, Encoded, Flat, Task

_BATCH_INPUTS = ("features", "pixel_values")


class WithoutInput:
    """A task, as it is but for the input.

    Args:
        task: whose examples lose their input.
        tokenizer: of the task; None where it needs none.
    """

    model_class: ClassVar[str] = ""
    needs_tokenizer: ClassVar[bool] = False

    def __init__(self, task: Task, tokenizer: Any | None) -> None:
        self._task = task
        self._nothing = "" if tokenizer is None else nothing(tokenizer)

    def encode(self, fields: pl.DataFrame) -> Encoded:
        given = self._task.encode(fields)
        if "counted" in given.arrays and "text" in fields.columns:
            raise ConfigError(
                "a plain text has no input apart from what is predicted, so pvi is not defined",
                fix="use pvi with labels, with prompt and response, or with messages",
            )
        settings: Any = getattr(self._task, "settings", None)
        last_only = getattr(settings, "turns", "all") == "last"
        blank = self._task.encode(blanked(fields, self._nothing, last_only=last_only))
        return _as_many(given, blank)

    def collate(self, encoded: Encoded, indices: Sequence[int] | np.ndarray) -> Batch:
        batch = self._task.collate(encoded, indices)
        return batch | {
            name: torch.zeros_like(batch[name]) for name in _BATCH_INPUTS if name in batch
        }

    def logits_and_targets(self, model: nn.Module, batch: Batch) -> Flat:
        return self._task.logits_and_targets(model, batch)

    def pieces(self, model: nn.Module, batch: Batch) -> Iterator[Flat]:
        return self._task.pieces(model, batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._task.loss(model, batch)

    def facts(self) -> dict[str, Any]:
        return self._task.facts() | {"without_input": self._nothing}


def nothing(tokenizer: Any) -> str:
    """The shortest text that a model can read: empty where special tokens surround every text."""
    if len(tokenizer("").input_ids):
        return ""
    return tokenizer.bos_token or tokenizer.eos_token or tokenizer.pad_token or "\n"


def blanked(fields: pl.DataFrame, empty: str, *, last_only: bool = False) -> pl.DataFrame:
    """The examples without their input; numbers and pixels are left to the batch.

    Args:
        fields: as a task reads them.
        empty: in place of texts.
        last_only: of a chat nothing but the last answer is to be predicted.

    Raises:
        ConfigError: the examples have no input apart from what is to be predicted.
    """
    if "chosen" in fields.columns:
        raise ConfigError(
            "two answers and their prompt have no input that could be left out",
            fix="use pvi with labels, or with prompt and response",
        )
    if "messages" in fields.columns:
        chats = [_blanked(chat or [], last_only) for chat in fields["messages"].to_list()]
        kind = fields["messages"].dtype
        return fields.with_columns(pl.Series("messages", chats, dtype=kind))
    name = "prompt" if "prompt" in fields.columns else "text"
    return fields.with_columns(pl.lit(empty).alias(name)) if name in fields.columns else fields


def _blanked(chat: list[dict[str, Any]], last_only: bool) -> list[dict[str, Any]]:
    answers = [i for i, turn in enumerate(chat) if turn["role"] == "assistant"]
    kept = set(answers[-1:] if last_only else answers)
    return [turn if i in kept else {**turn, "content": ""} for i, turn in enumerate(chat)]


def _as_many(given: Encoded, blank: Encoded) -> Encoded:
    """`blank`, of which no more counts than of `given`, whose answers may have been cut."""
    if "counted" not in blank.arrays:
        return replace(blank, num_scored=np.where(given.num_scored > 0, blank.num_scored, 0))
    counted = blank.arrays["counted"].astype(bool)
    owner = np.repeat(np.arange(len(blank)), np.diff(blank.arrays["starts"]))  # of each token
    before = np.cumsum(counted) - counted
    starts = np.append(before, counted.sum())[blank.arrays["starts"][:-1]]  # (N,)
    rank = before - starts[owner]  # how many of its example's counted tokens came before
    counted &= rank < given.num_scored[owner]
    return replace(
        blank,
        num_scored=np.minimum(blank.num_scored, given.num_scored),
        arrays=blank.arrays | {"counted": counted},
    )
