"""Adam's moments beside a checkpoint: those that a run keeps, or a Trainer's `optimizer.pt`.

    moments.safetensors          of `checkpoints.train.save_moments`, by parameter name
    optimizer.pt, optimizer.bin  `state_dict()` of a PyTorch optimiser: by number, or by name

Files of PyTorch are read with `weights_only`: tensors and plain values, no code.
"""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from curate.data.files import misshapen, read_document
from curate.errors import InputError
from curate.models.adam import Moment
from curate.models.adam_names import names_of
from curate.models.checkpoints import MOMENTS

_NAMES = ("optimizer.pt", "optimizer.bin")
_PATTERNS = ("optimizer*.pt", "optimizer*.bin", "*_optimizer.pt", "*_optimizer.bin")


def moments_file(folder: Path) -> Path:
    """The file with the moments of a checkpoint.

    Args:
        folder: of the checkpoint.

    Raises:
        InputError: there is none, or there are several.
    """
    for name in (MOMENTS, *_NAMES):
        if (folder / name).is_file():
            return folder / name
    found = sorted({path for pattern in _PATTERNS for path in folder.glob(pattern)})
    files = [path for path in found if path.is_file()]
    if len(files) == 1:
        return files[0]
    if files:
        raise InputError(
            f"{folder} has more than one state of an optimiser: "
            + ", ".join(path.name for path in files),
            fix="keep one of them, as optimizer.pt; of a sharded state save the full one",
        )
    shards = [path for path in (*found, *folder.glob("global_step*")) if path.is_dir()]
    if shards:
        raise InputError(
            f"{shards[0]} holds the optimiser's state in shards (FSDP, DeepSpeed)",
            fix="save the full state by parameter name as optimizer.pt",
        )
    raise InputError(
        f"{folder} has no moments of Adam: neither {MOMENTS} nor {' nor '.join(_NAMES)}",
        fix="train with checkpoints.train.save_moments: true, or with save_only_model=False in a"
        " Trainer; or set adam: none",
    )


def read_moments(path: Path, model: nn.Module, names: Sequence[str]) -> dict[str, Moment]:
    """Moments of some parameters, float32 or float64 as the file has them.

    Args:
        path: as `moments_file` found it.
        model: of the same checkpoint; what was frozen in training is frozen.
        names: of its parameters.

    Raises:
        InputError: the file cannot be read, is of another model or of another kind of optimiser,
            or has no moments of a parameter.
    """
    own = path.suffix == ".safetensors"
    found = _kept(path, names) if own else _trained(path, model, set(names))
    parameters = dict(model.named_parameters())
    for name in names:
        if name not in found:
            raise InputError(
                f"{path} has no moments of {name}: it was frozen, or no batch has used it",
                fix="leave it out (layers: a pattern of the names that were trained)",
            )
        given = tuple(found[name].square.shape)
        if given != tuple(parameters[name].shape):
            raise InputError(
                f"{path}: the moments of {name} are {given}, the parameter is"
                f" {tuple(parameters[name].shape)}",
                fix="take the moments of the same model",
            )
        if not bool(found[name].square.any()):
            raise InputError(
                f"{path}: the moments of {name} are all 0, no batch has moved it yet",
                fix="take a later checkpoint, or leave the parameter out",
            )
    return {name: found[name] for name in names}


def _kept(path: Path, names: Sequence[str]) -> dict[str, Moment]:
    """Of a run's own checkpoint."""
    facts = read_document(path.parent / "checkpoint.json", step=int)
    if facts is None:
        raise misshapen(path, "there is no checkpoint.json beside it, which has the step")
    found: dict[str, Moment] = {}
    try:
        with safe_open(path, framework="pt") as file:
            known = set(file.keys())
            for name in names:
                if f"square.{name}" in known:
                    pair = (file.get_tensor(f"{kind}.{name}") for kind in ("gradient", "square"))
                    found[name] = Moment(*pair, step=facts["step"])
    except (SafetensorError, OSError) as error:
        raise misshapen(path, str(error)) from error
    return found


def _trained(path: Path, model: nn.Module, names: set[str]) -> dict[str, Moment]:
    """Of an optimiser's `state_dict`."""
    state, groups = _state_of(path)
    shapes: dict[Any, tuple[int, ...]] = {}
    for key, entry in state.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("exp_avg_sq"), Tensor):
            raise _no_adam(path, entry)
        shapes[key] = tuple(entry["exp_avg_sq"].shape)
    listed = [group["params"] for group in groups]
    settings = {key: group for group in groups for key in group["params"]}
    found: dict[str, Moment] = {}
    for key, name in names_of(model, listed, shapes, str(path)).items():
        if name not in names or key not in state:
            continue
        entry, group = state[key], settings.get(key, groups[0] if groups else {})
        beta1, beta2 = group.get("betas", (0.9, 0.999))
        found[name] = Moment(
            _raised(entry["exp_avg"]),
            _raised(entry["exp_avg_sq"]),
            step=float(entry["step"] if "step" in entry else group.get("step", 0))
            or _no_step(path),
            betas=(float(beta1), float(beta2)),
            eps=float(group.get("eps", 1e-8)),
        )
    return found


def _state_of(path: Path) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
    try:
        content = _load(path)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds Python objects, which could run code when they are read:"
            f" {_first_line(error)}",
            fix="load it where you trust it and save optimizer.state_dict() alone, or the two"
            " moments by parameter name",
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise misshapen(path, _first_line(error)) from error
    if isinstance(content, dict) and "optimizer" in content and "state" not in content:
        content = cast(dict[str, Any], content)["optimizer"]
    if not isinstance(content, dict) or not isinstance(
        cast(dict[str, Any], content).get("state"), dict
    ):
        raise InputError(
            f"{path} is no state of an optimiser: it has no `state`",
            fix="save optimizer.state_dict() with torch.save",
        )
    values = cast(dict[str, Any], content)
    if not values["state"]:
        raise InputError(
            f"{path} has no moments: the optimiser has made no step, or keeps none (SGD)",
            fix="take a checkpoint of a run with Adam or AdamW, or set adam: none",
        )
    return values["state"], list(values.get("param_groups") or [])


def _load(path: Path) -> Any:
    try:
        # Mapped: of the moments only those that are asked for are read.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)


def _no_adam(path: Path, entry: Any) -> InputError:
    held = (
        ", ".join(map(str, cast(Mapping[Any, Any], entry))) if isinstance(entry, dict) else "none"
    )
    kind = "of an 8-bit optimiser" if "state2" in held else "of an optimiser other than Adam"
    return InputError(
        f"{path} is {kind}: it has {held}, no exp_avg and exp_avg_sq",
        fix="train with torch's Adam or AdamW, or set adam: none",
    )


def _no_step(path: Path) -> float:
    raise InputError(
        f"{path} does not say after how many steps its moments were saved",
        fix="save optimizer.state_dict() with torch.save",
    )


def _raised(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
