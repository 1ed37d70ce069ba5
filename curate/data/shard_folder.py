"""What lies in a shards folder: which files are curate's, and whether they are as written."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from curate.data.files import digest_file, read_json, replace
from curate.data.mirror import held_below
from curate.data.recipe import SCHEMA_VERSION, files_of
from curate.data.shard_checks import Planned, check_contents
from curate.data.shard_formats import FORMATS, open_format
from curate.data.shard_keys import readable_format
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
    below = {path for path in folder.rglob("*") if not path.is_dir()} | set(held_below(folder))
    found = [path.relative_to(folder) for path in below]
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


def remove_empty_folders(folder: Path) -> None:
    """Remove what held files of curate's and holds none any more; other empty folders stay."""
    for name in ("data", "recipes", *FORMATS):
        below = sorted((folder / name).rglob("*"), reverse=True)  # children before their parents
        for path in (*below, folder / name):
            if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
                path.rmdir()


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
        Number of shards, rows, tokens and bytes, and as `rows_checked` the format whose rows were
        looked at; None where only files and counts were.

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
    looked = None if quick else readable_format(manifest["formats"])
    shards = len(_of_first(manifest))
    return {"folder": str(folder), "shards": shards, **totals, "rows_checked": looked}


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
    found = _disagreements(manifest)
    totals = {"rows": sum(shard["rows"] for shard in _of_first(manifest))}
    totals["bytes"] = sum(size for shard in manifest["shards"] for _, size in files_of(shard))
    if manifest["tokens"] is not None:
        totals["tokens"] = sum(shard["tokens"] for shard in _of_first(manifest))
    return found + [
        f"manifest.json: the shards sum to {total} {key}, not {manifest[key]}"
        for key, total in totals.items()
        if total != manifest[key]
    ]


def _disagreements(manifest: dict[str, Any]) -> list[str]:
    """One line for each domain of which formats have different numbers of rows."""
    by_component: dict[tuple[int, str], dict[str, list[dict[str, Any]]]] = {}
    for shard in manifest["shards"]:
        formats = by_component.setdefault((shard["phase"], shard["domain"]), {})
        formats.setdefault(shard["format"], []).append(shard)
    found = list[str]()
    for formats in by_component.values():
        shards = _differing({name: formats.get(name, []) for name in manifest["formats"]})
        rows = {name: sum(s["rows"] for s in each) for name, each in shards.items()}
        usual, agreeing = Counter(rows.values()).most_common(1)[0]
        if agreeing == len(rows):
            continue
        if 2 * agreeing > len(rows):
            found += [
                f"{_files(shards[name], name)}: {counted(number, 'row')}, not {usual:,} as in most"
                " formats"
                for name, number in rows.items()
                if number != usual
            ]
            continue
        told = ", ".join(
            f"{number:,} in {_files(shards[name], name)}" for name, number in rows.items()
        )
        found.append(
            f"manifest.json: formats have different numbers of rows, {told}; which of them is right"
            " is not known"
        )
    return found


def _differing(shards: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Of all formats the shards with different numbers of rows, where they are cut alike."""
    ordered = {name: sorted(each, key=lambda s: s["file"]) for name, each in shards.items()}
    if len({len(each) for each in ordered.values()}) > 1:
        return ordered
    alike = zip(*ordered.values(), strict=True)
    places = [nth for nth, each in enumerate(alike) if len({s["rows"] for s in each}) > 1]
    return {name: [each[nth] for nth in places] for name, each in ordered.items()}


def _files(shards: Sequence[dict[str, Any]], form: str) -> str:
    """The file, or how many of them there are."""
    if len(shards) == 1:
        return str(shards[0]["file"])
    return f"{counted(len(shards), 'file')} of {form}"


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
