"""The fields of an example that is asked about, checked against those of the run.

Shapes: F features, H height, W width, C channels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import polars as pl

from curate.data.columns import resolve_columns
from curate.data.layout import RunFolder
from curate.data.reading import field_frame, read_rows, stored_schema
from curate.data.tables import read_examples
from curate.errors import ConfigError
from jobs.settings import Settings

_ROW = "name a row of the run or of its target: SOURCE:FILE:ROW"
_TYPED = {
    "causal-lm": '{"text": "..."}, {"prompt": "...", "response": "..."} or {"messages": [...]}',
    "text-classification": '{"text": "...", "label": 0}',
    "tabular-classification": '{"features": [...], "label": 0}',
    "image-classification": '{"image": [...], "label": 0} with rows of pixels',
}


def how_to_ask(settings: Settings) -> str:
    """What a query of the run's task looks like, for messages."""
    typed = _TYPED.get(str(settings.task.get("kind")))
    return _ROW if typed is None else f"{_ROW}; or give its fields: {typed}"


def fields_of(settings: Settings, given: Mapping[str, Any]) -> pl.DataFrame:
    """Fields of one example as a task reads them, one row.

    Args:
        settings: of the run.
        given: field -> value: `text`, `label`, `features` (F,), `image` (H, W) or (H, W, C), ...

    Raises:
        ConfigError: a value is none of its field, or of another shape than those of the run.
    """
    values = dict(given)
    arrays: dict[str, pl.Series] = {}
    for name, shape in (("features", "a list of numbers"), ("image", "rows of pixels")):
        if name in values:
            array = _array(settings, name, values.pop(name), shape)
            inner = pl.UInt8 if array.dtype == np.uint8 else pl.Float32
            arrays[name] = pl.Series(name, array[None], dtype=pl.Array(inner, array.shape))
    _check_texts(settings, values)
    label = values.get("label")
    if label is not None and (isinstance(label, bool) or not isinstance(label, int | np.integer)):
        raise _wrong(settings, f"its label is {label!r}, not the number of a class")
    if label is not None and not 0 <= label < 2**31:
        raise _wrong(settings, f"there is no class {label}")
    try:
        fields = pl.DataFrame({str(name): [value] for name, value in values.items()})
    except (ValueError, TypeError, OverflowError, pl.exceptions.PolarsError) as error:
        raise _wrong(settings, f"its fields cannot be read: {error}") from error
    if "label" in fields.columns:
        fields = fields.with_columns(pl.col("label").cast(pl.Int64, strict=False))
    return pl.DataFrame([*fields.get_columns(), *arrays.values()])


def _check_texts(settings: Settings, values: Mapping[str, Any]) -> None:
    for name in ("text", "response"):
        if not isinstance(values.get(name, ""), str):
            raise _wrong(settings, f"its {name} is {values[name]!r:.40}, not a text")
    turns = values.get("messages", [])
    if not isinstance(turns, list | tuple) or not all(
        isinstance(turn, Mapping) and all(isinstance(turn.get(k), str) for k in ("role", "content"))
        for turn in cast(Sequence[Any], turns)
    ):
        raise _wrong(settings, 'its messages are no list of {"role": "...", "content": "..."}')


def _array(settings: Settings, name: str, value: Any, shape: str) -> npt.NDArray[Any]:
    """Features (F,) float32, or an image (H, W, C) of uint8 or float32."""
    try:
        found = np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise _wrong(settings, f"its {name} is not {shape}") from error
    ndim = (1,) if name == "features" else (2, 3)
    if found.dtype.kind not in "iuf" or found.ndim not in ndim or not found.size:
        raise _wrong(settings, f"its {name} is not {shape}")
    if not np.isfinite(found).all():
        raise _wrong(settings, f"its {name} holds numbers that are not finite")
    known = _known_shape(settings, name)
    if name == "features":
        if known and known != found.shape:
            raise _wrong(settings, f"it has {len(found)} features, the examples have {known[0]}")
        return found.astype(np.float32)
    found = found if found.ndim == 3 else found[:, :, None]
    if found.shape[2] not in (1, 3):
        raise _wrong(settings, f"its image has {found.shape[2]} channels, not 1 or 3")
    if settings.task.get("size") is None and known and known[:2] != found.shape[:2]:
        sizes = [f"{one[0]} x {one[1]}" for one in (found.shape, known)]
        raise _wrong(settings, f"its image is {sizes[0]}, those of the run are {sizes[1]}")
    if found.dtype.kind == "f":
        return found.astype(np.float32)
    if found.min() < 0 or found.max() > 255:
        raise _wrong(settings, "its image holds whole numbers that are not from 0 to 255")
    return found.astype(np.uint8)


def _known_shape(settings: Settings, name: str) -> tuple[int, ...]:
    """Of the field in the run's first example; empty where it says none, as of image files."""
    run = RunFolder(Path(settings.run))
    for part in run.partitions():
        rows = read_examples(run, part, ["row"])["row"].to_numpy()[:1]
        if not len(rows):
            continue
        schema = stored_schema(run, part)
        source = resolve_columns(settings.sources[part.source], schema, where=part.file)
        names = [column for group in source.content_columns.values() for column in group]
        frame = field_frame(read_rows(run, part, list(dict.fromkeys(names)), rows), source)
        dtype = frame.schema.get(name)
        return tuple(dtype.shape) if isinstance(dtype, pl.Array) else ()
    return ()


def _wrong(settings: Settings, why: str) -> ConfigError:
    return ConfigError(f"the query cannot be asked: {why}", fix=how_to_ask(settings))
