"""`manifest.json`: what made what, stage by stage."""

import json
import platform
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

from curate.data.files import read_document, write_json
from curate.data.layout import RunFolder
from curate.data.partitions import Output

SCHEMA_VERSION = 1

_PASSING = ("finished", "seconds", "software", "device", "done", "skipped")

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
    """Write down that a stage is finished; an entry that would say the same stays as it was.

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
    before = manifest["stages"].get(stage)
    if isinstance(before, dict) and _lasting(cast(dict[str, Any], before)) == _lasting(entry):
        return before
    manifest["stages"][stage] = entry
    write_json(run.manifest, manifest)
    return entry


def _lasting(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What of an entry does not change when a stage runs again and has nothing to do."""
    found = {key: value for key, value in entry.items() if key not in _PASSING}
    if isinstance(found.get("summary"), Mapping):
        found["summary"] = {k: v for k, v in found["summary"].items() if k not in _PASSING}
    # As it will be read again.
    return json.loads(json.dumps(found))


def software() -> dict[str, str]:
    """Versions of what the numbers depend on, and the kind of machine."""
    return dict(_software())


@cache
def _software() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": f"{sys.platform}-{platform.machine()}"}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
