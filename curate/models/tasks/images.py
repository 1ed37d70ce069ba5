"""Classification of images: one position per example, its class.

A partition is kept as it came: the bytes of image files, or uint8 pixels; files are decoded when a
batch is made, small ones (4 KB of pixels) once for all batches.

Shapes: N examples of a partition, B of a batch, H height, W width, C channels, K classes.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

from curate.data.images import UnusableImageError, decoded, fitted, size_of
from curate.errors import ConfigError, InputError
from curate.models.settings import ImageClassification
from curate.models.tasks.classification import class_labels, one_each
from curate.models.tasks.protocol import Batch, Encoded, Flat

log = logging.getLogger(__name__)

PIXELS_PER_TOKEN = 64
"""What an image costs in a batch: a token for each 8 by 8 pixels."""

_SMALL_BYTES = 4096
_FILE = 0
"""In place of the bytes of a number, where the content is an image file."""
_ODD_PIXEL = 16.0


class ImageTask:
    """One label per image."""

    model_class: ClassVar[str] = "transformers:AutoModelForImageClassification"
    needs_tokenizer: ClassVar[bool] = False

    def __init__(self, settings: ImageClassification, tokenizer: Any = None) -> None:
        self.settings = settings
        self._mean = _per_channel(settings.mean)
        self._std = _per_channel(settings.std)

    def encode(self, fields: pl.DataFrame) -> Encoded:
        """`content` holds the images one after the other, `starts` where each begins, `shapes`
        (N, 4) its height, width, channels and bytes of a number; zeros for a file."""
        labels = class_labels(fields, self.settings.num_classes)
        if "image" not in fields.columns:
            raise ConfigError(
                "task image-classification reads images, but the source names none",
                fix="set sources.NAME.image to the column of the images",
            )
        images = fields["image"]
        problems: dict[int, str] = {}
        if images.dtype == pl.Binary:
            contents, shapes, sizes = self._files(images, fields, problems)
        else:
            contents, shapes, sizes = self._arrays(images, problems)
        starts = np.zeros(len(contents) + 1, dtype=np.int64)
        np.cumsum([len(content) for content in contents], out=starts[1:])
        usable = labels >= 0
        usable[list(problems)] = False
        return Encoded(
            lengths=np.maximum(-(-sizes.prod(axis=1) // PIXELS_PER_TOKEN), 1),
            num_scored=usable.astype(np.int64),
            truncated=np.zeros(len(labels), dtype=bool),
            arrays={
                "content": np.frombuffer(b"".join(contents), dtype=np.uint8),
                "starts": starts,
                "shapes": shapes,
                "labels": labels,
            },
            problems=problems,
        )

    def collate(self, encoded: Encoded, indices: Sequence[int] | np.ndarray) -> Batch:
        """`pixel_values` (B, C, H, W) float32, normalised.

        Raises:
            ConfigError: the images have different sizes.
            InputError: an image cannot be decoded: it has changed since it was indexed.
        """
        images = [self._pixels(encoded, int(index)) for index in indices]
        shapes = {image.shape for image in images}
        if len(shapes) > 1:
            raise _differing(*sorted(shape[:2] for shape in shapes)[:2], where="a batch")
        if any(image.dtype != np.uint8 for image in images):
            images = [image / np.float32(255) if image.dtype == np.uint8 else image
                      for image in images]  # fmt: skip
        stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        pixels = stacked.to(torch.float32, memory_format=torch.contiguous_format)
        if stacked.dtype == torch.uint8:
            pixels = pixels.div_(255)
        return {
            "pixel_values": pixels.sub_(self._mean).div_(self._std),
            "labels": torch.from_numpy(encoded.arrays["labels"][np.asarray(indices)]),
        }

    def logits_and_targets(self, model: nn.Module, batch: Batch) -> Flat:
        pixels = batch["pixel_values"].to(next(model.parameters()).dtype)
        try:
            found = model(pixel_values=pixels)
        except ValueError as error:
            raise _explained(error, pixels) from error
        return one_each(found if isinstance(found, Tensor) else found.logits, batch["labels"])

    def pieces(self, model: nn.Module, batch: Batch) -> Iterator[Flat]:
        yield self.logits_and_targets(model, batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        flat = self.logits_and_targets(model, batch)
        return functional.cross_entropy(flat.logits, flat.targets)

    def facts(self) -> dict[str, Any]:
        return {"pixels": 1}

    def _files(
        self, images: pl.Series, fields: pl.DataFrame, problems: dict[int, str]
    ) -> tuple[list[bytes], np.ndarray, np.ndarray]:
        """Contents, shapes and the sizes (N, 2) that the model will see, of image files."""
        contents: list[bytes] = []
        shapes = np.zeros((len(images), 4), dtype=np.int32)
        sizes = np.ones((len(images), 2), dtype=np.int64)
        first: int | None = None
        for row, given in enumerate(images):
            content = b"" if given is None else given
            try:
                size = self._seen(*size_of(content))
                if size[0] * size[1] * self.settings.channels <= _SMALL_BYTES:
                    pixels = self._decoded(content)
                    content, size = pixels.tobytes(), pixels.shape[:2]
                    shapes[row] = *pixels.shape, 1
            except UnusableImageError as error:
                problems[row], content = str(error), b""
            else:
                sizes[row] = size
                first = row if first is None else first
                if not np.array_equal(size, sizes[first]):
                    where = _place(fields, row)
                    raise _differing(tuple(sizes[first]), size, where=where)
            contents.append(content)
        return contents, shapes, sizes

    def _arrays(
        self, images: pl.Series, problems: dict[int, str]
    ) -> tuple[list[bytes], np.ndarray, np.ndarray]:
        """The same of pixels."""
        is_there = images.is_not_null().to_numpy()
        for row in np.flatnonzero(~is_there).tolist():
            problems[row] = "there is no image"
        pixels = images.drop_nulls().to_numpy()  # (N, H, W, C)
        shapes = np.zeros((len(images), 4), dtype=np.int32)
        sizes = np.ones((len(images), 2), dtype=np.int64)
        if pixels.dtype != np.uint8 and pixels.size and np.nanmax(np.abs(pixels)) > _ODD_PIXEL:
            log.warning("pixels that are no whole numbers are taken as they are, and some are"
                        " above %g: they should lie in [0, 1]", _ODD_PIXEL)  # fmt: skip
        contents = [b""] * len(images)
        for row, image in zip(np.flatnonzero(is_there).tolist(), pixels, strict=True):
            seen = self._seen(*image.shape[:2])
            if seen[0] * seen[1] < image.shape[0] * image.shape[1]:
                image = self._fitted(image)
            sizes[row] = seen
            shapes[row] = *image.shape, image.itemsize
            contents[row] = np.ascontiguousarray(image).tobytes()
        return contents, shapes, sizes

    def _seen(self, height: int, width: int) -> tuple[int, int]:
        size = self.settings.size
        return (height, width) if size is None else (size, size)

    def _pixels(self, encoded: Encoded, index: int) -> np.ndarray:
        """(H, W, C) of one image, uint8 or float32."""
        begin, stop = encoded.arrays["starts"][index : index + 2]
        content = encoded.arrays["content"][begin:stop]
        *shape, width = encoded.arrays["shapes"][index].tolist()
        if width != _FILE:
            kind = np.uint8 if width == 1 else np.float32
            return self._fitted(np.frombuffer(content.tobytes(), kind).reshape(shape))
        try:
            return self._decoded(content.tobytes())
        except UnusableImageError as error:
            raise InputError(
                f"an image can no longer be decoded: {error}", fix="run `curate index` again"
            ) from error

    def _decoded(self, content: bytes) -> np.ndarray:
        return decoded(content, channels=self.settings.channels, size=self.settings.size)

    def _fitted(self, pixels: np.ndarray) -> np.ndarray:
        return fitted(pixels, channels=self.settings.channels, size=self.settings.size)


def _per_channel(values: float | tuple[float, ...]) -> Tensor:
    """(C, 1, 1), or (1, 1, 1) where all channels have one value."""
    given = values if isinstance(values, tuple) else (values,)
    return torch.tensor(given, dtype=torch.float32)[:, None, None]


def _place(fields: pl.DataFrame, row: int) -> str:
    if {"source", "file", "row"} <= set(fields.columns):
        source, file, number = fields.select("source", "file", "row").row(row)
        return f"{source}/{file}, row {number}"
    return f"row {row}"


def _differing(one: tuple[int, ...], other: tuple[int, ...], *, where: str) -> ConfigError:
    return ConfigError(
        f"images have different sizes: {one[0]} x {one[1]}, and in {where} {other[0]} x {other[1]}",
        fix="set task.size, so that all are scaled to one",
    )


def _explained(error: ValueError, pixels: Tensor) -> Exception:
    """What a user can do about it, where it is about the images."""
    text = str(error)
    if "Expected more than 1 value per channel" in text:
        return ConfigError(
            "batch normalisation cannot be trained on a batch of one image",
            fix="change checkpoints.train.batch_tokens, so that none is left over, or task.size",
        )
    if "image" not in text.lower():
        return error
    height, width = pixels.shape[-2:]
    return ConfigError(
        f"the model cannot read images of {height} x {width}: {text.strip().splitlines()[0]}",
        fix="set task.size to the model's image_size",
    )
