"""A small network for rows of numbers, saved like a transformers model.

Shapes: B examples, F features, C classes.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from torch import Tensor, nn

from curate.models.own_files import load_network, save_network

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
        save_network(self, self.config, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "MLP":
        """What `save_pretrained` wrote.

        Raises:
            InputError: the files do not belong together.
        """
        return load_network(cls, folder)
