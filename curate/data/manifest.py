"""`manifest.json`: what made what, stage by stage."""

import platform
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from curate.data.files import read_document, write_json
from curate.data.layout import RunFolder
from curate.data.partitions import Output

SCHEMA_VERSION = 1

_PACKAGES = ("curate-data", "torch", "transformers", "tokenizers", "polars", "pyarrow", "numpy")


def load_manifest(run: RunFolder) -> dict[str, Any]:
    """The manifest of a run; an empty one where the run is new.

    Raises:
        InputError: it is damaged.
    """
    found = read_document(run.manifest, stages=dict)
    return {"schema_version": SCHEMA_VERSION, "stages": {}} if found is None else found


def record_stage(
    run: RunFolder,
    stage: str,
    *,
    outputs: Iterable[Output],
    seconds: float,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write down that a stage is finished.

    Args:
        run: the run folder.
        stage: name of the stage; its earlier entry is replaced.
        outputs: every file of the stage, those from earlier runs included.
        seconds: time that the stage took now.
        facts: more to keep: counts, seeds, device, settings.

    Returns:
        The stage's entry.
    """
    files: dict[str, Any] = {}
    for output in outputs:
        mark = output.mark()
        if mark is not None:
            files[output.path.relative_to(run.root).as_posix()] = mark
    entry: dict[str, Any] = {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "software": software(),
        **(facts or {}),
        "files": files,
    }
    manifest = load_manifest(run)
    manifest["stages"][stage] = entry
    write_json(run.manifest, manifest)
    return entry


def software() -> dict[str, str]:
    """Versions of what the numbers depend on, and the kind of machine."""
    found = {"python": platform.python_version(), "machine": f"{sys.platform}-{platform.machine()}"}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
