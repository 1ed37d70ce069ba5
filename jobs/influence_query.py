"""What a run with an influence index is asked about, as one row of fields that the task reads.

TEXT                a text; of a task that has no labels
@FILE               the text in a file
{"text": ..., ...}  the fields of an example: text and label, prompt and response, messages, ...
SOURCE:FILE:ROW     a row of the run; of its target with SOURCE target
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import polars as pl

from curate.data.layout import RunFolder
from curate.data.tables import read_examples
from curate.errors import ConfigError, InputError
from jobs.fields import example_fields
from jobs.influence_fields import fields_of
from jobs.settings import Settings
from jobs.target import NAME as TARGET
from jobs.target import target_folder, target_settings

_ROW = re.compile(r"(?P<source>[^:]+):(?P<file>.+):(?P<row>\d{1,18})")
_LIKE_ROW = re.compile(r"(?P<source>[^:]*):(?P<file>.+):(?P<row>[^:]*)")
_NAME_CHARS = 200


class Query(NamedTuple):
    """What is asked about."""

    fields: pl.DataFrame
    """One row."""
    name: str
    """For people: the row's key, the file, or what was typed, cut."""


def read_query(settings: Settings, given: str | Mapping[str, Any]) -> Query:
    """The fields of a query.

    Args:
        settings: of the run.
        given: what the user typed, see the head of this file; or an example's fields.

    Raises:
        ConfigError: it is empty, or no fields that the task reads; it looks like a row of a
            source that the run does not have.
        InputError: its file or row is missing.
    """
    if isinstance(given, Mapping):
        return Query(fields_of(settings, given), str(dict(given))[:_NAME_CHARS])
    if not isinstance(cast(object, given), str):
        raise ConfigError(
            f"the query is of type {type(given).__name__}, not a text",
            fix="give a text, @FILE, SOURCE:FILE:ROW, or the fields of an example",
        )
    if not given.strip():
        raise ConfigError("the query is empty", fix="give a text, @FILE, or SOURCE:FILE:ROW")
    try:
        given.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the query is no UTF-8 text: {error}", fix="correct it, or give the text as @FILE"
        ) from error
    if given.startswith("@"):
        return Query(pl.DataFrame({"text": [_text_of(Path(given[1:]))]}), given[1:])
    if given.lstrip().startswith("{"):
        return Query(fields_of(settings, _object(given)), given[:_NAME_CHARS])
    key = _ROW.fullmatch(given)
    sources = [*settings.sources, *([TARGET] if settings.target is not None else [])]
    if key is not None and key["source"] in {*sources, TARGET}:
        return Query(_row(settings, key["source"], key["file"], int(key["row"])), given)
    like = _LIKE_ROW.fullmatch(given)
    if like is not None and like["file"] in _files(settings):
        wrong = f"row {like['row'][:40]!r}" if like["source"] in sources else "such source"
        raise InputError(
            f"the query names the indexed file {like['file']}, but there is no {wrong}",
            fix=f"write SOURCE:FILE:ROW with a SOURCE among {', '.join(sources)} and a ROW from 0"
            " up; a text that looks like this is given as @FILE",
        )
    return Query(pl.DataFrame({"text": [given]}), given[:_NAME_CHARS])


def _files(settings: Settings) -> set[str]:
    """Of the run and its target."""
    run = RunFolder(Path(settings.run))
    return {part.file for own in (run, target_folder(run)) for part in own.partitions()}


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(
            f"the query {path} cannot be read: {error}", fix="name a text file behind the @"
        ) from error


def _object(given: str) -> dict[str, Any]:
    """Fields in JSON; a text may begin with a brace too, and is refused rather than guessed at."""
    try:
        return json.loads(given)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"the query begins with a brace and is no JSON object of fields: {error}",
            fix='write {"text": "..."}, or give the text as @FILE',
        ) from error


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
        if not part.first_row <= row < part.first_row + part.num_rows:
            continue
        place = read_examples(run, part, ["row"])["row"].index_of(row)
        if place is not None:
            return example_fields(settings, run, part)[place]
    known = sorted({part.file for part in run.partitions() if part.source == source})
    raise InputError(
        f"the run has no example {source}:{file}:{row}",
        fix=f"use a row that is not set aside, of {', '.join(known[:5]) or 'an indexed file'}",
    )
