"""The vectors of one partition, on a worker."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from curate.config import parse
from curate.data.example import KEY
from curate.data.files import fingerprint
from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.data.reading import read_fields, read_rows
from curate.data.tables import read_examples, write_table
from curate.errors import ConfigError, InputError
from curate.models.encoding import Encoder, encode_images, load_body, load_encoder
from curate.models.load import model_digest, model_folder, pick_device
from curate.models.plain_inputs import is_cut, plain_inputs
from curate.models.settings import ImageClassification, Model
from curate.models.tasks import build_task
from curate.models.tokens import load_tokenizer
from curate.vectors.ngrams import hashed_ngrams
from curate.vectors.settings import Embed
from curate.vectors.store import Floats, save
from jobs.settings import Settings, parse_settings, task_settings
from jobs.stamps import file_stamps

_IMAGES = 64
"""Images of a batch."""


def embed_work(payload: dict[str, Any]) -> dict[str, Any]:
    """Make and store the vectors of one partition."""
    settings = parse_settings(payload["settings"])
    embed = parse(Embed, payload["embed"])
    run = RunFolder(Path(settings.run))
    part = Partition(**payload["partition"])
    name, stamp = str(payload["name"]), str(payload["fingerprint"])
    torch.set_num_threads(settings.cluster.threads)
    keys = read_examples(run, part, KEY)
    vectors, read = _vectors(settings, embed, run, part, keys, digest=str(payload["digest"]))
    if embed.normalize:
        vectors = normalised(vectors)
    without = np.asarray(~np.isfinite(vectors).all(axis=1))
    vectors[without] = np.nan
    table = keys.hstack(read).with_columns(pl.Series("has_vector", ~without))
    run.vector_rows(part, name).write(lambda path: write_table(table, path), stamp)
    facts = {
        "rows": table.height,
        "dim": int(vectors.shape[1]),
        "without": int(without.sum()),
        "cut": int(table["is_cut"].sum()),
    }
    stored = vectors.astype(embed.dtype)
    run.vectors(part, name).write(lambda path: save(path, stored), stamp, **facts)
    return facts


def normalised(vectors: Floats) -> Floats:
    """Scaled to length 1; NaN where the length is 0 or not finite."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(lengths > 0, vectors / lengths, np.nan).astype(np.float32)


def encoder_digest(settings: Settings, embed: Embed) -> str:
    """Of weights, configuration and tokenizer of the model that reads.

    Raises:
        ConfigError: none is named.
        InputError: it is missing.
    """
    folder = _folder(settings, embed)
    task = task_settings(settings) if settings.task else None
    is_image = isinstance(task, ImageClassification)
    tokenizer = None if is_image else Path(_tokenizer(settings, embed) or folder)
    places = [folder] if tokenizer is None else [folder, tokenizer]
    stamp = fingerprint(files=[file_stamps(place) for place in places])
    return _encoder_digest(folder, tokenizer, stamp=stamp)


@lru_cache(maxsize=8)
def _encoder_digest(folder: Path, tokenizer: Path | None, *, stamp: str) -> str:
    """The weights are hashed once in a process, and again where `stamp` says that they changed."""
    return model_digest(folder, None if tokenizer is None else load_tokenizer(tokenizer))


def _vectors(
    settings: Settings,
    embed: Embed,
    run: RunFolder,
    part: Partition,
    keys: pl.DataFrame,
    *,
    digest: str,
) -> tuple[Floats, pl.DataFrame]:
    """Vectors, and what was read of each example."""
    source = settings.sources[part.source]
    height = keys.height
    read = pl.DataFrame(
        {"num_read": pl.Series([None] * height, dtype=pl.Int64), "is_cut": [False] * height}
    )
    if embed.kind == "column":
        return _column(run, part, keys, str(embed.column)), read
    fields = read_fields(run, part, source)
    task = task_settings(settings) if settings.task else None
    if embed.kind == "model" and "image" in fields.columns:
        return _images(settings, embed, fields, task, digest=digest), read
    if "image" in fields.columns and not isinstance(task, ImageClassification):
        raise _no_image_task()
    inputs = plain_inputs(fields, task)
    if isinstance(inputs, np.ndarray):
        if embed.kind != "values":
            raise ConfigError(
                f"embed: kind {embed.kind} reads texts, but the examples are numbers or pixels",
                fix="set kind: values",
            )
        return inputs, read
    if embed.kind == "values":
        raise ConfigError(
            "embed: kind values takes numbers or pixels, but the examples are texts",
            fix="set kind: model or kind: ngrams",
        )
    if embed.kind == "ngrams":
        found = hashed_ngrams(inputs, dim=embed.dim, ngrams=embed.ngrams, unit=embed.words)
        return found, read.with_columns(is_cut=pl.Series(is_cut(fields)))
    encoder = _encoder(_Reading(settings, embed, digest))
    texts = [embed.prefix + text for text in inputs]
    done = encoder.encode(texts, batch_tokens=embed.batch_tokens)
    for row, text in enumerate(inputs):
        if not text.strip():  # a prefix alone says nothing
            done.vectors[row] = np.nan
    return done.vectors, pl.DataFrame(
        {"num_read": done.num_read, "is_cut": done.is_cut | is_cut(fields)}
    )


def _column(run: RunFolder, part: Partition, keys: pl.DataFrame, name: str) -> Floats:
    """(N, d) a column of lists of numbers; NaN where it is null."""
    values = read_rows(run, part, [name], keys["row"].to_numpy())
    lists = pl.Series(values.column(0).to_pylist() if not values.num_rows else values.column(0))
    where = f"{part.source}/{part.file}, column {name}"
    try:
        lists = lists.cast(pl.List(pl.Float32))
    except pl.exceptions.PolarsError as error:
        raise InputError(
            f"{where} holds {lists.dtype}, not lists of numbers", fix="name a column of vectors"
        ) from error
    widths = lists.list.len().drop_nulls().unique().sort().to_list()
    if len(widths) != 1 or not widths[0]:
        found = "no vectors" if len(widths) < 2 else f"vectors of {widths[0]} and {widths[-1]}"
        raise InputError(f"{where} holds {found} numbers", fix="give all rows the same number")
    filler = [float("nan")] * int(widths[0])
    return lists.fill_null(pl.Series([filler], dtype=pl.List(pl.Float32))).list.to_array(
        int(widths[0])
    ).to_numpy().astype(np.float32)  # fmt: skip


def _images(
    settings: Settings, embed: Embed, fields: pl.DataFrame, kind: Any, *, digest: str
) -> Floats:
    """(N, d) states of an image model; NaN where an image cannot be read."""
    if not isinstance(kind, ImageClassification):
        raise _no_image_task()
    reading = _Reading(settings, embed, digest)
    model, device = _body(reading), pick_device(settings.model.device)
    task = build_task(kind, None)
    encoded = task.encode(fields)
    there = np.flatnonzero(encoded.num_scored > 0)
    found: Floats | None = None
    for start in range(0, len(there), _IMAGES):
        rows = there[start : start + _IMAGES]
        pixels = task.collate(encoded, rows)["pixel_values"]
        states = encode_images(model, pixels, layer=embed.layer, device=device)
        if found is None:
            found = np.full((len(encoded), states.shape[1]), np.nan, dtype=np.float32)
        found[rows] = states
    if found is None:
        raise InputError("no image of the partition can be read", fix="check sources.NAME.image")
    return found


def _no_image_task() -> ConfigError:
    return ConfigError(
        "embed: images are read as the task says, and there is no task for images",
        fix="write settings with `curate init DATA`, or set task: {kind: image-classification,"
        " num_classes: ..., size: ..., channels: ...}",
    )


class _Reading:
    """A model's settings, equal where the digest is."""

    def __init__(self, settings: Settings, embed: Embed, digest: str) -> None:
        self.settings, self.embed, self.digest = settings, embed, digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Reading) and other.digest == self.digest


@lru_cache(maxsize=1)
def _encoder(reading: _Reading) -> Encoder:
    """The model, once per process."""
    settings, embed = reading.settings, reading.embed
    return load_encoder(
        _folder(settings, embed),
        pooling=embed.pooling,
        layer=embed.layer,
        max_tokens=embed.max_tokens,
        dtype=settings.model.dtype,
        device=pick_device(settings.model.device),
        tokenizer=_tokenizer(settings, embed),
    )


@lru_cache(maxsize=1)
def _body(reading: _Reading) -> Any:
    settings = reading.settings
    return load_body(
        _folder(settings, reading.embed),
        dtype=settings.model.dtype,
        device=pick_device(settings.model.device),
    )


def _folder(settings: Settings, embed: Embed) -> Path:
    try:
        return model_folder(_model(settings, embed))
    except InputError as error:
        place = "model.name" if embed.model is None else "embed.NAME.model, or --embed"
        raise InputError(error.what, fix=error.fix.replace("model.name", place)) from error


def _model(settings: Settings, embed: Embed) -> Model:
    if embed.model is not None:
        return Model(name=embed.model, revision=embed.revision)
    if settings.model.name is None:
        raise ConfigError(
            "embed: no model is named", fix="set embed.NAME.model, or kind: ngrams to do without"
        )
    return settings.model


def _tokenizer(settings: Settings, embed: Embed) -> str | None:
    """Where the tokenizer lies, if not with the model."""
    named = settings.model.tokenizer
    return named if embed.model is None and isinstance(named, str) else None
