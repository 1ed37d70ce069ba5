"""Next-token prediction: plain text, prompt and response, or chat messages.

A sequence starts with the tokenizer's beginning token where it has one, so that the first token of
the text counts too; a chat starts as its template says. No end token is added. A prompt and its
response are tokenized apart and joined, so that no token straddles the border; the prompt is read
and never counted. Sequences are cut on the right at `max_tokens`, or read in windows.

Shapes: N examples of a partition, B examples of a batch, W windows of an example, T positions,
M counted positions, V tokens of the vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

from curate.errors import ConfigError
from curate.models.head import counted_logits, counted_states
from curate.models.settings import CausalLM, Window
from curate.models.tasks.chat import ChatEncoder
from curate.models.tasks.protocol import Batch, Encoded, Flat, Unheaded
from curate.models.tasks.ragged import Ragged, pad
from curate.models.tasks.windows import (
    IGNORED,
    Rows,
    row_batch,
    row_groups,
    rows_of,
    window_bounds,
)
from curate.models.tokens import padding_id, token_ids


class CausalLMTask:
    """The loss of each next token; which tokens count depends on the source's columns."""

    model_class: ClassVar[str] = "transformers:AutoModelForCausalLM"
    needs_tokenizer: ClassVar[bool] = True

    def __init__(
        self, settings: CausalLM, tokenizer: Any, *, max_positions: int | None = None
    ) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.max_tokens = min(settings.max_tokens, max_positions or settings.max_tokens)
        self._padding = padding_id(tokenizer, needed=False)
        # Settings of a task that builds on this one may have no windows.
        self._window: Window | None = getattr(settings, "window", None)
        if self._window is not None and self._window.overlap >= self.max_tokens:
            raise ConfigError(
                f"task.window.overlap is {self._window.overlap}, but the model reads"
                f" {self.max_tokens} tokens at a time",
                fix="lower it, to a quarter of that for instance",
            )

    def encode(self, fields: pl.DataFrame) -> Encoded:
        problems: dict[int, str] = {}
        if "messages" in fields.columns:
            chat = ChatEncoder(self.tokenizer, self.settings.turns)
            ids, counted, problems = chat.encode(fields)
        elif "response" in fields.columns:
            ids, counted = self._answers(fields)
        elif "text" in fields.columns:
            ids, counted = self._texts(fields)
        else:
            raise ConfigError(
                "task causal-lm reads text, but the source names none",
                fix="set sources.NAME.text, or prompt and response, or messages",
            )
        if self._window is not None:
            return self._encoded(ids, counted, problems)
        lengths = np.array([len(row) for row in ids], dtype=np.int64)
        tokens = Ragged.of([row[: self.max_tokens] for row in ids])
        marks = Ragged.of([row[: self.max_tokens] for row in counted], dtype=np.bool_)
        return Encoded(
            lengths=np.maximum(tokens.lengths, 1),
            num_scored=marks.sums(),
            truncated=lengths > self.max_tokens,
            arrays={"tokens": tokens.values, "starts": tokens.starts, "counted": marks.values},
            problems=problems,
        )

    def collate(self, encoded: Encoded, indices: Sequence[int] | np.ndarray) -> Batch:
        """`targets` (B, T - 1) holds at each position the token that follows, or -100.

        With windows, where an example has several: `input_ids` (B, W, T), `targets` (B, W, T - 1).
        """
        if self._window is not None:
            windows = [self._windows(encoded, int(index)) for index in indices]
            batch = row_batch(windows, self._padding)
            several = batch["input_ids"].shape[1] > 1
            return batch if several else {key: value[:, 0] for key, value in batch.items()}
        starts = encoded.arrays["starts"]
        batch = pad(Ragged(encoded.arrays["tokens"], starts), indices, self._padding)
        counted = Ragged(encoded.arrays["counted"], starts).rectangle(indices, 0)
        following = batch["input_ids"][:, 1:]
        batch["targets"] = following.masked_fill(~torch.from_numpy(counted[:, 1:]), IGNORED)
        if "positions" in encoded.arrays:  # several texts in a row, which see themselves alone
            positions = Ragged(encoded.arrays["positions"], starts).rectangle(indices, 0)
            batch["position_ids"] = torch.from_numpy(positions).long()
        return batch

    def logits_and_targets(self, model: nn.Module, batch: Batch) -> Flat:
        (flat,) = self._flat(model, rows_of(model, batch), whole=True)
        return flat

    def pieces(self, model: nn.Module, batch: Batch) -> Iterator[Flat]:
        rows = rows_of(model, batch)
        for group in [rows] if batch["input_ids"].dim() == 2 else row_groups(rows):
            yield from self._flat(model, group, whole=False)

    def before_head(self, model: nn.Module, batch: Batch) -> Unheaded | None:
        given = rows_of(model, batch)
        rows, columns, targets, owner = given.counted()
        found = counted_states(model, given.inputs, rows, columns)
        return None if found is None else Unheaded(found.states, found.head, targets, owner)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        flat = self.logits_and_targets(model, batch)
        if not len(flat.targets):
            return flat.logits.sum()  # 0, with a graph
        return functional.cross_entropy(flat.logits, flat.targets)

    def facts(self) -> dict[str, Any]:
        return {
            "max_tokens": self.max_tokens,
            "template": ChatEncoder(self.tokenizer, self.settings.turns).digest,
        }

    def _flat(self, model: nn.Module, given: Rows, *, whole: bool) -> Iterator[Flat]:
        rows, columns, targets, owner = given.counted()
        start = 0
        found = counted_logits(model, given.inputs, rows, columns, whole=whole, owner=owner)
        for logits in found:
            stop = start + len(logits)
            yield Flat(logits, targets[start:stop], owner[start:stop])
            start = stop

    def _encoded(
        self, ids: list[np.ndarray], counted: list[np.ndarray], problems: dict[int, str]
    ) -> Encoded:
        """Examples to be read in windows: whole, but for what is behind the last window."""
        window = self._window
        assert window is not None
        tokens, marks = Ragged.of(ids), Ragged.of(counted, dtype=np.bool_)
        lengths = np.ones(len(ids), dtype=np.int64)
        scored = np.zeros(len(ids), dtype=np.int64)
        for index, own in enumerate(counted):
            bounds = window_bounds(own, self.max_tokens, window.overlap)[: window.max_windows]
            scored[index] = sum(int(own[first:end].sum()) for _, first, end in bounds)
            if bounds:
                lengths[index] = len(bounds) * max(end - start for start, _, end in bounds)
        wanted = marks.sums()
        return Encoded(
            lengths=lengths,
            num_scored=scored,
            truncated=scored < wanted,
            arrays={"tokens": tokens.values, "starts": tokens.starts, "counted": marks.values},
            problems=problems,
            scored_share=scored / np.maximum(wanted, 1),
        )

    def _windows(self, encoded: Encoded, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokens of each window of an example, and which of them count."""
        window = self._window
        assert window is not None
        begin, stop = encoded.arrays["starts"][index : index + 2]
        tokens = encoded.arrays["tokens"][begin:stop]
        counted = encoded.arrays["counted"][begin:stop]
        bounds = window_bounds(counted, self.max_tokens, window.overlap)[: window.max_windows]
        return [
            (tokens[start:end], counted[start:end] & (np.arange(start, end) >= first))
            for start, first, end in bounds
        ]

    def _texts(self, fields: pl.DataFrame) -> tuple[list[np.ndarray], list[np.ndarray]]:
        first = self._beginning()
        ids = [np.append(first, row) for row in self._ids(fields, "text")]
        # The very first token of a sequence has nothing to be predicted from.
        return ids, [np.arange(len(row)) > 0 for row in ids]

    def _answers(self, fields: pl.DataFrame) -> tuple[list[np.ndarray], list[np.ndarray]]:
        first = self._beginning()
        ids: list[np.ndarray] = []
        counted: list[np.ndarray] = []
        pairs = zip(self._ids(fields, "prompt"), self._ids(fields, "response"), strict=True)
        for prompt, response in pairs:
            ids.append(np.concatenate([first, prompt, response]))
            given = max(1, len(first) + len(prompt))
            counted.append(np.arange(len(ids[-1])) >= given)
        return ids, counted

    def _ids(self, fields: pl.DataFrame, column: str) -> list[np.ndarray]:
        texts: list[str] = fields[column].fill_null("").to_list()
        limit = self.max_tokens if self._window is None else None
        return token_ids(self.tokenizer, texts, limit=limit)

    def _beginning(self) -> np.ndarray:
        token = self.tokenizer.bos_token_id
        return np.array([] if token is None else [token], dtype=np.int32)
