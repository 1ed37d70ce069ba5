"""Classification of texts and of rows of numbers: one position per example, its class.

Shapes: N examples of a partition, B examples of a batch, T positions, F features, C classes.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

from curate.errors import ConfigError
from curate.models.settings import TabularClassification, TextClassification
from curate.models.tasks.protocol import Batch, Encoded, Flat
from curate.models.tasks.ragged import Ragged, pad
from curate.models.tokens import padding_id, token_ids


class TextTask:
    """One label per text, which the tokenizer's own special tokens surround."""

    model_class: ClassVar[str] = "transformers:AutoModelForSequenceClassification"
    needs_tokenizer: ClassVar[bool] = True

    def __init__(
        self, settings: TextClassification, tokenizer: Any, *, max_positions: int | None = None
    ) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.max_tokens = min(settings.max_tokens, max_positions or settings.max_tokens)
        self._padding = padding_id(tokenizer, needed=True)

    def encode(self, fields: pl.DataFrame) -> Encoded:
        labels = class_labels(fields, self.settings.num_classes)
        if "text" not in fields.columns:
            raise ConfigError(
                "task text-classification reads a text, but the source names no text column",
                fix="set sources.NAME.text to the column of the text",
            )
        texts = fields["text"].fill_null("").to_list()
        ids = token_ids(self.tokenizer, texts, special=True, limit=self.max_tokens)
        long = [index for index, row in enumerate(ids) if len(row) > self.max_tokens]
        for index in long:  # cut by the tokenizer, which keeps the closing special token
            cut = self.tokenizer(
                texts[index], truncation=True, max_length=self.max_tokens, verbose=False
            )
            ids[index] = np.array(cut["input_ids"], dtype=np.int32)
        truncated = np.zeros(len(ids), dtype=bool)
        truncated[long] = True
        tokens = Ragged.of(ids)
        return Encoded(
            lengths=np.maximum(tokens.lengths, 1),
            num_scored=np.where(labels >= 0, tokens.lengths, 0),
            truncated=truncated,
            arrays={"tokens": tokens.values, "starts": tokens.starts, "labels": labels},
            problems={},
        )

    def collate(self, encoded: Encoded, indices: Sequence[int] | np.ndarray) -> Batch:
        tokens = Ragged(encoded.arrays["tokens"], encoded.arrays["starts"])
        batch = pad(tokens, indices, self._padding)
        batch["labels"] = torch.from_numpy(encoded.arrays["labels"][np.asarray(indices)])
        return batch

    def logits_and_targets(self, model: nn.Module, batch: Batch) -> Flat:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return one_each(model(**inputs).logits, batch["labels"])

    def pieces(self, model: nn.Module, batch: Batch) -> Iterator[Flat]:
        yield self.logits_and_targets(model, batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        flat = self.logits_and_targets(model, batch)
        return functional.cross_entropy(flat.logits, flat.targets)

    def facts(self) -> dict[str, Any]:
        return {"max_tokens": self.max_tokens}


class TabularTask:
    """One label per row of numbers."""

    model_class: ClassVar[str] = "curate.models.mlp:MLP"
    needs_tokenizer: ClassVar[bool] = False

    def __init__(self, settings: TabularClassification, tokenizer: Any = None) -> None:
        self.settings = settings

    def encode(self, fields: pl.DataFrame) -> Encoded:
        labels = class_labels(fields, self.settings.num_classes)
        if "features" not in fields.columns:
            raise ConfigError(
                "task tabular-classification reads numbers, but the source names no features",
                fix="set sources.NAME.features to a list column or to the number columns",
            )
        features = _matrix(fields["features"]) * np.float32(self.settings.scale)
        usable = (labels >= 0) & np.isfinite(features).all(axis=1)
        return Encoded(
            lengths=np.ones(len(labels), dtype=np.int64),
            num_scored=usable.astype(np.int64),
            truncated=np.zeros(len(labels), dtype=bool),
            arrays={"features": features, "labels": labels},
            problems={},
        )

    def collate(self, encoded: Encoded, indices: Sequence[int] | np.ndarray) -> Batch:
        chosen = np.asarray(indices)
        arrays = encoded.arrays
        return {key: torch.from_numpy(arrays[key][chosen]) for key in ("features", "labels")}

    def logits_and_targets(self, model: nn.Module, batch: Batch) -> Flat:
        return one_each(model(batch["features"]), batch["labels"])

    def pieces(self, model: nn.Module, batch: Batch) -> Iterator[Flat]:
        yield self.logits_and_targets(model, batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        flat = self.logits_and_targets(model, batch)
        return functional.cross_entropy(flat.logits, flat.targets)

    def facts(self) -> dict[str, Any]:
        return {}


def one_each(logits: Tensor, labels: Tensor) -> Flat:
    """One counted position per example; half precision is raised before any softmax."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return Flat(logits, labels, torch.arange(len(labels), device=labels.device))


def class_labels(fields: pl.DataFrame, num_classes: int) -> np.ndarray:
    """(N,) int64 classes; -1 where there is none.

    Raises:
        ConfigError: there is no label column, or a label lies outside the classes.
    """
    if "label" not in fields.columns:
        raise ConfigError(
            "a classification task needs labels, but the source names no label column",
            fix="set sources.NAME.label to the column of the class",
        )
    labels = fields["label"].cast(pl.Int64).fill_null(-1).to_numpy()
    if len(labels) and labels.max() >= num_classes:
        raise ConfigError(
            f"label {labels.max()} does not exist: task.num_classes is {num_classes}",
            fix=f"set task.num_classes to {labels.max() + 1} or more, or correct the labels",
        )
    return np.ascontiguousarray(labels)


def _matrix(features: pl.Series) -> np.ndarray:
    """(N, F) float32; a null row or a null number becomes NaN.

    Raises:
        ConfigError: rows have different numbers of features.
    """
    if isinstance(features.dtype, pl.Array):
        features = features.arr.to_list()
    widths = features.list.len().drop_nulls().unique()
    if len(widths) > 1:
        raise ConfigError(
            f"rows have between {widths.min()} and {widths.max()} features",
            fix="give every row the same number of features",
        )
    width = int(widths[0]) if len(widths) else 0
    matrix = np.full((len(features), width), np.nan, dtype=np.float32)
    present = features.is_not_null().to_numpy()
    values = features.drop_nulls().explode(empty_as_null=False).cast(pl.Float32)
    matrix[present] = values.fill_null(float("nan")).to_numpy().reshape(-1, width)
    return matrix
