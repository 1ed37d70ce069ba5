"""A small convolutional network for images, saved like a transformers model.

Shapes: B examples, C channels, H height, W width, K classes.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from curate.errors import ConfigError
from curate.models.own_files import load_network, save_network

MODEL_TYPE = "cnn"

_GROUPS = 8


class CNN(nn.Module):
    """Convolutions of 3 by 3, each followed by ReLU and halved by its largest value, then a head.

    Images of any size will do: what is left of them is averaged to `grid` by `grid`.

    Args:
        channels: of an image, C.
        num_classes: K.
        widths: channels after each convolution.
        hidden: widths of the linear layers between the convolutions and the classes.
        norm: normalise groups of channels within each example, or nothing; batch normalisation,
            which mixes examples, is not offered.
        grid: height and width of what the linear layers see.
    """

    def __init__(
        self,
        *,
        channels: int,
        num_classes: int,
        widths: Sequence[int] = (16, 32),
        hidden: Sequence[int] = (),
        norm: Literal["group", "none"] = "group",
        grid: int = 4,
    ) -> None:
        super().__init__()
        _check(widths, hidden, norm, grid)
        self.config = {
            "model_type": MODEL_TYPE,
            "channels": channels,
            "num_classes": num_classes,
            "widths": list(widths),
            "hidden": list(hidden),
            "norm": norm,
            "grid": grid,
        }
        layers: list[nn.Module] = []
        for width, following in pairwise([channels, *widths]):
            # The norm has a shift of its own.
            layers.append(nn.Conv2d(width, following, 3, padding=1, bias=norm == "none"))
            if norm == "group":
                groups = max(n for n in range(1, _GROUPS + 1) if following % n == 0)
                layers.append(nn.GroupNorm(groups, following))
            layers += [nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(grid), nn.Flatten())
        head: list[nn.Module] = []
        for width, following in pairwise([widths[-1] * grid**2, *hidden, num_classes]):
            head += [nn.Linear(width, following), nn.ReLU()]
        self.head = nn.Sequential(*head[:-1])

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, K) logits of (B, C, H, W) pixels."""
        return self.head(self.features(pixel_values.to(next(self.parameters()).dtype)))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        save_network(self, self.config, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "CNN":
        """What `save_pretrained` wrote.

        Raises:
            InputError: the files do not belong together.
        """
        return load_network(cls, folder)


def _check(widths: Sequence[int], hidden: Sequence[int], norm: str, grid: int) -> None:
    if not widths or min(*widths, *hidden, grid, 1) < 1:
        raise ConfigError(
            f"a cnn has widths {list(widths)}, hidden {list(hidden)} and grid {grid}",
            fix="set them to positive numbers: {model_type: cnn, widths: [16, 32], grid: 4}",
        )
    if norm not in ("group", "none"):
        raise ConfigError(f"norm of a cnn is {norm!r}", fix="use group or none")
