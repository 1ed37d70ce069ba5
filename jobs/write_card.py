"""What the card of the shards tells of the run: settings, plan, licences."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import PurePath
from typing import Any, cast

from curate.config import plain
from curate.data.card_told import Told
from curate.data.example import Source
from curate.data.file_names import is_glob
from curate.data.files import read_document
from curate.data.layout import RunFolder
from jobs.settings import Settings

_NOT_TOLD = ("run", "compare", "attribution", "cluster")
"""Where things lie and how they are tested changes no shard."""


def told(run: RunFolder, settings: Settings) -> Told:
    """What there is to tell of a run with a plan."""
    values = plain(settings)
    return Told(
        version=version("curate-data"),
        settings=told_settings(values),
        plan=values["plan"],
        summary=read_document(run.plan / "summary.json") or {},
        licenses={name: source.license for name, source in settings.sources.items()},
    )


def told_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that are not the defaults; of local paths the names alone, so that the same run
    elsewhere gives the same text."""
    empty = plain(Settings(run="run", sources={"any": Source(path="any")}))
    source = {**empty["sources"]["any"], "path": None}
    found = {
        key: _differing(value, empty.get(key))
        for key, value in values.items()
        if key not in (*_NOT_TOLD, "sources")
    }
    sources = {name: _differing(entry, source) for name, entry in values["sources"].items()}
    if isinstance(found.get("model"), dict):
        found["model"].pop("device", None)
    found = {key: value for key, value in found.items() if value not in ({}, None)}
    return _portable({"sources": sources, **found})


def _differing(value: Any, default: Any) -> Any:
    """A setting without what it has from the defaults; {} where that is all."""
    if isinstance(value, dict) and isinstance(default, dict):
        mine, known = cast(dict[str, Any], value), cast(dict[str, Any], default)
        return {
            key: _differing(entry, known.get(key))
            for key, entry in mine.items()
            if entry != known.get(key)
        }
    if isinstance(value, dict):
        given = cast(dict[str, Any], value)
        return {key: entry for key, entry in given.items() if entry not in (None, [], {})}
    return {} if value == default else value


def _portable(value: Any) -> Any:
    """Values with absolute paths of this machine cut to the last part, or two where it is a
    pattern."""
    if isinstance(value, dict):
        entries = cast(dict[str, Any], value)
        return {key: _portable(entry) for key, entry in entries.items()}
    if isinstance(value, list):
        return [_portable(entry) for entry in cast(list[Any], value)]
    if isinstance(value, str) and value.startswith(("/", "~")):
        parts = PurePath(value).parts
        return "/".join(parts[-2:] if is_glob(parts[-1]) else parts[-1:])
    return value
