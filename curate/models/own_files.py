"""How the small networks of our own are saved: `config.json` and `model.safetensors`."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from curate.errors import ConfigError, InputError

Network = TypeVar("Network", bound=nn.Module)


def save_network(model: nn.Module, config: Mapping[str, Any], folder: str | Path) -> None:
    """Write what makes the network, and its weights."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(model.state_dict(), path / "model.safetensors", metadata={"format": "pt"})


def load_network(make: Callable[..., Network], folder: str | Path) -> Network:
    """What `save_network` wrote.

    Args:
        make: the class; called with the configuration, `model_type` left out.
        folder: where it lies.

    Raises:
        InputError: the files do not belong together.
    """
    path = Path(folder)
    try:
        config = json.loads((path / "config.json").read_text())
        config.pop("model_type", None)
        model = make(**config)
        model.load_state_dict(load_file(path / "model.safetensors"))
    except (OSError, TypeError, RuntimeError, ValueError, ConfigError, SafetensorError) as error:
        raise InputError(
            f"the model in {path} cannot be read: {error}",
            fix="train it again, or point to a folder with config.json and model.safetensors",
        ) from error
    return model
