"""What a run with an influence index is asked about, as one row of fields that the task reads.

TEXT                a text; of a task that has no labels
@FILE               the text in a file
{"text": ..., ...}  the fields of an example: text and label, prompt and response, messages, ...
SOURCE:FILE:ROW     a row of the run; of its target with SOURCE target
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from curate.data.layout import RunFolder
from curate.data.tables import read_examples
from curate.errors import ConfigError, InputError
from jobs.fields import example_fields
from jobs.settings import Settings
from jobs.target import NAME as TARGET
from jobs.target import target_folder, target_settings

_ROW = re.compile(r"(?P<source>[^:]+):(?P<file>.+):(?P<row>\d+)")


class Query(NamedTuple):
    """What is asked about."""

    fields: pl.DataFrame
    """One row."""
    name: str
    """For people: the row's key, the file, or nothing for a text that was typed."""


def read_query(settings: Settings, given: str) -> Query:
    """The fields of a query.

    Args:
        settings: of the run.
        given: what the user typed; see the head of this file.

    Raises:
        ConfigError: it is empty, or no JSON object of fields.
        InputError: its file or row is missing.
    """
    if not given.strip():
        raise ConfigError("the query is empty", fix="give a text, @FILE, or SOURCE:FILE:ROW")
    if given.startswith("@"):
        return Query(pl.DataFrame({"text": [_text_of(Path(given[1:]))]}), given[1:])
    key = _ROW.fullmatch(given)
    if key is not None and key["source"] in {*settings.sources, TARGET}:
        return Query(_row(settings, key["source"], key["file"], int(key["row"])), given)
    if given.lstrip().startswith("{"):
        return Query(_object(given), "")
    return Query(pl.DataFrame({"text": [given]}), "")


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the query {path} cannot be read: {error}", fix="name a text file behind the @"
        ) from error


def _object(given: str) -> pl.DataFrame:
    """Fields in JSON; a text may begin with a brace too, and is refused rather than guessed at."""
    try:
        values: dict[str, Any] = json.loads(given)
        fields = pl.DataFrame({name: [value] for name, value in values.items()})
    except (ValueError, TypeError, pl.exceptions.PolarsError) as error:
        raise ConfigError(
            f"the query begins with a brace and is no JSON object of fields: {error}",
            fix='write {"text": "..."}, or give the text as @FILE',
        ) from error
    if "label" in fields.columns:
        fields = fields.with_columns(pl.col("label").cast(pl.Int64, strict=False))
    if fields.schema.get("features") is not None:
        numbers = np.array(fields["features"].to_list(), dtype=np.float32)
        width = numbers.shape[-1]
        fields = fields.with_columns(
            pl.Series("features", numbers, dtype=pl.Array(pl.Float32, width))
        )
    return fields


def _row(settings: Settings, source: str, file: str, row: int) -> pl.DataFrame:
    """A row of the run, or of its target."""
    run = RunFolder(Path(settings.run))
    if source == TARGET and TARGET not in settings.sources:
        if settings.target is None:
            raise InputError("the run has no target", fix="name a row of its sources")
        settings, run = target_settings(settings), target_folder(run)
    for part in run.partitions():
        if part.source != source or part.file != file:
            continue
        place = read_examples(run, part, ["row"])["row"].index_of(row)
        if place is not None:
            return example_fields(settings, run, part)[place]
    known = sorted({part.file for part in run.partitions() if part.source == source})
    raise InputError(
        f"the run has no example {source}:{file}:{row}",
        fix=f"use a row that is not set aside, of {', '.join(known[:5]) or 'an indexed file'}",
    )
