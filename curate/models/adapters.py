"""Low-rank adapters on a frozen model, by peft: loaded, made afresh, saved.

The adapter's layers are put into the model itself, which keeps its class and the names of its own
parameters. Only the adapter, and a classifier's head that was made with it, require gradients: they
alone are measured, trained and saved. A saved adapter is a folder of peft's own form, with the
model's `config.json` beside it; it loads with `PeftModel.from_pretrained` too.
"""

import json
import warnings
from collections.abc import Collection, Iterable
from enum import Enum
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from curate.config import plain
from curate.data.files import digest_file, fingerprint
from curate.errors import ConfigError, InputError, MissingDependencyError
from curate.models.saved import model_digest, model_folder
from curate.models.settings import LoRA, Model

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
"""Before every name in a saved adapter."""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and not the model under it."""
    return (folder / _CONFIG).exists() and not any(
        (folder / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")
    )


def base_folder(model: Model, folder: Path) -> Path:
    """The folder of the frozen model: the settings' own where `folder` holds an adapter only.

    Raises:
        InputError: `model.name` is an adapter itself.
    """
    if not is_adapter(folder):
        return folder
    base = model_folder(model)
    if is_adapter(base):
        raise InputError(
            f"{base} holds an adapter, not a model",
            fix="set model.name to the model under it and model.adapter to this folder,"
            " or merge the two with merge_and_unload() and save that",
        )
    return base


def adapter_folder(model: Model, folder: Path) -> Path | None:
    """The adapter that goes on the model: `folder` itself, or the one that the settings name.

    Raises:
        InputError: the settings name a folder that holds none.
    """
    if is_adapter(folder):
        return folder
    if model.adapter is None:
        return None
    named = Path(model.adapter).expanduser()
    if not (named / _CONFIG).exists():
        raise InputError(
            f"there is no adapter in {named}: it holds no {_CONFIG}",
            fix="name a folder that peft's save_pretrained wrote, or a checkpoint of a run",
        )
    return named


def tokenizer_folder(model: Model, folder: Path) -> Path:
    """Where the tokenizer is: beside the adapter, or else beside the model under it."""
    if is_adapter(folder) and not (folder / "tokenizer_config.json").exists():
        return base_folder(model, folder)
    return folder


def measurer_digest(model: Model, folder: Path, tokenizer: Any | None = None) -> str:
    """`model_digest`, and what is on top of the saved model: an adapter, fewer bits.

    Without these it is `model_digest` itself.
    """
    found = model_digest(base_folder(model, folder), tokenizer)
    more = adapter_facts(model, folder)
    return fingerprint(base=found, **more) if more else found


def adapter_facts(model: Model, folder: Path) -> dict[str, Any]:
    """What is on top of a saved model, for fingerprints; empty where nothing is."""
    facts: dict[str, Any] = {}
    adapter = adapter_folder(model, folder)
    if adapter is not None:
        facts["adapter"] = [digest_file(adapter / _CONFIG), digest_file(_weights(adapter))]
    elif model.lora is not None:
        facts["lora"] = plain(model.lora)
    if model.quantize is not None:
        facts["quantize"] = model.quantize
    return facts


def kept_modules(adapter: Path) -> list[str]:
    """Modules that an adapter brings whole, such as a classifier's head."""
    return list(_read_config(adapter).get("modules_to_save") or [])


def load_adapter(model: nn.Module, adapter: Path) -> None:
    """Put a saved adapter into its model and make it all that requires gradients.

    Args:
        model: as it was when the adapter was made, on any device.
        adapter: folder of peft's form.

    Raises:
        InputError: it is no safetensors file, of a kind that is no part of layers, or made for
            another model.
        ConfigError: some of the model's layers are on disk.
        MissingDependencyError: peft is not installed.
    """
    peft = _peft()
    _check_place(model)
    tensors = load_file(_weights(adapter))
    _read_config(adapter)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.PeftConfig.from_pretrained(str(adapter))
            config.inference_mode = False  # which would freeze the adapter
            peft.inject_adapter_in_model(config, model)
            given = {key.removeprefix(_PREFIX): value for key, value in tensors.items()}
            _check_names(model, given, adapter)
            peft.set_peft_model_state_dict(model, given)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise InputError(
            f"the adapter in {adapter} does not fit the model:"
            f" {(str(error).strip().splitlines() or [type(error).__name__])[0]}",
            fix="set model.name to the model that the adapter was made for",
        ) from error
    _settle(model)


def add_lora(model: nn.Module, lora: LoRA, *, seed: int, kind: str, kept: Collection[str]) -> None:
    """Put a fresh adapter into a model and make it all that requires gradients.

    Half of it is zero, so that the model computes what it did before.

    Args:
        model: on any device.
        lora: rank, scale, which layers.
        seed: of the other half.
        kind: `causal-lm` or a classification.
        kept: modules that are new too, and are trained and saved whole.

    Raises:
        ConfigError: no layer has a name that `targets` asks for, or some are on disk.
        MissingDependencyError: peft is not installed.
    """
    peft = _peft()
    _check_place(model)
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=sorted(lora.targets) or "all-linear",
        modules_to_save=sorted(kept) or None,
        task_type="CAUSAL_LM" if kind == "causal-lm" else "SEQ_CLS",
    )
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        raise ConfigError(
            f"no adapter fits: {str(error).strip().splitlines()[0]}",
            fix=f"name layers of this model in model.lora.targets, such as {_linear_names(model)}",
        ) from error
    _settle(model)


def has_adapter(model: nn.Module) -> bool:
    """Whether an adapter was put into the model."""
    return bool(getattr(model, "peft_config", None))


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write the adapter in a model, without the model, so that it loads on top of it again.

    Args:
        model: with an adapter.
        folder: gets the adapter's two files and the model's `config.json`.
    """
    state = _peft().get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {_PREFIX + key: value.detach().cpu().contiguous() for key, value in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    config = cast(Any, model).peft_config["default"].to_dict()
    # Sets have another order in every process.
    text = json.dumps(_sorted(config), indent=2, sort_keys=True)
    (folder / _CONFIG).write_text(text + "\n", encoding="utf-8")
    own = getattr(model, "config", None)
    if own is not None:
        own.save_pretrained(str(folder))


def _settle(model: nn.Module) -> None:
    """The adapter's weights of the type of the model's."""
    own = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    if own:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(own[0].dtype)


def _check_place(model: nn.Module) -> None:
    """peft puts an adapter where its layer's weights are, which must be somewhere."""
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise ConfigError(
            "an adapter cannot go on layers whose weights wait in memory or on disk",
            fix="give every layer a GPU in model.device_map, or load the model in fewer bits",
        )


def _check_names(model: nn.Module, given: Iterable[str], adapter: Path) -> None:
    """All that the adapter has is in it, and nothing else but weights of the model itself."""
    wanted = set(_peft().get_peft_model_state_dict(model, save_embedding_layers=False))
    lacking = sorted(wanted - set(given))
    odd = sorted(set(given) - wanted - set(model.state_dict()))
    for names, what in ((lacking, "lacks"), (odd, "has, and the model has not,")):
        if names:
            raise InputError(
                f"the adapter in {adapter} {what} {names[0]}"
                + (f" and {len(names) - 1} more" if len(names) > 1 else ""),
                fix="set model.name to the model that the adapter was made for",
            )


def _read_config(adapter: Path) -> dict[str, Any]:
    path = adapter / _CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = str(config["peft_type"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no settings of an adapter", fix="save it again") from error
    if "PROMPT" in kind or kind in ("PREFIX_TUNING", "P_TUNING", "ADAPTION_PROMPT"):
        raise InputError(
            f"the adapter in {adapter} is of kind {kind}, which is no part of the model's layers",
            fix="use LoRA or one of its relatives",
        )
    return config


def _weights(adapter: Path) -> Path:
    path = adapter / _WEIGHTS
    if path.exists():
        return path
    raise InputError(
        f"{adapter} holds no {_WEIGHTS}",
        fix="save the adapter with save_pretrained (safetensors, no pickle)",
    )


def _linear_names(model: nn.Module) -> str:
    names = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return ", ".join(list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))[:4])


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _sorted(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_sorted(entry) for entry in value]
    return value.value if isinstance(value, Enum) else value


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError(
            "model.adapter and model.lora need peft, which is not installed",
            fix="pip install 'curate-data[lora]'",
        ) from error
    return peft
