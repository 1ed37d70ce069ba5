"""A run folder must not lie in its own data: the next index would read what the run has written."""

from pathlib import Path

from curate.data.example import Source
from curate.data.file_names import (
    glob_pattern,
    is_glob,
    is_hidden,
    is_open,
    is_private,
    known_format,
    split_glob,
)
from curate.data.mirror import copy_of
from curate.data.storage import is_local
from curate.errors import ConfigError
from jobs.settings import Settings

_WRITTEN = (
    "config.yaml",
    "manifest.json",
    "examples/partitions.json",
    "examples/part-0000000000-00000.parquet",
    "examples/data/source/file.jsonl.parquet",
    "plan/summary.json",
    "shards/README.md",
    "shards/data/domain/train-00000-of-00001.parquet",
)
"""Files of a run, one of each kind that a source could take for data."""


def refuse_nesting(settings: Settings) -> None:
    """Refuse a run folder in one of its sources, and a source in the run folder.

    Raises:
        ConfigError: names the source and both places.
    """
    root = Path(settings.run).expanduser().resolve()
    mirror = copy_of(root)
    sources = {f"sources.{name}": source for name, source in settings.sources.items()}
    if settings.target is not None:
        sources["target"] = settings.target
    sources |= {f"evaluation.{name}": source for name, source in settings.evaluation.items()}
    for name, source in sources.items():
        for path in [source.path] if isinstance(source.path, str) else source.path:
            place = path.removeprefix("file://")
            if is_local(place):
                _check(root, name, place, source)
            elif mirror is not None:
                own = _as_path(mirror.address)
                _check(own, name, _as_path(place).as_posix(), source, shown=(place, mirror.address))


def _as_path(address: str) -> Path:
    """A place that lies in another where the one address does; there is nothing there."""
    return Path("/") / address.replace("://", ":/")


def _check(
    root: Path, name: str, path: str, source: Source, *, shown: tuple[str, str] | None = None
) -> None:
    said, home = shown or (path, str(root))
    full = Path(path).expanduser().absolute()
    prefix, pattern = full.as_posix(), ""
    if is_glob(path) and not full.exists():
        prefix, pattern = split_glob(full.as_posix())
    place = Path(prefix or "/").resolve()
    if place.is_relative_to(root):
        raise ConfigError(
            f"{name}.path {said} lies in the run folder {home}",
            fix="move the data out of the run folder, or choose another one with --out",
        )
    if not root.is_relative_to(place):
        return
    written = [(root.relative_to(place) / file).as_posix() for file in _WRITTEN]
    if any(_takes(file, pattern, source) for file in written):
        raise ConfigError(
            f"the run folder {home} lies in its own data, {name}.path {said}: what the run writes"
            " would be read as data the next time",
            fix="choose a run folder elsewhere with --out, or files with a glob that leaves it out",
        )


def _takes(file: str, pattern: str, source: Source) -> bool:
    """Whether a source reads a file below its folder."""
    if pattern:
        return is_open(file, pattern) and glob_pattern(pattern).fullmatch(file) is not None
    if source.include is not None:
        return not is_hidden(file) and glob_pattern(source.include).fullmatch(file) is not None
    is_of_format = source.format is None or known_format(file) == source.format
    return is_of_format and not is_hidden(file) and not is_private(file)
