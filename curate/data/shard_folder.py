"""What lies in a shards folder: which files are curate's, and whether they are as written."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from curate.data.files import digest_file, read_json, replace
from curate.data.recipe import SCHEMA_VERSION, files_of
from curate.data.shard_checks import Planned, check_contents
from curate.data.shard_formats import FORMATS, open_format
from curate.errors import CurateError, InputError, RunFolderError, counted

_DOCUMENTS = r"README\.md|mixture\.json|manifest\.json|recipes/(?:__pycache__/)?[^/]+"
_LEFT = r"(?:.*/)?\.[^/]+\.\d+\.tmp"
"""By a killed writer."""

_CHANGED = ("file is not as it was written", "files are not as they were written")
_WRONG = ("thing is wrong with their rows", "things are wrong with their rows")


class DamageError(CurateError):
    """Files are not as they were written.

    Args:
        what: of which folder; how many files there are is added, and each of them.
        problems: one line for each file: its name and what is wrong.
        fix: as for any error.
        of_rows: the files are as their digests say, what they hold is wrong.
    """

    def __init__(
        self, what: str, problems: Sequence[str], *, fix: str, of_rows: bool = False
    ) -> None:
        lines = "".join(f"\n    {problem}" for problem in problems)
        words = _WRONG if of_rows else _CHANGED
        super().__init__(f"{what}, {counted(len(problems), *words)}:{lines}", fix=fix)
        self.problems = list(problems)
        self.of_rows = of_rows


def list_files(folder: Path) -> list[str]:
    """Files below a shards folder, relative, sorted.

    Hidden folders and files at the top are left out: `.git`, `.cache`, `.gitattributes` come with
    pushing the folder.
    """
    found = [path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()]
    return sorted(
        path.as_posix()
        for path in found
        if not path.parts[0].startswith(".") or path.name.endswith(".tmp")
    )


def refuse_foreign_files(folder: Path) -> None:
    """Check before writing that all files of a folder are curate's.

    Raises:
        RunFolderError: some are not; names the first of them.
    """
    ours = re.compile("|".join((_DOCUMENTS, _LEFT, *_patterns())))
    foreign = [file for file in list_files(folder) if ours.fullmatch(file) is None]
    if foreign:
        named = ", ".join(foreign[:5]) + (" and more" if len(foreign) > 5 else "")
        raise RunFolderError(
            f"{folder} holds files that are not shards of curate: {named}",
            fix="move them elsewhere, or choose another --out",
        )


def is_shard(file: str) -> bool:
    """Whether a file of the folder is a shard, or stands beside shards for their loader."""
    return any(re.fullmatch(pattern, file) for pattern in _patterns())


def _patterns() -> list[str]:
    return [open_format(name).pattern for name in FORMATS]


def check_shards(
    folder: Path, *, plan: Iterable[Planned] | None = None, quick: bool = False
) -> dict[str, Any]:
    """Compare a folder with its manifest, byte for byte, then its rows with what the manifest says
    of them; needs neither the run nor its inputs.

    Args:
        folder: of the shards.
        plan: of `curate.data.shard_checks`: rows are held against it too.
        quick: look at files alone, not at rows.

    Returns:
        Number of shards, rows, tokens and bytes.

    Raises:
        InputError: there is no such folder.
        CurateError: the folder is incomplete.
        DamageError: files are missing, changed or too many: all are named.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}", fix="give the folder of the shards")
    try:
        manifest = read_json(folder / "manifest.json")
    except InputError as error:
        raise CurateError(
            error.what,
            fix="run `curate write` again, or copy the whole folder",
        ) from error
    if not isinstance(manifest, dict) or "shards" not in manifest:
        raise CurateError(
            f"{folder} has no manifest.json of shards: they are incomplete, or these are no shards",
            fix="run `curate write` again, or copy the whole folder",
        )
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise CurateError(
            f"{folder / 'manifest.json'} has schema version {manifest.get('schema_version')},"
            f" this curate knows {SCHEMA_VERSION}",
            fix="use the version of curate that wrote the shards",
        )
    problems = _problems(folder, manifest)
    if problems:
        raise DamageError(
            f"{folder} is damaged",
            problems,
            fix="copy these files again, or run `curate write` again",
        )
    problems = [] if quick else check_contents(folder, manifest, plan)
    if problems:
        raise DamageError(
            f"the files of {folder} are as its manifest says",
            problems,
            fix="run `curate write` again, without this folder where the plan is still the same",
            of_rows=True,
        )
    totals = {key: manifest[key] for key in ("rows", "tokens", "bytes")}
    return {"folder": str(folder), "shards": len(_of_first(manifest)), **totals}


def _of_first(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The shards in the format that counts."""
    return [shard for shard in manifest["shards"] if shard["format"] == manifest["formats"][0]]


def _problems(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """One line for each file that is missing, changed or too many."""
    found: list[str] = []
    for shard in manifest["shards"]:
        found += _shard_problems(folder, shard)
    for file, digest in manifest["files"].items():
        path = folder / file
        if not path.is_file():
            found.append(f"{file}: missing")
        elif digest_file(path) != digest:
            found.append(f"{file}: changed")
    known = {file for shard in manifest["shards"] for file, _ in files_of(shard)}
    known |= set(manifest["files"])
    # Loaders read the folders of the formats and any Parquet; notes beside the card disturb nobody.
    # What Python leaves beside a recipe is none of a loader's either.
    roots = tuple({f"{file.split('/')[0]}/" for file in known if "/" in file} - {"recipes/"})
    found += [
        f"{file}: not in the manifest"
        for file in list_files(folder)
        if file not in known
        and (is_shard(file) or file.startswith(roots) or file.endswith((".parquet", ".tmp")))
    ]
    return found + _sums(manifest)


def _sums(manifest: dict[str, Any]) -> list[str]:
    """What the shards of the manifest do not sum up to."""
    first, *others = manifest["formats"]
    found = [
        f"manifest.json: {name} and {first} have different rows"
        for name in others
        if _rows_of(manifest, name) != _rows_of(manifest, first)
    ]
    totals = {"rows": sum(_rows_of(manifest, first).values())}
    totals["bytes"] = sum(size for shard in manifest["shards"] for _, size in files_of(shard))
    if manifest["tokens"] is not None:
        totals["tokens"] = sum(shard["tokens"] for shard in _of_first(manifest))
    return found + [
        f"manifest.json: the shards sum to {total} {key}, not {manifest[key]}"
        for key, total in totals.items()
        if total != manifest[key]
    ]


def _rows_of(manifest: dict[str, Any], form: str) -> dict[tuple[int, str], int]:
    """(phase, domain) -> rows of its shards in a format."""
    found: dict[tuple[int, str], int] = {}
    for shard in manifest["shards"]:
        if shard["format"] == form:
            key = (shard["phase"], shard["domain"])
            found[key] = found.get(key, 0) + shard["rows"]
    return found


def _shard_problems(folder: Path, shard: dict[str, Any]) -> list[str]:
    entries = [shard, *shard.get("companions", [])]
    found = [
        f"{entry['file']}: {problem}"
        for entry in entries
        if (problem := _problem(folder / entry["file"], entry)) is not None
    ]
    if found:
        return found
    paths = [folder / entry["file"] for entry in entries]
    try:
        rows = open_format(shard["format"]).count_rows(paths)
    except (OSError, pa.ArrowException) as error:
        return [f"{shard['file']}: not readable: {error}"]
    return [] if rows == shard["rows"] else [f"{shard['file']}: {rows} rows, not {shard['rows']}"]


def _problem(path: Path, entry: dict[str, Any]) -> str | None:
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"changed: {size} bytes, not {entry['bytes']}"
    return None if digest_file(path) == entry["digest"] else "changed: its digest is another"


def write_text(path: Path, text: str) -> None:
    """Write a small file whole; one that would not change is left alone."""
    if not path.is_file() or path.read_bytes() != text.encode():
        replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline=""))


def text_digest(text: str) -> str:
    """The digest that `check_shards` compares for a small file."""
    return xxhash.xxh3_128_hexdigest(text.encode())
