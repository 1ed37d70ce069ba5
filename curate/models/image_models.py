"""What image models of transformers expect, held against the settings of the task."""

import json
import logging
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from curate.errors import ConfigError
from curate.models.settings import ImageClassification

log = logging.getLogger(__name__)


def set_image_fields(fields: dict[str, Any], known: set[str], task: ImageClassification) -> None:
    """Channels and size of the task, where the configuration of a new model leaves them open."""
    if "num_channels" in known:
        fields.setdefault("num_channels", task.channels)
    if "image_size" in known and task.size is not None:
        fields.setdefault("image_size", task.size)


def check_image_model(model: nn.Module, task: ImageClassification, where: str) -> None:
    """Try one image: a model for another size or other channels says so here, not in the run.

    Raises:
        ConfigError: the model cannot read such images.
    """
    config = cast(Any, model).config
    found = getattr(config, "num_channels", None)
    if found not in (None, task.channels):
        raise ConfigError(
            f"{where} reads images of {found} channels, but task.channels is {task.channels}",
            fix=f"set task.channels to {found}",
        )
    own = getattr(config, "image_size", None)
    if task.size is None:
        return
    first = next(model.parameters())
    trial = torch.zeros(1, task.channels, task.size, task.size, dtype=first.dtype)
    is_training = model.training
    try:
        with torch.no_grad():
            model.eval()(pixel_values=trial.to(first.device))
    except (ValueError, RuntimeError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        fix = f"set task.size to {own}" if own not in (None, task.size) else "set another task.size"
        raise ConfigError(
            f"{where} cannot read images of {task.size} x {task.size}: {said}", fix=fix
        ) from error
    finally:
        model.train(is_training)


def warn_of_other_pixels(folder: Path, task: ImageClassification) -> None:
    """Say so where the model was trained on pixels of another scale than the task gives it."""
    path = folder / "preprocessor_config.json"
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    for name, given in (("image_mean", task.mean), ("image_std", task.std)):
        wanted = values.get(name) if isinstance(values, dict) else None
        mine = list(given) if isinstance(given, tuple) else [given] * task.channels
        if isinstance(wanted, list) and wanted != mine:
            short = name.removeprefix("image_")
            log.warning("%s was trained with %s %s, task.%s is %s: set it to the same",
                        folder, short, wanted, short, mine)  # fmt: skip
