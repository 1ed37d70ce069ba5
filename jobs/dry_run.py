"""What a command would do: per stage what is done, due and why; every value and who set it."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from curate.config import plain
from curate.data.mirror import shown_place
from curate.errors import InputError
from jobs.all_stages import COMMANDS, STAGES, Stage, load, stages_for, state_of
from jobs.nesting import refuse_nesting
from jobs.opening import changes, check_folder, flat, saved_values
from jobs.resolving import resolved
from jobs.settings import Settings

_NOTHING: Mapping[str, Any] = {"due": 0, "after": [], "why": (), "total": 0}


@dataclass(frozen=True, slots=True)
class Forecast:
    """What `--dry-run` tells."""

    run: str
    stages: dict[str, dict[str, Any]]
    """Stage -> total, done, due, why, `after` (stages that come first and will change what is due
    here) and, where asked for and known, seconds and size_bytes."""
    changes: list[str]
    """One line for each setting that differs from the last run."""
    settings: dict[str, dict[str, Any]]
    """Dotted key -> value and origin."""
    measured: bool
    """Whether batches were timed."""
    hint: str
    """What to run first so that more can be timed; empty where there is nothing to say."""
    free_bytes: int
    """On the disk of the run folder."""


def describe(
    command: str, settings: Settings, origins: Mapping[str, str], *, measure: bool
) -> Forecast:
    """Look, and write nothing.

    Args:
        command: a stage, or `run`.
        settings: as given.
        origins: dotted key -> who set it.
        measure: time a few batches of what is due.
    """
    root = Path(settings.run).expanduser().absolute()
    refuse_nesting(settings)
    check_folder(root)
    old = saved_values(root)
    full = resolved(settings, old=old)
    values = plain(full)
    stages: dict[str, dict[str, Any]] = {}
    for stage in stages_for(full, command):
        state = state_of(stage, full)
        after = [name for name in stage.needs if name in stages and _is_due(stages[name])]
        entry = {**asdict(state), "due": max(0, state.total - state.done), "after": after}
        # Writing can be foretold from the index, before a plan says what is due.
        if measure and (entry["due"] or (stage.name == "write" and _is_due(entry))):
            entry |= _measured(stage, full)
        stages[stage.name] = entry
    return Forecast(
        run=shown_place(full.run),
        stages=stages,
        changes=changes(old, full, command=command),
        settings={
            key: {"value": value, "origin": _origin(key, origins)}
            for key, value in flat(values).items()
        },
        measured=measure,
        hint=_hint(stages) if measure else "",
        free_bytes=shutil.disk_usage(_existing(root)).free,
    )


def _is_due(entry: Mapping[str, Any]) -> bool:
    return bool(entry["due"] or entry["after"] or (entry["why"] and not entry["total"]))


def _hint(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """What to run before the stages that could be timed, but not yet."""
    untimed = [
        stage.name
        for stage in STAGES
        if stage.measure is not None
        and _is_due(stages.get(stage.name, _NOTHING))
        and "seconds" not in stages[stage.name]
    ]
    names = list(stages)
    for name in untimed:
        before = [earlier for earlier in names[: names.index(name)] if _is_due(stages[earlier])]
        if before:
            return (
                f"{' and '.join(untimed)} can be timed once {before[0]} is done: run"
                f" `curate {COMMANDS.get(before[0], before[0])}` on the same settings first"
            )
    return ""


def _measured(stage: Stage, settings: Settings) -> dict[str, Any]:
    """`seconds` and `size_bytes` of what is due, or nothing where the stage cannot tell (yet)."""
    if stage.measure is None:
        return {}
    try:
        found = load(stage.measure)(settings)
    except InputError:  # an earlier stage comes first
        return {}
    return {key: found[key] for key in ("seconds", "size_bytes") if found.get(key) is not None}


def _origin(key: str, origins: Mapping[str, str]) -> str:
    """Who set a value: its own entry, or that of a list or mapping above it."""
    parts = key.split(".")
    above = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    own = next((origins[name] for name in above if name in origins), None)
    below = (place for name, place in origins.items() if name.startswith(f"{key}."))
    return own or next(below, "default")


def _existing(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())
