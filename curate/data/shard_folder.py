"""What lies in a shards folder: which files are curate's, and whether they are as written."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from curate.data.files import digest_file, read_json, replace
from curate.data.recipe import SCHEMA_VERSION
from curate.errors import CurateError, InputError, RunFolderError, counted

_OURS = re.compile(
    r"README\.md|mixture\.json|manifest\.json"
    r"|data/(?:phase-\d+/)?[^/]+/train-\d{5,}-of-\d{5,}\.parquet"
    # Left by a killed writer.
    r"|(?:.*/)?\.[^/]+\.\d+\.tmp"
)

_CHANGED = ("file is not as it was written", "files are not as they were written")


class DamageError(CurateError):
    """Files are not as they were written.

    Args:
        what: of which folder; how many files there are is added, and each of them.
        problems: one line for each file: its name and what is wrong.
        fix: as for any error.
    """

    def __init__(self, what: str, problems: Sequence[str], *, fix: str) -> None:
        lines = "".join(f"\n    {problem}" for problem in problems)
        super().__init__(f"{what}, {counted(len(problems), *_CHANGED)}:{lines}", fix=fix)
        self.problems = list(problems)


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
    foreign = [file for file in list_files(folder) if _OURS.fullmatch(file) is None]
    if foreign:
        named = ", ".join(foreign[:5]) + (" and more" if len(foreign) > 5 else "")
        raise RunFolderError(
            f"{folder} holds files that are not shards of curate: {named}",
            fix="move them elsewhere, or choose another --out",
        )


def check_shards(folder: Path) -> dict[str, Any]:
    """Compare a folder with its manifest, byte for byte; needs neither the run nor its inputs.

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
    totals = {key: manifest[key] for key in ("rows", "tokens", "bytes")}
    return {"folder": str(folder), "shards": len(manifest["shards"]), **totals}


def _problems(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """One line for each file that is missing, changed or too many."""
    found: list[str] = []
    for shard in manifest["shards"]:
        problem = _problem(folder / shard["file"], shard)
        if problem is not None:
            found.append(f"{shard['file']}: {problem}")
    for file, digest in manifest["files"].items():
        path = folder / file
        if not path.is_file():
            found.append(f"{file}: missing")
        elif digest_file(path) != digest:
            found.append(f"{file}: changed")
    known = {shard["file"] for shard in manifest["shards"]}
    # Loaders read data/ and any Parquet; notes beside the card disturb nobody.
    found += [
        f"{file}: not in the manifest"
        for file in list_files(folder)
        if file not in known and (file.startswith("data/") or file.endswith((".parquet", ".tmp")))
    ]
    rows = sum(shard["rows"] for shard in manifest["shards"])
    if rows != manifest["rows"]:
        found.append(f"manifest.json: the shards sum to {rows} rows, not {manifest['rows']}")
    return found


def _problem(path: Path, shard: dict[str, Any]) -> str | None:
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != shard["bytes"]:
        return f"changed: {size} bytes, not {shard['bytes']}"
    if digest_file(path) != shard["digest"]:
        return "changed: its digest is another"
    try:
        rows = pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowException) as error:
        return f"not readable: {error}"
    return None if rows == shard["rows"] else f"{rows} rows, not {shard['rows']}"


def write_text(path: Path, text: str) -> None:
    """Write a small file whole; one that would not change is left alone."""
    if not path.is_file() or path.read_bytes() != text.encode():
        replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline=""))


def text_digest(text: str) -> str:
    """The digest that `check_shards` compares for a small file."""
    return xxhash.xxh3_128_hexdigest(text.encode())
