"""Checkpoints of the models that are trained in a run, and the file that training resumes from.

A checkpoint is a folder `seed-0/step-000200/` that loads like any saved model, with
`checkpoint.json` beside the weights and, on request, AdamW's moments by parameter name in
`moments.safetensors`. It is there whole or not at all. Nothing is pickled.
"""

import json
import os
import re
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from curate.data.files import digest_file, fingerprint, read_json, replace, replace_folder
from curate.data.files import write_json as _write_json
from curate.errors import InputError

SCHEMA_VERSION = 1

MOMENTS = "moments.safetensors"
"""Beside the weights of a checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One state of one training run."""

    name: str
    """`seed-0/step-000200`."""
    path: Path
    seed: int
    step: int
    """Optimiser steps behind it."""
    epoch: float
    """Epochs behind it: 1.5 is half of the second."""
    lr: float
    """Learning rate of its last step."""
    digest: str
    """Of the weights: see `weights_digest`."""


class Moments(NamedTuple):
    """AdamW's running means by parameter name, as the parameter is shaped."""

    gradient: dict[str, Tensor]
    """Mean of the gradient, before the correction for its start at 0."""
    square: dict[str, Tensor]
    """Mean of the gradient's square, likewise."""


def save_checkpoint(
    root: Path,
    *,
    seed: int,
    step: int,
    epoch: float,
    lr: float,
    write_model: Callable[[Path], object],
    moments: Moments | None = None,
) -> Checkpoint:
    """Write a checkpoint, whole or not at all.

    Args:
        root: the run's folder of checkpoints.
        seed: of the training run.
        step: optimiser steps done.
        epoch: epochs done.
        lr: learning rate of the last step.
        write_model: saves weights, configuration and tokenizer into a folder.
        moments: kept beside the weights.

    Raises:
        OutputError: the disk refuses the write.
    """
    name = f"seed-{seed}/step-{step:06d}"
    facts: dict[str, Any] = {"step": step, "epoch": epoch, "lr": lr, "seed": seed}

    def write(folder: Path) -> None:
        with native_errors():
            write_model(folder)
            if moments is not None:
                tensors = {f"gradient.{key}": value for key, value in moments.gradient.items()}
                tensors |= {f"square.{key}": value for key, value in moments.square.items()}
                save_file(_plain(tensors), folder / MOMENTS)
        facts["digest"] = weights_digest(folder)
        _write_json(folder / "checkpoint.json", {"schema_version": SCHEMA_VERSION, **facts})

    replace_folder(root / name, write)
    return Checkpoint(name=name, path=root / name, **facts)


def list_checkpoints(root: Path) -> list[Checkpoint]:
    """All checkpoints under `root`, sorted by seed and step; none where nothing was trained."""
    found = list[Checkpoint]()
    for path in root.glob("seed-*/step-*/checkpoint.json"):
        facts = read_json(path)
        facts.pop("schema_version")
        folder = path.parent
        name = f"{folder.parent.name}/{folder.name}"
        found.append(Checkpoint(name=name, path=folder, **facts))
    return sorted(found, key=lambda checkpoint: (checkpoint.seed, checkpoint.step))


def load_moments(checkpoint: Checkpoint) -> Moments:
    """The optimiser's moments that were kept beside a checkpoint.

    Raises:
        InputError: none were kept.
    """
    path = checkpoint.path / MOMENTS
    if not path.is_file():
        raise InputError(
            f"checkpoint {checkpoint.name} holds no optimiser moments",
            fix="set checkpoints.train.save_moments to true and train again",
        )
    tensors = load_file(path)
    found: dict[str, dict[str, Tensor]] = {"gradient": {}, "square": {}}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        found[kind][name] = tensor
    return Moments(found["gradient"], found["square"])


def weights_digest(folder: Path) -> str:
    """Digest of the weight files in a saved model's folder, whatever their number."""
    files = sorted(path for path in folder.glob("*.safetensors") if path.name != MOMENTS)
    return fingerprint(**{path.name: digest_file(path) for path in files})


def save_state(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write all that training resumes from as one file: a kill leaves the state before or this.

    Args:
        path: a safetensors file; `facts` stand in its header.
        tensors: on any device.
        facts: JSON values.

    Raises:
        OutputError: the disk refuses the write.
    """
    header = {"facts": json.dumps({"schema_version": SCHEMA_VERSION, **facts})}

    def write(target: Path) -> None:
        with native_errors():
            save_file(_plain(tensors), target, metadata=header)

    replace(path, write)


def load_state(
    path: Path, *, device: str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and facts that `save_state` wrote, or None where there is no such file."""
    if not path.is_file():
        return None
    with safe_open(path, framework="pt", device=device) as file:
        facts = json.loads(file.metadata()["facts"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    return tensors, facts


def facts_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint as JSON values, its place left out."""
    return {key: value for key, value in asdict(checkpoint).items() if key != "path"}


@contextmanager
def native_errors() -> Generator[None]:
    """Turns what safetensors and tokenizers raise on a full disk into the OSError that it is."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from error


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors takes them: contiguous, on the CPU, none a view of another."""
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
