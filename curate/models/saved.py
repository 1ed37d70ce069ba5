"""What is in a saved model's folder: configuration, weights, and a digest of both."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from curate.data.files import digest_file, fingerprint
from curate.errors import ConfigError, InputError
from curate.models.settings import Model
from curate.models.tokens import looks_like_path, tokenizer_digest

_UNIMPORTANT = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "longformer")
_ROTARY_FIELDS = ("rope_theta", "rope_parameters", "rope_scaling")


def model_folder(model: Model) -> Path:
    """The local folder of `model.name`, fetched from the hub where it is no folder.

    Raises:
        ConfigError: the settings name no model.
        InputError: it is neither a folder nor on the hub.
    """
    if model.name is None:
        raise ConfigError(
            "no model is set, or it is made from scratch and nothing trains it",
            fix="set model.name to a folder or hub id, or set checkpoints.train",
        )
    folder = Path(model.name).expanduser()
    if folder.is_dir():
        return folder
    if looks_like_path(model.name):
        raise InputError(f"there is no model folder {model.name}", fix="check model.name")
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(model.name, revision=model.revision, allow_patterns=_HUB_FILES)
    except Exception as error:  # the hub's client raises its own, requests' and plain OSErrors
        raise InputError(
            f"the model {model.name} is no folder and could not be fetched from the hub:"
            f" {str(error).strip().splitlines()[0]}",
            fix="check model.name, the network, and HF_TOKEN for a gated model",
        ) from error
    return Path(found)


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a saved model.

    Raises:
        InputError: it is missing or no JSON.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise InputError(f"there is no model folder {folder}", fix="check the path")
    if not path.exists():
        if (folder / "adapter_config.json").exists():
            weights_files(folder)
        raise InputError(
            f"{folder} holds no config.json", fix="name a folder saved with save_pretrained"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"{path} is not valid JSON: {error}", fix="save the model again"
        ) from error


def model_digest(folder: Path, tokenizer: Any | None = None) -> str:
    """32 hexadecimal digits for a saved model: its configuration, weights and tokenizer.

    Names, versions and the type on disk do not matter, the values do.
    """
    config = {k: v for k, v in read_config(folder).items() if k not in _UNIMPORTANT}
    return fingerprint(
        config=config,
        weights=[digest_file(path) for path in weights_files(folder)],
        tokenizer=tokenizer_digest(tokenizer) if tokenizer is not None else None,
    )


def weights_files(folder: Path) -> list[Path]:
    """The safetensors files of a saved model, in order.

    Raises:
        InputError: there are none, or one that the index names is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names: Iterable[str] = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    files = [folder / name for name in names]
    missing = [path for path in files if not path.exists()]
    if not missing:
        return files
    if list(folder.glob("*.bin")) + list(folder.glob("*.pt")):
        raise InputError(
            f"{folder} holds its weights as pickles, which can run code when they are read",
            fix="load it where you trust it and save it with save_pretrained (safetensors)",
        )
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{folder} holds an adapter, not a model",
            fix="set model.name to the model under it and model.adapter to this folder, or merge"
            " the two with merge_and_unload() and save that",
        )
    raise InputError(
        f"{missing[0]} is missing", fix="save the model with save_pretrained, or check model.name"
    )


def max_positions(model: nn.Module) -> int | None:
    """The longest input of a model with learned positions; None for any other."""
    config = getattr(model, "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or any(hasattr(config, field) for field in _ROTARY_FIELDS):
        return None
    if getattr(config, "model_type", "") in _OFFSET_POSITIONS:
        return limit - int(getattr(config, "pad_token_id", None) or 0) - 1
    return limit
