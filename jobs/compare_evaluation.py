"""Measuring a trained model on the examples that were chosen, part by part.

Shapes: N examples of a partition.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import nn

from curate.config import plain
from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.data.tables import read_table
from curate.models.quantities import measure
from curate.models.tasks import Encoded, Task
from jobs.compare_examples import evaluation_output
from jobs.fields import example_fields
from jobs.lengths import content_settings
from jobs.settings import Settings, task_settings
from jobs.target import target_folder, target_settings
from jobs.training_work import Workshop


@dataclass(frozen=True, slots=True)
class Measured:
    """One number that a trained model was given."""

    part: str
    """held_out, target, worst_domain, worst_class, `domain: NAME` or `class: N`."""
    metric: str
    """accuracy, loss (nats per counted token or per example) or bits_per_byte."""
    value: float
    num_examples: int


def evaluate(shop: Workshop, model: nn.Module, batch_tokens: int) -> list[Measured]:
    """Measure a trained model on the chosen examples, part by part."""
    device = next(model.parameters()).device
    model.eval()
    frames: list[pl.DataFrame] = []
    for entry in _encoded(shop):
        with torch.no_grad():
            found, _ = measure(
                model, shop.task, entry.encoded, batch_tokens=batch_tokens, device=device
            )
        frames.append(
            entry.rows.with_columns(
                mean_loss=pl.Series(found["loss"].double().numpy()),
                correct=pl.Series(found["correct"].double().numpy()),
                counted=pl.Series(entry.counted, dtype=pl.Float64),
                num_bytes=pl.Series(entry.num_bytes, dtype=pl.Float64),
            )
        )
    table = pl.concat(frames).filter(pl.col("counted") > 0)
    return summarise(table, is_classification=has_classes(shop.settings))


def has_classes(settings: Settings) -> bool:
    """Whether examples have one class each, so that there is an accuracy to speak of."""
    return hasattr(task_settings(settings), "num_classes")


def summarise(table: pl.DataFrame, *, is_classification: bool) -> list[Measured]:
    """Numbers of each part from those of the examples.

    Args:
        table: `where`, `domain`, `label`, `weight`, `mean_loss` (NaN where the model is broken),
            `correct`, `counted` positions, `num_bytes` of the text they stand for (0: unknown).
        is_classification: accuracy and loss per example; else nats per token, bits per byte.
    """
    found: list[Measured] = []
    held_out = table.filter(pl.col("where") == "held_out")
    target = table.filter(pl.col("where") == "target")
    if held_out.height:
        found += _means("held_out", held_out, is_classification)
        domains = _by("domain", held_out, is_classification)
        found += domains + _worst("worst_domain", domains)
    if is_classification:
        classes = _by("label", target if target.height else held_out, is_classification)
        found += classes + _worst("worst_class", classes)
    if target.height:
        found += _means("target", target, is_classification)
    return found


def _by(column: str, table: pl.DataFrame, is_classification: bool) -> list[Measured]:
    word = "domain" if column == "domain" else "class"
    return [
        entry
        for (value,), own in table.sort(column).group_by(column, maintain_order=True)
        if value is not None
        for entry in _means(f"{word}: {value}", own, is_classification)
    ]


def _worst(name: str, entries: Sequence[Measured]) -> list[Measured]:
    found: list[Measured] = []
    for metric in dict.fromkeys(entry.metric for entry in entries):
        own = [entry for entry in entries if entry.metric == metric]
        values = [entry.value for entry in own]
        value = min(values) if metric == "accuracy" else max(values)
        if any(math.isnan(entry) for entry in values):
            value = math.nan
        count = next((e.num_examples for e in own if e.value == value), 0)
        found.append(Measured(name, metric, value, count))
    return found


def _means(part: str, table: pl.DataFrame, is_classification: bool) -> list[Measured]:
    weight = table["weight"].to_numpy()
    loss, counted = table["mean_loss"].to_numpy(), table["counted"].to_numpy()
    rows = table.height
    if is_classification:
        total = weight.sum()
        accuracy = float((weight * table["correct"].to_numpy()).sum() / total)
        mean = float((weight * loss).sum() / total)
        return [Measured(part, "accuracy", accuracy, rows), Measured(part, "loss", mean, rows)]
    nats = float((weight * loss * counted).sum())
    tokens, size = float((weight * counted).sum()), table["num_bytes"].to_numpy()
    found = [Measured(part, "loss", nats / tokens, rows)]
    if (size > 0).all():
        bits = nats / math.log(2) / float((weight * size).sum())
        found.append(Measured(part, "bits_per_byte", bits, rows))
    return found


@dataclass(frozen=True, slots=True)
class _Entry:
    """The chosen examples of one partition."""

    rows: pl.DataFrame
    encoded: Encoded
    counted: np.ndarray
    """(N,) positions that count."""
    num_bytes: np.ndarray
    """(N,) bytes of the text that those positions spell; 0 where that is not known."""


def _encoded(shop: Workshop) -> list[_Entry]:
    mark = evaluation_output(shop.run).mark()
    assert mark is not None
    return _encode_once(_Key(shop, mark["digest"]))


class _Key:
    """A workshop as a key: equal where the encoding is."""

    def __init__(self, shop: Workshop, digest: str) -> None:
        self.shop = shop
        settings = shop.settings
        self._key = json.dumps(
            [
                digest,
                str(shop.run.root),
                settings.task,
                plain(settings.model),
                {name: content_settings(source) for name, source in settings.sources.items()},
            ],
            sort_keys=True,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other._key == self._key

    def __hash__(self) -> int:
        return hash(self._key)


@lru_cache(maxsize=1)
def _encode_once(key: _Key) -> list[_Entry]:
    """Encoded once in a process: all arms and seeds are measured on the same examples."""
    shop = key.shop
    table = read_table(evaluation_output(shop.run).path)
    found: list[_Entry] = []
    for where, folder, part in _partitions(shop):
        rows = table.filter((pl.col("where") == where) & (pl.col("partition") == part.name))
        if not rows.height:
            continue
        settings = target_settings(shop.settings) if where == "target" else shop.settings
        fields = example_fields(settings, folder, part)
        encoded = shop.task.encode(fields[rows["position"].to_numpy()])
        found.append(_Entry(rows, encoded, _counted(shop.task, encoded), _bytes(shop, encoded)))
    return found


def _partitions(shop: Workshop) -> Iterable[tuple[str, RunFolder, Partition]]:
    for part in shop.partitions:
        yield "held_out", shop.run, part
    if shop.settings.target is not None:
        folder = target_folder(shop.run)
        for part in folder.partitions():
            yield "target", folder, part


def _counted(task: Task, encoded: Encoded) -> np.ndarray:
    """(N,) how many positions the loss of each example is a mean over."""
    if "counted" in encoded.arrays:  # a language model; others have one position an example
        return encoded.num_scored.astype(np.float64)
    return (encoded.num_scored > 0).astype(np.float64)


def _bytes(shop: Workshop, encoded: Encoded) -> np.ndarray:
    """(N,) bytes of the text that the counted tokens spell."""
    counted = encoded.arrays.get("counted")
    if counted is None or shop.tokenizer is None:
        return np.zeros(len(encoded))
    tokens, starts = encoded.arrays["tokens"], encoded.arrays["starts"]
    sizes: list[int] = []
    for start, end in pairwise(starts.tolist()):
        own = tokens[start:end][counted[start:end]]
        sizes.append(len(shop.tokenizer.decode(own.tolist(), skip_special_tokens=True).encode()))
    return np.array(sizes, dtype=np.float64)


def results_as_json(entries: Iterable[Measured]) -> list[dict[str, Any]]:
    """JSON values; a number that is not finite becomes null."""
    return [
        {**asdict(entry), "value": entry.value if math.isfinite(entry.value) else None}
        for entry in entries
    ]
