"""Does the engine compute a model as the model computes itself; for `curate doctor`.

Shapes: M counted positions, V classes or tokens.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor
from torch.nn import functional

from curate.config import gather, parse
from curate.errors import ConfigError
from curate.models.load import LoadedModel, load_model
from curate.models.settings import TASKS, Model
from curate.models.tasks import Flat, Task, build_task
from jobs.all_stages import load
from jobs.doctor import Check
from jobs.settings import parse_settings, task_settings
from jobs.starter import guess_task

_TEXTS = ("The quick brown fox jumps over the lazy dog, and nobody is surprised.", "It rained.")
_LARGEST = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
"""Differences of logits that rounding explains, by the type of the weights."""


def check_model(name: str | None, config: Path | None) -> Iterator[Check]:
    """Three checks on two short texts: own logits, own loss, padding.

    Args:
        name: folder or hub id; or
        config: settings whose model is checked.

    Raises:
        InputError: the model cannot be loaded.
        ConfigError: it is not one that reads texts.
    """
    model, task = _chosen(name, config)
    loaded = load_model(model, task)
    impl = build_task(task, loaded.tokenizer, max_positions=loaded.max_positions)
    labels = [0, 1 % getattr(task, "num_classes", 2)]
    fields = pl.DataFrame({"text": _TEXTS, "label": labels})
    with torch.no_grad():
        yield from _compare(loaded, impl, fields)


def _chosen(name: str | None, config: Path | None) -> tuple[Model, Any]:
    if config is None:
        assert name is not None
        kind = load(TASKS[guess_task(name, None)["kind"]])
        return Model(name=name), parse(kind, guess_task(name, None), where="task")
    raw = gather([config])
    settings = parse_settings(raw.values, origins=raw.origins)
    if settings.model.name is None and name is None:
        raise ConfigError(
            f"{config} makes its model from scratch: there is nothing to check yet",
            fix="train it, then check RUN/checkpoints/... with --model",
        )
    model = settings.model if name is None else Model(name=name)
    task = task_settings(settings)
    if task.kind == "tabular-classification":
        raise ConfigError("the check reads texts, the model reads tables", fix="leave it out")
    return model, task


def _compare(loaded: LoadedModel, task: Task, fields: pl.DataFrame) -> Iterator[Check]:
    encoded = task.encode(fields)
    limit = _LARGEST[next(loaded.model.parameters()).dtype]
    alone = [_flat(loaded, task, encoded, [index]) for index in range(fields.height)]
    own = [_own_logits(loaded, task, encoded, index) for index in range(fields.height)]
    yield _check("model: logits", "the engine's logits are the model's own", limit,
                 [(a.logits, b) for a, b in zip(alone, own, strict=True)])  # fmt: skip
    both = _flat(loaded, task, encoded, range(fields.height))
    padded = [both.logits[both.owner == index] for index in range(fields.height)]
    yield _check("model: padding", "a text gives the same alone and beside a longer one", limit,
                 [(a.logits, b) for a, b in zip(alone, padded, strict=True)])  # fmt: skip
    losses = [functional.cross_entropy(flat.logits, flat.targets).item() for flat in alone]
    text = f"{', '.join(f'{loss:.3f}' for loss in losses)} nats on two short English texts"
    finite = all(torch.tensor(losses).isfinite())
    yield Check("model: loss", "ok" if finite else "bad", text, "try model.dtype: float32")


def _check(name: str, what: str, limit: float, pairs: list[tuple[Tensor, Tensor]]) -> Check:
    if any(left.shape != right.shape for left, right in pairs):
        return Check(name, "bad", f"{what}: not so, even their shapes differ", "report it")
    worst = max(float((left - right).abs().max()) for left, right in pairs)
    text = f"{what}: they differ by at most {worst:.1e}"
    if worst <= limit:
        return Check(name, "ok", text)
    return Check(name, "bad", f"{text}, more than rounding explains", "report it with the model")


def _flat(loaded: LoadedModel, task: Task, encoded: Any, indices: Any) -> Flat:
    batch = task.collate(encoded, list(indices))
    return task.logits_and_targets(
        loaded.model, {key: value.to(loaded.device) for key, value in batch.items()}
    )


def _own_logits(loaded: LoadedModel, task: Task, encoded: Any, index: int) -> Tensor:
    """(M, V) what the model itself says of one text, without mask and padding."""
    tokens = task.collate(encoded, [index])["input_ids"].to(loaded.device)
    logits: Tensor = loaded.model(input_ids=tokens).logits.float()
    return logits[0, :-1] if logits.dim() == 3 else logits
