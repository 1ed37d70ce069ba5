"""What evaluated steps of a training on the target leave on disk, one file each.

The weights that are trained, the buffers that are saved with a model, and the gradient of the
target's minibatch, all as they were before the update.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from curate.errors import InputError
from curate.models.checkpoints import load_state, save_state


class Recorded(NamedTuple):
    """What one evaluated step left."""

    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]
    gradient: dict[str, Tensor]
    """Of the measured parameters, float32."""


def step_path(folder: Path, step: int) -> Path:
    return folder / "steps" / f"step-{step:06d}.safetensors"


def load_step(folder: Path, step: int) -> Recorded:
    """What an evaluated step left, on the CPU.

    Raises:
        InputError: its file is missing.
    """
    saved = load_state(step_path(folder, step))
    if saved is None:
        raise InputError(
            f"{step_path(folder, step)} is missing",
            fix=f"remove {folder} and run the same command again",
        )
    found: dict[str, dict[str, Tensor]] = {"weight": {}, "buffer": {}, "gradient": {}}
    for key, tensor in saved[0].items():
        kind, _, name = key.partition(".")
        found[kind][name] = tensor
    return Recorded(found["weight"], found["buffer"], found["gradient"])


@torch.no_grad()
def put(model: nn.Module, recorded: Recorded) -> None:
    """Give a model the weights of an evaluated step, in the model's own type."""
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for name, value in recorded.weights.items():
        parameters[name].copy_(value)
    for name, value in recorded.buffers.items():
        buffers[name].copy_(value)


def write_step(folder: Path, step: int, model: nn.Module, gradient: Mapping[str, Tensor]) -> None:
    """Write the file of a step, whole or not at all.

    Raises:
        OutputError: the disk refuses the write.
    """
    stored = model.state_dict().keys()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    tensors: dict[str, Tensor] = {f"weight.{name}": p for name, p in trained}
    tensors |= {f"buffer.{name}": b for name, b in model.named_buffers() if name in stored}
    tensors |= {f"gradient.{name}": value for name, value in gradient.items()}
    save_state(step_path(folder, step), tensors, {"step": step})
