"""Preference: two answers to one prompt, compared by how much each gained over a reference.

    m = beta * ((log p(chosen) - log q(chosen)) - (log p(rejected) - log q(rejected)))
    loss = -ln sigmoid(m)                                                       (Eq. 7)

with p the model and q the reference, both summed over the tokens of the answer. That is logistic
regression on the margin m: one counted position of two classes with the logits (m, 0) and the
first as the right one. So every quantity of a classifier is defined: `loss` is the loss above,
`margin` is m, the gain in implicit reward, `correct` whether it is above 0, `error_norms` is
sqrt(2) * (1 - sigmoid(m)), and `entropy` that of the preference.

Source: Rafailov, Sharma, Mitchell, Ermon, Manning and Finn, "Direct Preference Optimization: Your
Language Model is Secretly a Reward Model", NeurIPS 2023, arXiv:2305.18290.
Departures: tokens before the first in which the answers differ do not count, as what they add to
both sums cancels; that holds for a prompt inside the answers too. Answers that do not differ within
`max_tokens` are not scored. No end token is added to plain texts; chat templates add theirs.
Cost: two sequences an example; those of the reference are measured once and kept.

Shapes: B examples of a batch, R = 2 B rows, T positions, M counted positions.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

from curate.errors import ConfigError, InputError
from curate.models.gradients import first_sweep, softmax_losses
from curate.models.gradients.softmax import plain_losses
from curate.models.head import counted_logits, counted_states
from curate.models.settings import Preference
from curate.models.tasks.chat import ChatEncoder
from curate.models.tasks.protocol import Batch, Encoded, Flat
from curate.models.tasks.ragged import Ragged
from curate.models.tasks.windows import Rows, row_batch, rows_of
from curate.models.tokens import padding_id, token_ids

REFERENCE = ("reference_chosen", "reference_rejected")
"""Columns of the reference's log-probabilities, in nats, beside those of the answers."""

_SIDES = ("chosen", "rejected")


class PreferenceTask:
    """The loss of direct preference optimisation, one example being both answers."""

    model_class: ClassVar[str] = "transformers:AutoModelForCausalLM"
    needs_tokenizer: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    """The columns `REFERENCE` are measured with the reference model before anything else."""

    def __init__(
        self, settings: Preference, tokenizer: Any, *, max_positions: int | None = None
    ) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.max_tokens = min(settings.max_tokens, max_positions or settings.max_tokens)
        self._padding = padding_id(tokenizer, needed=False)

    def encode(self, fields: pl.DataFrame) -> Encoded:
        if not set(_SIDES) <= set(fields.columns):
            raise ConfigError(
                "task preference compares two answers, but the source names none",
                fix="set sources.NAME.chosen and sources.NAME.rejected, with or without prompt",
            )
        problems: dict[int, str] = {}
        sides = [self._side(fields, name, problems) for name in _SIDES]
        ids, counted, whole = zip(*sides, strict=True)
        for index, (one, other) in enumerate(zip(*ids, strict=True)):
            common = _common(one, other)
            for marks in (counted[0][index], counted[1][index]):
                marks[:common] = False
        tokens = [Ragged.of(rows) for rows in ids]
        marks = [Ragged.of(rows, dtype=np.bool_) for rows in counted]
        # Answers that do not differ add nothing: their margin is 0 whatever the model says.
        scored = marks[0].sums() + marks[1].sums()
        scored[list(problems)] = 0
        longest = np.maximum(tokens[0].lengths, tokens[1].lengths)
        arrays: dict[str, np.ndarray] = {}
        for name, own, mark in zip(_SIDES, tokens, marks, strict=True):
            arrays |= {f"{name}_tokens": own.values, f"{name}_starts": own.starts,
                       f"{name}_counted": mark.values}  # fmt: skip
        if set(REFERENCE) <= set(fields.columns):
            known = fields.select(pl.col(REFERENCE).cast(pl.Float64).fill_null(float("nan")))
            arrays["reference"] = np.ascontiguousarray(known.to_numpy())
        return Encoded(
            lengths=2 * np.maximum(longest, 1),
            num_scored=scored,
            truncated=np.maximum(*whole) > self.max_tokens,
            arrays=arrays,
            problems=problems,
        )

    def collate(self, encoded: Encoded, indices: Sequence[int] | np.ndarray) -> Batch:
        """`input_ids` (B, 2, T), `targets` (B, 2, T - 1) and `reference` (B, 2), float64."""
        arrays = encoded.arrays
        rows: list[list[tuple[np.ndarray, np.ndarray]]] = []
        for index in indices:
            own: list[tuple[np.ndarray, np.ndarray]] = []
            for name in _SIDES:
                start, stop = arrays[f"{name}_starts"][index : index + 2]
                own.append(
                    (arrays[f"{name}_tokens"][start:stop], arrays[f"{name}_counted"][start:stop])
                )
            rows.append(own)
        batch = row_batch(rows, self._padding)
        if "reference" in arrays:
            batch["reference"] = torch.from_numpy(arrays["reference"][np.asarray(indices)])
        return batch

    def log_probabilities(self, model: nn.Module, batch: Batch, *, whole: bool = False) -> Tensor:
        """(B, 2) float64 log-probability of each answer, nats, over the tokens that count.

        Args:
            model: a causal language model.
            batch: from `collate`; `reference` is not needed.
            whole: with a graph, as gradients need.
        """
        given = rows_of(model, batch)
        rows = given.counted()[0]
        losses = _with_graph(model, given) if whole else _losses(model, given, whole=False)
        found = torch.zeros(len(given.targets), dtype=torch.float64, device=rows.device)
        return found.index_add(0, rows, -losses.double()).reshape(-1, 2)

    def logits_and_targets(self, model: nn.Module, batch: Batch) -> Flat:
        return self._flat(model, batch, whole=True)

    def pieces(self, model: nn.Module, batch: Batch) -> Iterator[Flat]:
        yield self._flat(model, batch, whole=False)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean of the examples' losses, in nats."""
        flat = self.logits_and_targets(model, batch)
        return functional.cross_entropy(flat.logits, flat.targets)

    def facts(self) -> dict[str, Any]:
        return {
            "max_tokens": self.max_tokens,
            "template": ChatEncoder(self.tokenizer, "all").digest,
        }

    def _flat(self, model: nn.Module, batch: Batch, *, whole: bool) -> Flat:
        if "reference" not in batch:
            raise InputError(
                "the reference's log-probabilities of the two answers are not there",
                fix="score through `curate score`, which measures them first, or add the columns"
                f" {' and '.join(REFERENCE)}",
            )
        gained = self.log_probabilities(model, batch, whole=whole) - batch["reference"]  # (B, 2)
        margin = self.settings.beta * (gained[:, 0] - gained[:, 1])
        # The difference is taken in float64, as the sums may be far larger than it.
        kind = next(model.parameters()).dtype
        margin = margin if kind == torch.float64 else margin.float()
        logits = torch.stack([margin, torch.zeros_like(margin)], 1)
        examples = torch.arange(len(logits), device=logits.device)
        return Flat(logits, torch.zeros_like(examples), examples)

    def _side(
        self, fields: pl.DataFrame, name: str, problems: dict[int, str]
    ) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
        """Tokens of the prompt and one answer, which of them count, and how many there were."""
        if isinstance(fields[name].dtype, pl.List):
            ids, counted, found = ChatEncoder(self.tokenizer, "all").encode(_chats(fields, name))
            problems.update({index: why for index, why in found.items() if index not in problems})
        else:
            ids, counted = self._texts(fields, name)
        lengths = np.array([len(row) for row in ids], dtype=np.int64)
        limit = self.max_tokens
        return [row[:limit] for row in ids], [row[:limit] for row in counted], lengths

    def _texts(self, fields: pl.DataFrame, name: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
        token = self.tokenizer.bos_token_id
        first = np.array([] if token is None else [token], dtype=np.int32)
        answers = self._ids(fields[name])
        prompts = [np.zeros(0, dtype=np.int32)] * len(answers)
        if "prompt" in fields.columns:
            prompts = self._ids(fields["prompt"])
        ids = [np.concatenate([first, *pair]) for pair in zip(prompts, answers, strict=True)]
        given = [max(1, len(first) + len(prompt)) for prompt in prompts]
        marks = [np.arange(len(row)) >= start for row, start in zip(ids, given, strict=True)]
        return ids, marks

    def _ids(self, texts: pl.Series) -> list[np.ndarray]:
        return token_ids(self.tokenizer, texts.fill_null("").to_list(), limit=self.max_tokens)


def _losses(model: nn.Module, given: Rows, *, whole: bool) -> Tensor:
    """(M,) loss of each counted token, from logits that exist all at once or some at a time."""
    rows, columns, targets, owner = given.counted()
    found = [targets.new_zeros(0, dtype=torch.float32)]
    start = 0
    for logits in counted_logits(model, given.inputs, rows, columns, whole=whole, owner=owner):
        chosen = targets[start : start + len(logits)]
        found.append(functional.cross_entropy(logits, chosen, reduction="none"))
        start += len(logits)
    return torch.cat(found)


def _with_graph(model: nn.Module, given: Rows) -> Tensor:
    """(M,) loss of each counted token; of a large vocabulary no logits are kept."""
    rows, columns, targets, owner = given.counted()
    before = counted_states(model, given.inputs, rows, columns)
    if before is None:
        return _losses(model, given, whole=True)
    if any(parameter.requires_grad for parameter in before.head.parameters()):
        return plain_losses(before.head, before.states, targets)  # in training
    return softmax_losses(before.head, first_sweep(before.head, before.states, targets, owner))


def _chats(fields: pl.DataFrame, name: str) -> pl.DataFrame:
    """The prompt's messages and the answer's as one chat, with the columns that name the row."""
    chats = fields[name]
    if "prompt" in fields.columns:
        chats = fields.select(pl.concat_list(pl.col("prompt", name).fill_null([]))).to_series()
    keys = [column for column in ("source", "file", "row") if column in fields.columns]
    return fields.with_columns(chats.alias("messages")).select(*keys, "messages")


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens both begin with."""
    length = min(len(one), len(other))
    differing = np.flatnonzero(one[:length] != other[:length])
    return int(differing[0]) if len(differing) else length
