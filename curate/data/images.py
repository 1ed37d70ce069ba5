"""Image files as pixels: opened, checked, brought to channels and size.

Pillow reads them. It is imported here and nowhere else, and only when there is an image to read.

Shapes: H height, W width, C channels (1 or 3).
"""

import io
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np

from curate.errors import MissingDependencyError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Of the image files in a folder."""

CHANNELS = (1, 3)

_MODES = {1: "L", 3: "RGB"}
_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)
"""Values of the EXIF orientation that swap height and width."""
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Of red, green and blue: ITU-R 601-2, as Pillow has it."""


class UnusableImageError(Exception):
    """An image cannot be decoded, or its pixels have no known range; says why on one line."""


def damage_of(content: bytes | memoryview) -> str | None:
    """Why an image file cannot be used; None where it decodes to the end.

    A JPEG is decoded at an eighth of its size, which reads all of its data in a third of the time.
    """
    try:
        with _opened(content) as image:
            image.draft("L", (1, 1))
            image.load()
            _check_mode(image)
    except UnusableImageError as error:
        return str(error)
    return None


def size_of(content: bytes | memoryview) -> tuple[int, int]:
    """(H, W) of an image file as it is shown, from its header.

    Raises:
        UnusableImageError: it is no image.
    """
    with _opened(content) as image:
        width, height = image.size
        # A PNG would be decoded to look for notes behind its pixels.
        known = image.format != "PNG" or "exif" in image.info
        turned = known and image.getexif().get(_ORIENTATION) in _TURNED
    return (width, height) if turned else (height, width)


def is_grey_file(content: bytes | memoryview) -> bool:
    """Whether an image file holds no colours, by its kind of pixels.

    Raises:
        UnusableImageError: it is no image.
    """
    with _opened(content) as image:
        return image.mode in ("1", "L", "LA") or image.mode.startswith("I")


def decoded(content: bytes | memoryview, *, channels: int, size: int | None) -> np.ndarray:
    """(H, W, C) uint8 pixels of an image file; of an animation its first picture.

    Turned as its EXIF notes say, then converted: colours to grey by luma, grey to three equal
    channels, a palette looked up, 16 bits cut to the upper 8, transparency dropped.

    Args:
        content: bytes of the file.
        channels: 1 or 3.
        size: see `fitted`; None leaves the image as large as it is.

    Raises:
        UnusableImageError: it cannot be decoded.
    """
    with _opened(content) as image:
        image.load()
        _check_mode(image)
        shown = image
        if image.getexif().get(_ORIENTATION, 1) != 1:
            from PIL import ImageOps

            shown = ImageOps.exif_transpose(image)
        if shown.mode.startswith("I;16"):
            pixels = (np.asarray(shown) >> 8).astype(np.uint8)[..., None]
        else:
            shown = _squared(shown.convert(_MODES[channels]), size)
            pixels = np.asarray(shown).reshape(shown.height, shown.width, channels)
    return fitted(pixels, channels=channels, size=size)


def fitted(pixels: np.ndarray, *, channels: int, size: int | None) -> np.ndarray:
    """Pixels in the wanted channels and size, of the type that they were.

    The largest centred square is cut out and scaled to `size` by `size`, bilinear, over all
    pixels that a new one covers.

    Args:
        pixels: (H, W, 1 or 3) uint8 or float32.
        channels: 1 or 3; colours become grey by luma, grey three equal channels.
        size: new height and width; None changes neither.

    Returns:
        (H, W, C) or (size, size, C).
    """
    if pixels.shape[2] != channels:
        pixels = np.repeat(pixels, channels, axis=2) if channels == 3 else _grey(pixels)
    if size is None or pixels.shape[:2] == (size, size):
        return pixels
    pillow = _pillow()
    planes = [pillow.fromarray(np.ascontiguousarray(pixels[:, :, c])) for c in range(channels)]
    return np.stack([np.asarray(_squared(plane, size)) for plane in planes], axis=2)


def channels_last(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Order of axes that puts the channels of one image last; None where it is no image.

    Args:
        shape: (H, W), (H, W, C) or (C, H, W); where both ends could be channels, the last is.
    """
    if any(length < 1 for length in shape):
        return None
    if len(shape) == 2:
        return (0, 1)
    if len(shape) == 3 and shape[2] in CHANNELS:
        return (0, 1, 2)
    return (1, 2, 0) if len(shape) == 3 and shape[0] in CHANNELS else None


def _grey(pixels: np.ndarray) -> np.ndarray:
    grey = pixels.astype(np.float32) @ _LUMA
    return (np.rint(grey) if pixels.dtype == np.uint8 else grey).astype(pixels.dtype)[..., None]


def _squared(image: Any, size: int | None) -> Any:
    if size is None or image.size == (size, size):
        return image
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    # Cut before it is scaled: `box` of resize would let what is outside shine in at the edges.
    cut = image.crop((left, top, left + edge, top + edge))
    return cut.resize((size, size), _pillow().Resampling.BILINEAR)


def _check_mode(image: Any) -> None:
    if image.mode in ("I", "F"):
        raise UnusableImageError(f"pixels of 32 bits (mode {image.mode}) have no known range")


@contextmanager
def _opened(content: bytes | memoryview) -> Generator[Any]:
    pillow = _pillow()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about notes in the file, and images of 90 megapixels
        try:
            with pillow.open(io.BytesIO(content)) as image:
                yield image
        except (UnusableImageError, MemoryError):
            raise
        except pillow.UnidentifiedImageError as error:
            text = "it is empty" if not len(content) else "it is no image of a known kind"
            raise UnusableImageError(text) from error
        except Exception as error:  # Pillow's readers raise whatever their parsers meet
            text = " ".join(str(error).split()) or type(error).__name__
            raise UnusableImageError(text[:200]) from error


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError(
            "images are read with Pillow, which is not installed",
            fix="pip install 'curate-data[images]'",
        ) from error
    return Image
