"""A few examples to check a model on: the user's own, or made up for the task.

Shapes: N examples, F features, H height, W width, C channels.
"""

from typing import Any

import numpy as np
import polars as pl

from curate.data.columns import resolve_columns
from curate.data.example import Source
from curate.data.reading import field_frame
from curate.data.values import label_values
from curate.errors import InputError
from curate.models.load import LoadedModel
from curate.models.tasks.preference import REFERENCE
from jobs.starter_look import look_at, with_roles

NUM_EXAMPLES = 3

_TEXTS = (
    "The quick brown fox jumps over the lazy dog, and nobody is surprised.",
    "It rained.",
    "Of all the trees in the garden it was the oldest that bore fruit again this year.",
)
_SIDE_PIXELS = 32
_MOST_PIXELS = 224


def given_examples(data: str, source: Source | None, *, rows: int = NUM_EXAMPLES) -> pl.DataFrame:
    """The first rows of the user's data, as a task reads them.

    Args:
        data: file, folder, glob or address.
        source: whose columns say what is what; None recognises them by their names.
        rows: how many, at most; a few thousand are read.

    Raises:
        InputError: there are no rows, or they cannot be read.
        ConfigError: the columns are not there.
    """
    look = look_at(data, "data")
    first = look.rows.slice(0, rows)
    if not first.num_rows:
        raise InputError(f"{data} holds no rows", fix="choose other data")
    names = with_roles(look).source if source is None else source
    resolved = resolve_columns(names, first.schema, where=data)
    fields = field_frame(first, resolved)
    if resolved.label is None:
        return fields
    labels = label_values(first.column(resolved.label), resolved, {}, num_classes=None)
    return fields.with_columns(pl.Series("label", labels, dtype=pl.Int64))


def made_up_examples(loaded: LoadedModel, task: Any) -> pl.DataFrame:
    """Columns of every kind of content; a task takes its own.

    Args:
        loaded: the model, whose configuration says how many features or pixels it reads.
        task: its settings.
    """
    draw = np.random.default_rng(0)
    config: Any = getattr(loaded.model, "config", {})
    width = config.get("num_features", 8) if isinstance(config, dict) else 8
    features = draw.normal(size=(NUM_EXAMPLES, int(width))).astype(np.float32)
    side = getattr(task, "size", None) or _side(config)
    channels = int(getattr(task, "channels", 3))
    shape = (side, side, channels)
    pixels = draw.integers(0, 256, (NUM_EXAMPLES, *shape), dtype=np.uint8)
    classes = int(getattr(task, "num_classes", 2))
    return pl.DataFrame(
        {
            "text": _TEXTS,
            "prompt": ["Say something. "] * NUM_EXAMPLES,
            "chosen": _TEXTS,
            "rejected": ["Nothing.", "No, thank you.", "Why should I?"],
            "label": [index % classes for index in range(NUM_EXAMPLES)],
            "features": features,
            "image": pl.Series(pixels, dtype=pl.Array(pl.UInt8, shape)),
            **{name: draw.normal(-20, 2, NUM_EXAMPLES) for name in REFERENCE},
        }
    )


def _side(config: Any) -> int:
    found = getattr(config, "image_size", None)
    return min(found, _MOST_PIXELS) if isinstance(found, int) else _SIDE_PIXELS
