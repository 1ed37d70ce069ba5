"""What file names say: formats by suffix, globs, which files of a folder belong to a source."""

import logging
import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from curate.data.example import Source
from curate.data.images import SUFFIXES as IMAGE_SUFFIXES
from curate.data.storage import COMPRESSIONS

log = logging.getLogger(__name__)

SUFFIXES = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".py": "text",
    **dict.fromkeys(IMAGE_SUFFIXES, "images"),
}
"""Suffix -> format. `.gz`, `.zst` and `.bz2` may follow where the format is made of lines."""

FORMATS = ("parquet", "jsonl", "csv", "arrow", "text", "images", "datasets")

_LINE_FORMATS = ("jsonl", "csv", "text")


def known_format(key: str) -> str | None:
    path = PurePosixPath(key.lower())
    if path.suffix in COMPRESSIONS:
        found = SUFFIXES.get(path.with_suffix("").suffix)
        return found if found in _LINE_FORMATS else None
    return SUFFIXES.get(path.suffix)


def glob_pattern(pattern: str) -> re.Pattern[str]:
    """The regular expression of a glob over relative paths.

    `*` and `?` stay inside one folder, `**/` is any number of folders, none included.
    """
    out = ""
    for part in re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]/]+\]|.", pattern, re.DOTALL):
        if part == "**/":
            out += "(?:.*/)?"
        elif part == "**":
            out += ".*"
        elif part == "*":
            out += "[^/]*"
        elif part == "?":
            out += "[^/]"
        elif part.startswith("[") and len(part) > 1:
            out += f"[^{part[2:]}" if part[1] in "!^" else part
        else:
            out += re.escape(part)
    return re.compile(out)


def wanted(keys: Iterable[str], source: Source) -> list[str]:
    """Files of a folder that belong to the source.

    `include` decides where it is set; otherwise names with a leading `_` are left out, and where
    the format is set, files of other formats.
    """
    keys = [key for key in keys if not is_hidden(key) and "__pycache__" not in key.split("/")]
    if source.include is not None:
        matches = glob_pattern(source.include)
        return [key for key in keys if matches.fullmatch(key)]
    keys = [key for key in keys if not is_private(key)]
    if source.format in (None, "datasets"):
        return keys
    kept = [key for key in keys if known_format(key) == source.format]
    if len(kept) < len(keys):
        log.info("%d files of other formats than %s are left out", len(keys) - len(kept),
                 source.format)  # fmt: skip
    return kept


def is_open(key: str, pattern: str) -> bool:
    """Whether a glob may take a file: hidden and private ones only where it names them so."""
    return (not is_hidden(key) or is_hidden(pattern)) and (
        not is_private(key) or is_private(pattern)
    )


def is_hidden(key: str) -> bool:
    return any(part.startswith(".") for part in key.split("/"))


def is_private(key: str) -> bool:
    return any(part.startswith("_") for part in key.split("/"))


def is_glob(path: str) -> bool:
    return any(sign in path for sign in "*?[")


def split_glob(path: str) -> tuple[str, str]:
    """A glob's fixed folder, and the pattern below it."""
    parts = path.split("/")
    fixed = next(i for i, part in enumerate(parts) if is_glob(part))
    return "/".join(parts[:fixed]), "/".join(parts[fixed:])
