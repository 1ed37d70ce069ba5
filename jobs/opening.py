"""Opening a run folder: is it ours, is it free, what has changed since it was made."""

import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from curate.config import plain, read_yaml_file, to_yaml
from curate.data import files
from curate.data.layout import RunFolder
from curate.data.mirror import shown_place
from curate.errors import InputError, OutputError, RunFolderError
from jobs.all_stages import affected, stages_for
from jobs.domains_use import follow
from jobs.live import clear_live
from jobs.locking import LOCK, local_holder, locked
from jobs.nesting import refuse_nesting
from jobs.resolving import resolved
from jobs.settings import Settings, parse_settings
from jobs.store import here, holding_store, store_owner

log = logging.getLogger(__name__)


@contextmanager
def open_run(settings: Settings, *, command: str = "run") -> Generator[Settings]:
    """Hold the run folder of `settings`; made where it is missing, `config.yaml` written.

    Args:
        settings: as given.
        command: what is to be run, as in `jobs.all_stages.stages_for`.

    Yields:
        The resolved settings: absolute local paths, pinned revisions, every default.

    Raises:
        RunFolderError: the folder holds something else, or another process works in it.
        ConfigError: it lies in its own data.
        OutputError: it cannot be made.
    """
    settings = here(settings)
    run = RunFolder(Path(settings.run).expanduser().absolute())
    refuse_nesting(settings)
    check_folder(run.root)
    try:
        run.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the run folder {run.root} cannot be made: {error.strerror}",
            fix="choose another one with --out",
        ) from error
    with locked(run.root, command), holding_store(run.root):
        files.remove_temporaries(run.root)
        clear_live(run.root)
        old = saved_values(run.root)
        full = resolved(settings, old=old)
        values = {**plain(full), "run": shown_place(run.root)}
        for line in changes(old, full, command=command):
            log.info("%s", line)
        if values != old:
            text = "# Resolved settings of this run: `curate run` on this file repeats it.\n"
            text += to_yaml(values)
            files.replace(run.config, lambda path: path.write_text(text, encoding="utf-8"))
        follow(full)
        yield full


def check_folder(root: Path) -> None:
    """Refuse a folder that is not ours; one that is missing or empty is fine.

    Raises:
        RunFolderError: `root` is a file, or a folder with anything but a run in it.
    """
    if not root.exists():
        return
    if not root.is_dir():
        raise RunFolderError(f"{root} is a file, not a run folder", fix="choose another --out")
    names = {path.name for path in root.iterdir() if not files.is_temporary(path)} - {LOCK}
    if names and saved_values(root) is None:
        raise RunFolderError(
            f"{root} is not empty and holds no run of curate (it has {sorted(names)[0]})",
            fix="choose another folder with --out, or empty this one yourself",
        )


def saved_values(root: Path) -> dict[str, Any] | None:
    """The values in `config.yaml` of a run folder, or None where there is none of ours."""
    path = RunFolder(root).config
    if not path.is_file():
        return None
    values = read_yaml_file(path)
    return values if isinstance(values, dict) and {"run", "sources"} <= set(values) else None


def load_settings(root: Path) -> Settings:
    """The settings of an existing run, for commands that only read; the folder may have moved.

    Raises:
        InputError: there is nothing at `root`.
        RunFolderError: there is something else.
    """
    if not root.exists():
        raise InputError(f"there is no run folder {root}", fix="check the path")
    values = saved_values(root) if root.is_dir() else None
    if values is None:
        raise RunFolderError(
            f"{root} is no run folder of curate: it has no config.yaml of a run",
            fix="name the folder that --out or `run:` named",
        )
    where = str(RunFolder(root).config)
    settings = parse_settings(values, origins=dict.fromkeys(values, where))
    return replace(settings, run=str(root.absolute()))


def holder(root: Path) -> str | None:
    """Which process works in the run folder now, or None; takes nothing from it.

    Of a run in a store, which client does, on any machine.
    """
    return local_holder(root) or store_owner(root)


def changes(old: Mapping[str, Any] | None, new: Settings, *, command: str = "run") -> list[str]:
    """One line for each setting that differs from the last time, and which stages it concerns.

    Args:
        old: values of the last time; None before there was one.
        new: resolved settings.
        command: its stages are named beside those of `run`.
    """
    if old is None:
        return []
    before, after = flat(old), flat(plain(new))
    asked_for = {stage.name for name in ("run", command) for stage in stages_for(new, name)}
    lines: list[str] = []
    for key in sorted(before.keys() | after.keys()):
        was, now = (_shown(values.get(key, "not set")) for values in (before, after))
        if key != "run" and was != now:
            stages = [name for name in affected([key]) if name in asked_for]
            follow = f"{_listed(stages)} redone" if stages else "nothing is redone"
            lines.append(f"{key}: {was} -> {now}; {follow}")
    return lines


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one of dotted keys; lists and empty mappings stay whole."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def _shown(value: Any) -> str:
    if value == {}:  # an empty section is none at all
        return "not set"
    return "none" if value is None else str(value)


def _listed(names: list[str]) -> str:
    head = f"{', '.join(names[:-1])} and " if len(names) > 1 else ""
    return f"{head}{names[-1]} {'are' if len(names) > 1 else 'is'}"
