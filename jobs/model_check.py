"""Does the engine compute a model as the model computes itself; for `curate doctor`.

Shapes: M counted positions, V classes or tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch
from torch import Tensor
from torch.nn import functional

from curate.config import gather, nearest, parse
from curate.data.example import Source
from curate.data.layout import RunFolder
from curate.errors import ConfigError
from curate.models.checkpoints import list_checkpoints
from curate.models.cnn import MODEL_TYPE as CNN_TYPE
from curate.models.load import LoadedModel, load_model, model_folder
from curate.models.mlp import MODEL_TYPE as MLP_TYPE
from curate.models.saved import read_config
from curate.models.settings import TASKS, Model
from curate.models.tasks import Encoded, Flat, Task, build_task
from curate.models.tasks.preference import REFERENCE
from jobs.all_stages import load
from jobs.check_examples import given_examples, made_up_examples
from jobs.doctor import Check
from jobs.gradient_check import gradient_checks
from jobs.settings import Settings, parse_settings, task_settings
from jobs.starter import guess_task

_LARGEST = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
"""Differences of logits that rounding explains, by the type of the weights."""


def check_model(
    name: str | None, config: Path | None, *, kind: str | None = None, data: str | None = None
) -> Iterator[Check]:
    """Own logits, own loss, padding and gradients on a few examples, and what follows from it.

    Args:
        name: folder or hub id; or
        config: settings whose model is checked.
        kind: of the task, where the model does not say it.
        data: examples to check on; None makes some up.

    Raises:
        InputError: the model or the data cannot be loaded.
        ConfigError: the model does not say what task it is for, or there are no examples for it.
    """
    asked = asked_model(name, config, kind)
    task = asked.task
    if asked.checkpoint is not None:
        text = f"{asked.checkpoint}, the last one, as the settings make their model from scratch"
        yield Check("model: checkpoint", "ok", text)
    loaded = load_model(asked.model, task)
    impl = build_task(task, loaded.tokenizer, max_positions=loaded.max_positions)
    if data is None:
        fields = made_up_examples(loaded, task)
    else:
        fields = given_examples(data, asked.source)
        if getattr(impl, "needs_reference", False):  # any will do: gradients are to be compared
            fields = fields.with_columns(pl.lit(0.0).alias(each) for each in REFERENCE)
    encoded = impl.encode(fields)
    if not (encoded.num_scored > 0).all():
        why = next(iter(encoded.problems.values()), "nothing in it counts")
        raise ConfigError(
            f"an example to check on cannot be scored: {why}",
            fix="give examples of the task with --data FILE, and their columns with --config",
        )
    found: list[Check] = []
    for check in (*_forward(loaded, impl, encoded, task.kind),
                  *gradient_checks(loaded, impl, encoded)):  # fmt: skip
        found.append(check)
        yield check
    yield _verdict(found)


def _verdict(found: Sequence[Check]) -> Check:
    bad = [check.name.removeprefix("model: ") for check in found if check.state == "bad"]
    if not bad:
        return Check("model", "ok", "OK: the engine computes this model as it computes itself")
    return Check(
        "model", "bad", f"not OK: {', '.join(bad)}", "do not use its scores before that is clear"
    )


class Asked(NamedTuple):
    """What is to be checked."""

    model: Model
    task: Any
    """Its settings."""
    source: Source | None
    """Whose columns examples have."""
    settings: Settings | None
    """Where the model is named by these."""
    checkpoint: Path | None = None
    """The last one of the settings' run, where they name no model and it is taken."""


def asked_model(name: str | None, config: Path | None, kind: str | None) -> Asked:
    """The model, the settings of its task, and whose columns examples have.

    Of settings that make their model from scratch it is the last checkpoint of their run, of the
    first seed where there are several.

    Args:
        name: folder or hub id; or
        config: settings whose model is meant.
        kind: of the task, where the model does not say it.

    Raises:
        ConfigError: the settings name no model and their run has no checkpoint, or the model does
            not say its task.
    """
    if config is None:
        assert name is not None
        given = _task_of(name, kind)
        task = parse(load(TASKS[given["kind"]]), given, where="task")
        return Asked(Model(name=name), task, None, None)
    raw = gather([config])
    settings = parse_settings(raw.values, origins=raw.origins)
    checkpoint = None
    if settings.model.name is None and name is None:
        checkpoint = _last_checkpoint(config, settings)
        name = str(checkpoint)
    model = settings.model
    if name is not None:  # of the settings' own training, perhaps
        model = replace(model, name=name, config=None, revision=None)
    source = next(iter(settings.sources.values())) if len(settings.sources) == 1 else None
    return Asked(model, task_settings(settings), source, settings, checkpoint)


def _last_checkpoint(config: Path, settings: Settings) -> Path:
    if settings.checkpoints.train is None and settings.checkpoints.paths:
        return model_folder(Model(name=settings.checkpoints.paths[-1]))
    run = RunFolder(Path(settings.run).expanduser().absolute())
    found = list_checkpoints(run.checkpoints)
    if not found:
        raise ConfigError(
            f"{config} makes its model from scratch, and {run.root} has no checkpoint yet: there"
            " is nothing to check",
            fix=f"run `curate train {config}` first, or name a trained model with --model",
        )
    return [one for one in found if one.seed == found[0].seed][-1].path


def _task_of(name: str, kind: str | None) -> dict[str, Any]:
    """A task that fits a saved model: its kind and number of classes."""
    if kind is not None and kind not in TASKS:
        raise ConfigError(
            f"there is no task {kind!r}",
            fix=nearest(kind, TASKS) or "name a task of your own in settings, and use --config",
        )
    config = read_config(model_folder(Model(name=name)))
    architecture = str((config.get("architectures") or [""])[0])
    if kind is None and config.get("model_type") == MLP_TYPE:
        kind = "tabular-classification"
    if kind is None and (config.get("model_type") == CNN_TYPE
                         or architecture.endswith("ForImageClassification")):  # fmt: skip
        kind = "image-classification"
    found: dict[str, Any] = guess_task(name, kind) if kind is None else {"kind": kind}
    if hasattr(load(TASKS[found["kind"]]), "num_classes"):
        classes = config.get("num_classes") or len(config.get("id2label") or ()) or 2
        found["num_classes"] = classes
    if found["kind"] == "image-classification":
        channels = config.get("num_channels") or config.get("channels") or 3
        found |= {"channels": channels, "size": config.get("image_size")}
    return found


def _forward(loaded: LoadedModel, task: Task, encoded: Encoded, kind: str) -> Iterator[Check]:
    with torch.no_grad():
        yield from _compare(loaded, task, encoded, kind)


def _compare(loaded: LoadedModel, task: Task, encoded: Encoded, kind: str) -> Iterator[Check]:
    limit = _LARGEST[next(loaded.model.parameters()).dtype]
    rows = range(len(encoded))
    alone = [_flat(loaded, task, encoded, [index]) for index in rows]
    if kind in ("causal-lm", "text-classification"):
        own = [_own_logits(loaded, task, encoded, index) for index in rows]
        yield _check("model: logits", "the engine's logits are the model's own", limit,
                     [(a.logits, b) for a, b in zip(alone, own, strict=True)])  # fmt: skip
    both = _flat(loaded, task, encoded, rows)
    padded = [both.logits[both.owner == index] for index in rows]
    yield _check("model: padding", "an example gives the same alone and beside others", limit,
                 [(a.logits, b) for a, b in zip(alone, padded, strict=True)])  # fmt: skip
    losses = [functional.cross_entropy(flat.logits, flat.targets).item() for flat in alone]
    text = f"{', '.join(f'{loss:.3f}' for loss in losses)} nats on {len(encoded)} examples"
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
