"""Examples as plain texts or rows of numbers, for models that are no neural networks.

Shapes: N examples, F numbers of each.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from torch.nn import functional

from curate.errors import ConfigError
from curate.models.settings import ImageClassification
from curate.models.tasks import build_task

MAX_CHARS = 10_000
"""Longer texts are read up to here."""
_SIDE = 32
_IMAGES = 256


def plain_inputs(fields: pl.DataFrame, task: Any) -> list[str] | npt.NDArray[np.float32]:
    """What a simple model can read of each example.

    Args:
        fields: of `curate.data.reading.read_fields`.
        task: its settings; None where there is none. Only images need it.

    Returns:
        N texts: the text, prompt and response, or all messages; or (N, F) numbers, NaN or
        infinite where the input is so; pixels of images, averaged to at most 32 by 32.

    Raises:
        ConfigError: there is nothing that it can read.
    """
    texts = _texts(fields)
    if texts is not None:
        return texts.str.slice(0, MAX_CHARS).to_list()
    if "features" in fields.columns:
        return _numbers(fields["features"])
    if "image" in fields.columns and isinstance(task, ImageClassification):
        return _pixels(fields, task)
    raise ConfigError(
        f"there is no text and no numbers to read: the examples have {', '.join(fields.columns)}",
        fix="name a column of texts, features or images in the source",
    )


def is_cut(fields: pl.DataFrame) -> npt.NDArray[np.bool_]:
    """(N,) whether `plain_inputs` reads only the beginning of a text."""
    texts = _texts(fields)
    if texts is None:
        return np.zeros(fields.height, dtype=np.bool_)
    return (texts.str.len_chars() > MAX_CHARS).to_numpy()


def _texts(fields: pl.DataFrame) -> pl.Series | None:
    """The text, prompt and response, or all messages; None where there are none."""
    if "text" in fields.columns:
        return fields["text"].fill_null("")
    if "prompt" in fields.columns and "response" in fields.columns:
        both = pl.concat_str(pl.col("prompt", "response").fill_null(""), separator="\n")
        return fields.select(both).to_series()
    if "messages" in fields.columns:
        contents = pl.col("messages").list.eval(pl.element().struct.field("content"))
        joined = contents.list.join("\n", ignore_nulls=True)
        return fields.select(joined).to_series().fill_null("")
    return None


def _numbers(features: pl.Series) -> npt.NDArray[np.float32]:
    rows = features.to_numpy()
    if rows.dtype == object:  # lists, which all have one length
        rows = np.array([np.asarray(row, dtype=np.float32) for row in rows])
    return rows.astype(np.float32).reshape(len(features), -1)


def _pixels(fields: pl.DataFrame, settings: ImageClassification) -> npt.NDArray[np.float32]:
    task = build_task(settings, None)
    encoded = task.encode(fields)
    pieces: list[npt.NDArray[np.float32]] = []
    for start in range(0, len(encoded), _IMAGES):
        rows = np.arange(start, min(start + _IMAGES, len(encoded)))
        good = rows[encoded.num_scored[rows] > 0]
        if not len(good):
            continue
        pixels = task.collate(encoded, good)["pixel_values"]
        size = (min(_SIDE, pixels.shape[2]), min(_SIDE, pixels.shape[3]))
        pieces.append(functional.adaptive_avg_pool2d(pixels, size).flatten(1).numpy())
    width = pieces[0].shape[1] if pieces else 0
    found = np.full((len(encoded), width), np.nan, dtype=np.float32)
    if pieces:
        found[encoded.num_scored > 0] = np.concatenate(pieces)
    return found


def finite_rows(values: list[str] | npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """(N,) True where an example can be read."""
    if isinstance(values, np.ndarray):
        return np.asarray(np.isfinite(values).all(axis=1))
    return np.ones(len(values), dtype=np.bool_)
