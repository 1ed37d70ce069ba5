"""`curate verify`: are the shards, or all files of a run, still what was written?"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from curate.data.files import digest_file, read_document
from curate.data.partitions import Output
from curate.data.shard_folder import DamageError, check_shards
from curate.errors import InputError
from jobs.opening import saved_values


def verify_shards(folder: Path) -> dict[str, Any]:
    """Recompute digests and counts of a shards folder, wherever it lies, or of a whole run.

    Args:
        folder: with the shards' `manifest.json`; the run is not needed. Of a run folder every
            file that a stage has finished is held against its mark, the shards with them, and the
            weights of every checkpoint against the digest that was kept of them.

    Returns:
        Number of shards, rows, tokens and bytes; of a run, of `files` and `checkpoints` that were
        checked too.

    Raises:
        InputError: there is no such folder.
        DamageError: files are missing, changed or too many; all are named.
        CurateError: the shards are incomplete.
    """
    is_run = folder.is_dir() and saved_values(folder) is not None
    if not is_run:
        inside = (folder / "shards").is_dir() and not (folder / "data").is_dir()
        return check_shards(folder / "shards" if inside else folder)
    outputs = finished(folder)
    problems = [
        f"{output.path.relative_to(folder).as_posix()}: {problem}"
        for output in outputs
        if (problem := _problem(output)) is not None
    ]
    found: dict[str, Any] = {"folder": str(folder), "files": len(outputs)}
    if digests := _checkpoints(folder):
        found["checkpoints"] = len(digests)
        problems += _changed_weights(folder, digests)
    if (folder / "shards" / "manifest.json").exists():
        try:
            found = {**check_shards(folder / "shards"), **found}
        except DamageError as error:
            problems += [f"shards/{problem}" for problem in error.problems]
    if problems:
        raise DamageError(
            f"{folder} has damage",
            problems,
            fix=f"remove these files and run `curate run {folder}` again: only what they were part"
            " of is redone",
        )
    return found


def finished(root: Path) -> list[Output]:
    """Every file of a run that has a mark, sorted by path."""
    marks = sorted(root.rglob(".done/*.json"))
    return [Output(mark.parent.parent / mark.name.removesuffix(".json")) for mark in marks]


def _checkpoints(root: Path) -> dict[Path, str | None]:
    """Folder -> digest of its weights; None where `checkpoint.json` cannot be read."""
    found: dict[Path, str | None] = {}
    for path in sorted(root.rglob("seed-*/step-*/checkpoint.json")):
        try:
            facts = read_document(path, digest=str)
        except InputError:
            facts = None
        found[path.parent] = None if facts is None else facts["digest"]
    for path in sorted((root / "checkpoints").glob("seed-*/done.json")):
        with suppress(InputError):  # its own mark tells of its damage
            for entry in (read_document(path, checkpoints=list) or {}).get("checkpoints", ()):
                found[root / "checkpoints" / entry["name"]] = entry["digest"]
    return found


def _changed_weights(root: Path, digests: dict[Path, str | None]) -> Iterator[str]:
    from curate.models.checkpoints import weights_digest  # brings torch

    for folder, digest in digests.items():
        name = folder.relative_to(root).as_posix()
        again = f"; remove {folder.parent.relative_to(root).as_posix()}/ to train it again"
        if not folder.is_dir():
            yield f"{name}: missing{again}"
        elif digest is None:
            yield f"{name}/checkpoint.json: damaged{again}"
        elif weights_digest(folder) != digest:
            yield f"{name}: changed: the digest of its weights is another{again}"


def _problem(output: Output) -> str | None:
    """What is wrong with a file that was finished once."""
    if not output.path.is_file():
        return "missing"
    mark = output.mark()
    if mark is None:
        return "its mark is damaged"
    size = output.path.stat().st_size
    if size != mark["size_bytes"]:
        return f"changed: {size} bytes, not {mark['size_bytes']}"
    return None if digest_file(output.path) == mark["digest"] else "changed: its digest is another"
