"""A small network for rows of numbers, saved like a transformers model.

Shapes: B examples, F features, C classes.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from curate.errors import InputError

MODEL_TYPE = "mlp"


class MLP(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        num_features: numbers in a row, F.
        num_classes: C.
        hidden: widths of the layers between; none makes logistic regression.
    """

    def __init__(self, *, num_features: int, num_classes: int, hidden: Sequence[int] = ()) -> None:
        super().__init__()
        self.config = {
            "model_type": MODEL_TYPE,
            "num_features": num_features,
            "num_classes": num_classes,
            "hidden": list(hidden),
        }
        widths = [num_features, *hidden, num_classes]
        layers: list[nn.Module] = []
        for width, following in pairwise(widths):
            layers += [nn.Linear(width, following), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, features: Tensor) -> Tensor:
        """(B, C) logits of (B, F) features."""
        return self.layers(features.to(next(self.parameters()).dtype))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(self.config, indent=1) + "\n")
        save_file(self.state_dict(), path / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "MLP":
        """What `save_pretrained` wrote.

        Raises:
            InputError: the files do not belong together.
        """
        path = Path(folder)
        try:
            config = json.loads((path / "config.json").read_text())
            config.pop("model_type", None)
            model = cls(**config)
            model.load_state_dict(load_file(path / "model.safetensors"))
        except (OSError, TypeError, RuntimeError, ValueError, SafetensorError) as error:
            raise InputError(
                f"the model in {path} cannot be read: {error}",
                fix="train it again, or point to a folder with config.json and model.safetensors",
            ) from error
        return model
