"""Small networks of our own, for what transformers has no small models for."""

from typing import Any

from curate.models import cnn, mlp

OWN: dict[str, tuple[type[mlp.MLP] | type[cnn.CNN], str]] = {
    mlp.MODEL_TYPE: (mlp.MLP, "tabular-classification"),
    cnn.MODEL_TYPE: (cnn.CNN, "image-classification"),
}
"""`model_type` -> class, and kind of the task that it is for."""


def is_own(config: dict[str, Any]) -> bool:
    """Whether a saved configuration is that of one of these networks; none reads texts."""
    return config.get("model_type") in OWN
