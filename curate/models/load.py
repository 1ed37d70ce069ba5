"""Models: loaded from a folder or the hub, or made from scratch; named by a digest of the weights.

Weights come from safetensors only, and no code of a model's repository is run.
"""

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn

from curate.config import plain, resolve
from curate.data.files import fingerprint
from curate.errors import ConfigError, InputError
from curate.models.adapters import (
    adapter_folder,
    add_lora,
    base_folder,
    kept_modules,
    load_adapter,
    measurer_digest,
    tokenizer_folder,
)
from curate.models.devices import loading_options, pick_device
from curate.models.image_models import check_image_model, warn_of_other_pixels
from curate.models.own import OWN, is_own
from curate.models.saved import (
    max_positions,
    model_digest,
    model_folder,
    read_config,
    weights_files,
)
from curate.models.scratch import build_model
from curate.models.settings import TASKS, ImageClassification, Model, TabularClassification
from curate.models.sharded import is_placed, main_device
from curate.models.tasks import task_class
from curate.models.tokens import load_tokenizer

__all__ = [
    "LoadedModel",
    "build_model",
    "load_cached",
    "load_model",
    "max_positions",
    "model_digest",
    "model_folder",
    "pick_device",
    "tokenizer_of",
]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to measure, in eval mode on its device."""

    model: nn.Module
    tokenizer: Any | None
    digest: str
    """Of configuration, weights and tokenizer: 32 hexadecimal digits."""
    max_positions: int | None
    """Longest input that the model can take; None where there is no limit."""
    device: torch.device


def load_model(
    model: Model,
    task: Any,
    *,
    checkpoint: Path | None = None,
    head_seed: int | None = None,
    dtype: str | None = None,
) -> LoadedModel:
    """A model from a folder or the hub.

    Args:
        model: settings; all but `config` are read.
        task: settings of the task, which say what kind of model it is and how many classes.
        checkpoint: a folder to load in place of `model.name`, or an adapter to put on it.
        head_seed: a classifier without a head for these classes gets a fresh one from this seed,
            to be trained; None refuses it, as its scores would be random.
        dtype: of the weights in place of `model.dtype`.

    Raises:
        InputError: no such model, no safetensors, no tokenizer, or the files cannot be read.
        ConfigError: the model does not fit the task.
        MissingDependencyError: the settings ask for a GPU or a library that is not there.
    """
    device = pick_device(model.device)
    folder = checkpoint or model_folder(model)
    base = base_folder(model, folder)
    config = read_config(base)
    if checkpoint is not None:
        _check_same_kind(model, config, folder)
    kind = task_class(task)
    if is_own(config):
        _refuse_for_own(model)
        loaded: nn.Module = _own_network(config, task, folder)
        loaded = loaded.to(getattr(torch, dtype or model.dtype))
        return LoadedModel(loaded.to(device).eval(), None, model_digest(folder), None, device)
    if isinstance(task, TabularClassification):
        raise ConfigError(
            f"{folder} holds a {config.get('model_type')} model, which does not read tables",
            fix="set model.config to {model_type: mlp, hidden: [64]}, or change task.kind",
        )
    tokenizer = tokenizer_of(model, folder) if kind.needs_tokenizer else None
    weights_files(base)
    adapter = adapter_folder(model, folder)
    loaded, fresh = _from_pretrained(
        kind,
        base,
        task,
        head_seed,
        options=loading_options(model, dtype or model.dtype),
        covered=() if adapter is None else kept_modules(adapter),
    )
    _check_vocabulary(loaded, tokenizer, folder)
    if isinstance(task, ImageClassification):
        check_image_model(loaded, task, str(folder))
        warn_of_other_pixels(folder, task)
    _set_padding(loaded, tokenizer)
    if adapter is not None:
        load_adapter(loaded, adapter)
    elif model.lora is not None:
        add_lora(loaded, model.lora, seed=head_seed or 0, kind=task.kind, kept=fresh)
    elif model.quantize is not None:
        loaded.requires_grad_(False)
    if is_placed(loaded):
        device = main_device(loaded)
    else:
        loaded = loaded.to(device)
    return LoadedModel(
        loaded.eval(),
        tokenizer,
        measurer_digest(model, folder, tokenizer),
        max_positions(loaded),
        device,
    )


def tokenizer_of(model: Model, folder: Path) -> Any:
    """The tokenizer in the model's folder, or the one that `model.tokenizer` names.

    Raises:
        InputError: there is none.
    """
    if isinstance(model.tokenizer, str):
        return load_tokenizer(model.tokenizer)
    return load_tokenizer(tokenizer_folder(model, folder))


_BLOCK = re.compile(r".*?\.\d+\.")
"""A parameter's name as far as the number of its block."""

_last: dict[str, LoadedModel] = {}


def load_cached(model: Model, task: Any, *, checkpoint: Path | None, digest: str) -> LoadedModel:
    """`load_model`, remembering the last model: a worker builds its model once, not per task.

    Args:
        model: settings of the model.
        task: settings of the task.
        checkpoint: a folder to load in place of `model.name`.
        digest: of the files, so that a folder whose content has changed is read again.
    """
    key = fingerprint(model=plain(model), task=plain(task), folder=str(checkpoint), digest=digest)
    if key not in _last:
        _last.clear()  # before loading: two models may not fit
        _last[key] = load_model(model, task, checkpoint=checkpoint)
    return _last[key]


def _own_network(config: dict[str, Any], task: Any, folder: Path) -> nn.Module:
    """A small network of our own, where it suits the task."""
    network, suits = OWN[config["model_type"]]
    loaded = network.from_pretrained(folder)
    if task.kind in TASKS and task.kind != suits:
        raise ConfigError(
            f"{folder} holds a network for {suits}, but task.kind is {task.kind}",
            fix=f"set task.kind to {suits}, or name another model",
        )
    _check_classes(config["num_classes"], task, folder)
    channels = getattr(task, "channels", None)
    if config.get("channels", channels) != channels:
        raise ConfigError(
            f"the network in {folder} reads {config['channels']} channels, but task.channels is"
            f" {channels}",
            fix=f"set task.channels to {config['channels']}",
        )
    return loaded


def _refuse_for_own(model: Model) -> None:
    for field in ("adapter", "lora", "quantize", "device_map"):
        if getattr(model, field) is not None:
            raise ConfigError(
                f"model.{field} is set, but the model is a small network of ours",
                fix=f"remove model.{field}",
            )


def _from_pretrained(
    kind: Any,
    folder: Path,
    task: Any,
    head_seed: int | None,
    *,
    options: dict[str, Any],
    covered: Collection[str],
) -> tuple[nn.Module, list[str]]:
    """The model, and its modules that are new; those in `covered` come with an adapter."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # bars belong to the command line
    auto = resolve({}, kind.model_class, what="model class")
    if hasattr(task, "num_classes") and (head_seed is not None or covered):
        options |= {"num_labels": task.num_classes, "ignore_mismatched_sizes": True}
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(head_seed or 0)
            model, report = auto.from_pretrained(
                str(folder),
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"the model in {folder} cannot be loaded for task {task.kind}:"
            f" {(str(error).strip().splitlines() or [type(error).__name__])[0]}",
            fix="check that the folder was saved by transformers and suits the task",
        ) from error
    if hasattr(task, "num_classes") and head_seed is None and not covered:
        _check_classes(model.config.num_labels, task, folder)
    missing = sorted(str(key) for key in report["missing_keys"])
    missing += sorted(str(key[0]) for key in report.get("mismatched_keys", ()))
    _check_architecture(model, missing, sorted(map(str, report["unexpected_keys"])), folder)
    fresh = sorted({key.rpartition(".")[0] for key in missing})
    random = [key for key in missing if not _is_covered(key, covered)]
    if random and head_seed is None:
        raise InputError(
            f"the model in {folder} has no weights for {random[0]}"
            + (f" and {len(random) - 1} more" if len(random) > 1 else "")
            + f", so its scores for task {task.kind} would be random",
            fix="fine-tune it first (checkpoints.train), or name a model trained for this task",
        )
    return model, fresh


def _check_same_kind(model: Model, config: Mapping[str, Any], folder: Path) -> None:
    """Refuse a checkpoint of another kind than the model of the settings."""
    wanted: str | None = None
    if model.config is not None:
        wanted = model.config.get("model_type")
    elif model.name is not None and (Path(model.name) / "config.json").is_file():
        wanted = read_config(Path(model.name)).get("model_type")
    found = config.get("model_type")
    if wanted is not None and found != wanted:
        raise ConfigError(
            f"the checkpoint {folder} is a {found} model, but the model of the settings is a"
            f" {wanted} one",
            fix="name the model that it was trained from, or leave the checkpoint out",
        )


def _check_architecture(
    model: nn.Module, missing: Sequence[str], unexpected: Sequence[str], folder: Path
) -> None:
    """Refuse weights of another model than `config.json` says; a head may be missing or too many.

    Blocks that the model does not have would be left out without a word, and a body without weights
    would be a random one.
    """
    own = set(model.state_dict())
    blocks = {found[0] for key in own if (found := _BLOCK.match(key))}
    lists = {block.rstrip(".").rpartition(".")[0] for block in blocks}
    extra = [
        key for key in unexpected
        if (found := _BLOCK.match(key)) and found[0] not in blocks
        and found[0].rstrip(".").rpartition(".")[0] in lists
    ]  # fmt: skip
    if not extra and 2 * len(missing) <= len(own):
        return
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    first = f"{extra[0]} has no place in it" if extra else f"it has no weights for {missing[0]}"
    raise InputError(
        f"the weights in {folder} are not those of the {kind} model that its config.json describes:"
        f" {first}",
        fix="save the weights and the config.json of one model together",
    )


def _is_covered(key: str, modules: Collection[str]) -> bool:
    """Whether a parameter is in one of the modules, named by the end of their names as in peft."""
    place = key.rpartition(".")[0]
    return any(f".{name}." in f".{place}." for name in modules)


def _check_classes(found: int, task: Any, folder: Path) -> None:
    if found != getattr(task, "num_classes", found):
        raise ConfigError(
            f"the model in {folder} has {found} classes, but task.num_classes is"
            f" {task.num_classes}",
            fix=f"set task.num_classes to {found}, or train a model for these classes",
        )


def _check_vocabulary(model: nn.Module, tokenizer: Any | None, folder: Path) -> None:
    """A token number beyond the embedding would end in an IndexError, or on a GPU in a crash."""
    if tokenizer is None:
        return
    rows = cast(Any, model).get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model in {folder} knows {rows}",
            fix="use the tokenizer that the model was trained with",
        )


def _set_padding(model: nn.Module, tokenizer: Any | None) -> None:
    """Sequence classifiers of the GPT kind find the last token of a text by the padding token."""
    config = cast(Any, model).config
    if tokenizer is not None and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
