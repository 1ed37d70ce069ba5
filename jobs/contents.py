"""The content of single examples, for people: a text each, and a small picture of an image."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from curate.data.example import Source
from curate.data.images import UnusableImageError, decoded, is_grey_file, size_of
from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.data.reading import read_fields
from curate.errors import MissingDependencyError

_PICTURE_EDGE = 96
_PLAIN_EDGE = 48
"""Images up to this size are kept as they are, as PNG; larger ones are JPEG."""


def read_contents(
    run: RunFolder, part: Partition, source: Source, places: Sequence[int]
) -> list[dict[str, Any]]:
    """The fields of some examples of a partition, as `curate.data.reading.read_fields` has them.

    Args:
        run: the run folder.
        part: the partition.
        source: as in the settings.
        places: in the tables of the partition; the answer is in this order.

    Raises:
        InputError: the input has gone, has changed or is damaged.
    """
    return read_fields(run, part, source, places).to_dicts()


def content_text(fields: Mapping[str, Any]) -> str:
    """The content of an example as one text.

    Args:
        fields: as `curate.data.reading.read_fields` has them.
    """
    if "messages" in fields:
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in fields["messages"] or [])
    if "image" in fields:
        return f"label {fields['label']}: {_pictured(fields['image'])}"
    if "features" in fields:
        numbers = " ".join(f"{value:g}" for value in fields["features"] or [])
        return f"label {fields['label']}: {numbers}"
    if "chosen" in fields:
        named = [(n, fields[n]) for n in ("prompt", "chosen", "rejected") if fields.get(n)]
        return "\n".join(f"{name}: {_said(value)}" for name, value in named)
    parts = [fields[name] for name in ("text", "prompt", "response") if fields.get(name)]
    return "\n".join(parts)


def picture(image: Any) -> str | None:
    """A data URI of a reduced image; None where it cannot be read, or Pillow is not installed.

    Args:
        image: bytes of an image file, or pixels (H, W, C) of uint8, or of floats of any range.
    """
    try:
        from PIL import Image
    except ImportError:
        return None
    try:
        if isinstance(image, bytes):
            pixels = decoded(image, channels=1 if is_grey_file(image) else 3, size=None)
        else:
            pixels = _bytes_of(np.asarray(image))
    except (UnusableImageError, MissingDependencyError, MemoryError):
        return None
    shown = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    is_small = max(shown.size) <= _PLAIN_EDGE
    shown.thumbnail((_PICTURE_EDGE, _PICTURE_EDGE))
    file = io.BytesIO()
    if is_small:
        shown.save(file, "PNG", optimize=True)
    else:
        shown.save(file, "JPEG", quality=70)
    kind = "png" if is_small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _bytes_of(pixels: np.ndarray) -> np.ndarray:
    """(H, W, C) uint8; floats are stretched from their least to their largest."""
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    whole = pixels.astype(np.float64)
    if np.array_equal(whole, np.rint(whole)) and whole.min() >= 0 and whole.max() > 1:
        return np.clip(whole, 0, 255).astype(np.uint8)
    whole = np.nan_to_num(whole)
    low, high = whole.min(), whole.max()
    return (255 * (whole - low) / max(high - low, 1e-12)).astype(np.uint8)


def _pictured(image: Any) -> str:
    """An image in words: its size, and how much there is of it."""
    if not isinstance(image, bytes):
        return f"image of {len(image)} x {len(image[0])} pixels"
    try:
        height, width = size_of(image)
    except UnusableImageError as error:
        return f"an image that cannot be read: {error}"
    return f"image of {height} x {width} pixels, {len(image):,} bytes"


def _said(value: Any) -> str:
    """A text, or messages one after the other."""
    return value if isinstance(value, str) else content_text({"messages": value})
