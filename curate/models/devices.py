"""Where a model goes, and in how many bits."""

import importlib.util
from typing import Any

import torch

from curate.errors import ConfigError, MissingDependencyError
from curate.models.elsewhere import are_elsewhere, have_gpus
from curate.models.settings import Model


def pick_device(name: str) -> torch.device:
    """The device that a setting stands for; auto takes a GPU where there is one.

    Where the work is done by others (`curate.models.elsewhere`), theirs counts.

    Raises:
        ConfigError: it is no device.
        MissingDependencyError: it asks for a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if have_gpus() or torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"there is no device {name!r}", fix="use auto, cpu or cuda") from error
    if are_elsewhere():
        return device
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MissingDependencyError(
            f"model.device is {name}, but this machine has {torch.cuda.device_count()} GPUs",
            fix="set model.device to auto or cpu, or install torch for your GPU",
        )
    return device


def loading_options(model: Model, dtype: str) -> dict[str, Any]:
    """What `from_pretrained` is told about type, bits and place of the weights."""
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if model.device_map is not None:
        options["device_map"] = model.device_map
    if model.quantize is None:
        return options
    if not torch.cuda.is_available():
        raise MissingDependencyError(
            f"model.quantize is {model.quantize}, which needs a GPU, and this machine has none",
            fix="remove model.quantize",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingDependencyError(
            f"model.quantize is {model.quantize}, but bitsandbytes is not installed",
            fix="pip install 'curate-data[quantize]'",
        )
    options["quantization_config"] = quantization(model.quantize, options["dtype"])
    options.setdefault("device_map", {"": str(pick_device(model.device))})
    return options


def quantization(bits: str, dtype: torch.dtype) -> Any:
    """The settings of transformers for a model in `4bit` or `8bit` that computes in `dtype`."""
    from transformers import BitsAndBytesConfig

    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
