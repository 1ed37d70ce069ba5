"""Tasks that were set aside: a file each, with the traceback and the input that it had.

They lie in `failures/<phase>/` of the run folder until the task succeeds or is wanted no more.
"""

import json
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from curate.data.files import replace
from curate.errors import CurateError, OutputError

_FOLDER = "failures"
_UNSAFE = re.compile(r"[^A-Za-z0-9_.=-]+")
_SKIPPED = {"settings", "fingerprint", "partition", "file"}
_MOST_CHARS = 300


class SetAside(NamedTuple):
    """What is kept of a task that failed for good."""

    phase: str
    name: str
    payload: Mapping[str, Any]
    output: Path
    error: BaseException
    trace: str
    worker: str
    attempts: int


def keep_failure(root: Path, failed: SetAside) -> None:
    """Write the file of a failure; a disk that is full keeps none."""
    what = failed.error.what if isinstance(failed.error, CurateError) else str(failed.error)
    lines = [
        f"phase: {json.dumps(failed.phase, ensure_ascii=False)}",
        f"task: {json.dumps(failed.name, ensure_ascii=False)}",
        f"error: {type(failed.error).__name__}: {' '.join(what.split())}",
        f"attempts: {failed.attempts}, the last on {failed.worker or 'no worker'}",
        f"time: {datetime.now(UTC).isoformat(timespec='seconds')}",
        f"output: {failed.output}",
        *(f"input: {each}" for each in inputs_of(failed.payload)),
    ]
    text = "\n".join(lines) + "\n\n" + (failed.trace or "no traceback\n")
    path = _place(root, failed.phase, failed.name)
    with suppress(OutputError):
        replace(path, lambda to: to.write_text(text, encoding="utf-8"), flush=False)


def inputs_of(payload: Mapping[str, Any]) -> list[str]:
    """What a task was given, in words: its rows first, then what else is short."""
    found: list[str] = []
    part = payload.get("partition")
    if isinstance(part, Mapping) and {"source", "file", "first_row", "num_rows"} <= part.keys():
        first = part["first_row"]
        last = first + part["num_rows"] - 1
        found.append(f"source {part['source']}, file {part['file']}, rows {first} to {last}, read"
                     f" from {part.get('address')}")  # fmt: skip
    file = payload.get("file")
    if isinstance(file, Mapping):
        known = {key: file[key] for key in ("source", "file", "address") if key in file}
        found.append(", ".join(f"{key} {value}" for key, value in known.items()))
    for key, value in payload.items():
        if key in _SKIPPED:
            continue
        text = json.dumps(value, ensure_ascii=False, default=str)
        cut = f"{text[:_MOST_CHARS]} ..." if len(text) > _MOST_CHARS else text
        found.append(f"{key} {cut}")
    return [" ".join(each.split()) for each in found]


def kept_failures(root: Path) -> dict[str, frozenset[str]]:
    """Phase -> names of the tasks that were set aside and have not succeeded since."""
    found: dict[str, set[str]] = {}
    for path in sorted((root / _FOLDER).glob("*/*.txt")):
        head = _head(path)
        if head is not None:
            found.setdefault(head[0], set()).add(head[1])
    return {phase: frozenset(names) for phase, names in found.items()}


def kept_names(root: Path, phase: str) -> frozenset[str]:
    """Names of the tasks of a phase that were set aside."""
    heads = map(_head, failures_folder(root, phase).glob("*.txt"))
    return frozenset(head[1] for head in heads if head is not None)


def failures_folder(root: Path, phase: str) -> Path:
    """Where the files of a phase lie."""
    return root / _FOLDER / _slug(phase)


def forget_failures(root: Path, phase: str, *, but: Collection[str] = ()) -> None:
    """Remove the files of tasks that have succeeded, or are not part of the phase any more.

    Args:
        root: the run folder.
        phase: whose tasks.
        but: names of those that are still due.
    """
    folder = failures_folder(root, phase)
    if not folder.is_dir():
        return
    keep = {_place(root, phase, name) for name in but}
    for path in folder.glob("*.txt"):
        if path not in keep:
            path.unlink(missing_ok=True)
    for empty in (folder, folder.parent):
        with suppress(OSError):
            empty.rmdir()


def forget_failure(root: Path, phase: str, name: str) -> None:
    """Remove the file of a task that has succeeded."""
    path = _place(root, phase, name)
    path.unlink(missing_ok=True)
    for empty in (path.parent, path.parent.parent):
        with suppress(OSError):
            empty.rmdir()


def _head(path: Path) -> tuple[str, str] | None:
    """Phase and name of the task whose file it is."""
    try:
        with path.open(encoding="utf-8") as file:
            phase, name = (file.readline().partition(": ")[2] for _ in range(2))
        return str(json.loads(phase)), str(json.loads(name))
    except (OSError, ValueError):  # not one of ours, or being replaced
        return None


def _place(root: Path, phase: str, name: str) -> Path:
    return failures_folder(root, phase) / f"{_slug(name)}.txt"


def _slug(name: str) -> str:
    """A file name for any name; a digest tells those apart that would be the same."""
    safe = _UNSAFE.sub("-", name)[:120].lstrip(".")
    return safe if safe == name else f"{safe}-{xxhash.xxh3_64_hexdigest(name.encode())[:8]}"
