"""Models from scratch: a configuration of transformers, or a small network of our own."""

from collections.abc import Mapping
from typing import Any

import torch
import xxhash
from torch import nn

from curate.config import nearest, resolve
from curate.errors import ConfigError
from curate.models import cnn, mlp
from curate.models.image_models import check_image_model, set_image_fields
from curate.models.saved import max_positions
from curate.models.settings import ImageClassification, Model, TabularClassification
from curate.models.tasks import task_class


def build_model(
    model: Model, task: Any, tokenizer: Any | None, seed: int, *, num_features: int | None = None
) -> nn.Module:
    """A new model from `model.config`, its weights drawn from `seed`; on the CPU, float32.

    Args:
        model: settings; `config` is read.
        task: settings of the task.
        tokenizer: whose vocabulary the model gets; None for tables.
        seed: of the weights.
        num_features: for `model_type: mlp`, where `config` does not say it.

    Raises:
        ConfigError: `config` is missing, names no model type, or has an unknown field.
    """
    fields = dict(model.config or {})
    kind = _kind(fields)
    del fields["model_type"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(xxhash.xxh3_64_intdigest(f"weights/{seed}".encode()) >> 1)
        if kind == mlp.MODEL_TYPE:
            return _build_mlp(fields, task, num_features)
        if kind == cnn.MODEL_TYPE:
            return _build_cnn(fields, task)
        if isinstance(task, TabularClassification):
            raise ConfigError(
                f"model.config makes a {kind} model, which does not read tables",
                fix="set model.config to {model_type: mlp, hidden: [64]}",
            )
        return _build_transformer(kind, fields, task, tokenizer)


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a configuration for `build_model` by its names alone; no model is made.

    Raises:
        ConfigError: `config` names no known model type, or has an unknown field.
    """
    kind = _kind(config)
    fields = {key: value for key, value in config.items() if key != "model_type"}
    if kind == mlp.MODEL_TYPE:
        _check_mlp(fields)
    elif kind == cnn.MODEL_TYPE:
        _check_cnn(fields)
    else:
        _transformer_fields(kind, fields)


def _kind(config: Mapping[str, Any]) -> str:
    kind = config.get("model_type")
    if kind is None:
        raise ConfigError(
            "model.config names no model_type",
            fix="set it, as in model.config: {model_type: llama, hidden_size: 256}",
        )
    return kind


def _build_mlp(fields: Mapping[str, Any], task: Any, num_features: int | None) -> nn.Module:
    if isinstance(task, ImageClassification):
        raise ConfigError(
            "an mlp reads rows of numbers, but task.kind is image-classification",
            fix="set model.config to {model_type: cnn, widths: [16, 32]}",
        )
    _check_mlp(fields)
    features = fields.get("num_features", num_features)
    if features is None:
        raise ConfigError(
            "the number of features is not known", fix="set model.config.num_features"
        )
    return mlp.MLP(
        num_features=int(features),
        num_classes=task.num_classes,
        hidden=[int(width) for width in fields.get("hidden", (64,))],
    )


def _check_mlp(fields: Mapping[str, Any]) -> None:
    unknown = set(fields) - {"hidden", "num_features", "num_classes"}
    if unknown:
        raise ConfigError(
            f"unknown key model.config.{min(unknown)}", fix="known keys: model_type, hidden"
        )


def _check_cnn(fields: Mapping[str, Any]) -> None:
    known = ("widths", "hidden", "norm", "grid")
    for key in fields:
        if key not in known:
            raise ConfigError(
                f"unknown key model.config.{key}",
                fix=nearest(key, known) or "known keys: model_type, " + ", ".join(known),
            )


def _build_cnn(fields: Mapping[str, Any], task: Any) -> nn.Module:
    _check_cnn(fields)
    if not isinstance(task, ImageClassification):
        raise ConfigError(
            f"a cnn reads images, but task.kind is {task.kind}",
            fix="set task.kind to image-classification, or another model.config",
        )
    return cnn.CNN(channels=task.channels, num_classes=task.num_classes, **fields)


def _transformer_fields(kind: str, fields: Mapping[str, Any]) -> set[str]:
    """All that a configuration of this kind may have; those given are among them."""
    from transformers import AutoConfig

    try:
        known = set(AutoConfig.for_model(kind).to_dict())
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"model.config.model_type {kind!r} is not known to transformers",
            fix="use a name such as llama, gpt2, bert, vit; mlp for tables, cnn for images",
        ) from error
    known |= set(getattr(type(AutoConfig.for_model(kind)), "attribute_map", {}))
    for key in fields:
        if key not in known:
            raise ConfigError(
                f"unknown key model.config.{key}",
                fix=nearest(key, known) or f"see the fields of transformers' {kind} configuration",
            )
    return known


def _build_transformer(
    kind: str, fields: dict[str, Any], task: Any, tokenizer: Any | None
) -> nn.Module:
    from transformers import AutoConfig

    known = _transformer_fields(kind, fields)
    if tokenizer is not None:
        fields.setdefault("vocab_size", len(tokenizer))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            fields.setdefault(name, getattr(tokenizer, name))
        if fields["pad_token_id"] is None:
            fields["pad_token_id"] = tokenizer.eos_token_id
        if fields["vocab_size"] < len(tokenizer):
            raise ConfigError(
                f"model.config.vocab_size is {fields['vocab_size']}, but the tokenizer has"
                f" {len(tokenizer)} tokens",
                fix="remove model.config.vocab_size",
            )
    if isinstance(task, ImageClassification):
        set_image_fields(fields, known, task)
    if hasattr(task, "num_classes"):
        fields["num_labels"] = task.num_classes
    auto = resolve({}, task_class(task).model_class, what="model class")
    try:
        model: nn.Module = auto.from_config(AutoConfig.for_model(kind, **fields))
    except Exception as error:  # whatever a model's constructor says to sizes that do not fit
        raise ConfigError(
            f"transformers cannot make a {kind} model of model.config: {error}",
            fix="correct model.config",
        ) from error
    if isinstance(task, ImageClassification):
        check_image_model(model, task, "the model of model.config")
    limit = max_positions(model)
    wanted: int = getattr(task, "max_tokens", 0)
    if limit is not None and wanted > limit:
        raise ConfigError(
            f"task.max_tokens is {wanted}, but model.config allows {limit} positions",
            fix=f"set task.max_tokens to {limit}, or raise model.config.max_position_embeddings",
        )
    return model.float().eval()
