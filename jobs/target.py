"""The target of a run, indexed like a run of its own in `target/`.

Nothing of it is held out, and what is trusted has no rows to set aside.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from curate.config import plain
from curate.data.files import fingerprint
from curate.data.layout import RunFolder
from curate.data.partitions import Output
from curate.data.sources import InputFile, find_files
from curate.errors import ConfigError, CurateError, InputError, TooManyBadError
from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.lengths import content_settings
from jobs.run import Receipt, Task
from jobs.settings import Settings, parse_settings

VERSION = 1

NAME = "target"
"""The target's source, in its own index."""

INLINE = Pool(InlineExecutor(), 1)


def target_folder(run: RunFolder) -> RunFolder:
    """Where the index of the target lies."""
    return RunFolder(run.target)


def target_settings(settings: Settings) -> Settings:
    """Settings under which the target is a run of its own."""
    assert settings.target is not None
    return replace(
        settings,
        run=str(RunFolder(Path(settings.run)).target),
        sources={NAME: settings.target},
        target=None,
        index=replace(settings.index, held_out=0.0, max_bad_rows=0.0),
    )


def check_target(settings: Settings, scorer: str) -> None:
    """Refuse settings without a target, before anything is indexed.

    Args:
        settings: of the run.
        scorer: that needs it, for the message.

    Raises:
        ConfigError: there is none.
        InputError: its files are missing.
    """
    if settings.target is None:
        raise ConfigError(
            f"scorer {scorer} compares every example with a target, and the settings name none",
            fix="set target: {path: ...} to examples of the kind that is wanted",
        )
    target_files(settings)


def target_files(settings: Settings) -> list[InputFile]:
    """The files of the target.

    Raises:
        ConfigError: a setting of `target` does not fit.
        InputError: its files are missing.
    """
    assert settings.target is not None
    try:
        return find_files(NAME, settings.target)
    except (ConfigError, InputError) as error:
        raise _named_target(error) from error


def target_task(settings: Settings) -> Task:
    """Index the target; the fingerprint is of its files and settings."""
    run = RunFolder(Path(settings.run))
    stamp = target_stamp(settings)
    payload = {"settings": plain(settings), "fingerprint": stamp}
    return Task("the target", payload, target_output(run), stamp)


def target_stamp(settings: Settings) -> str:
    """Of everything the index of the target depends on."""
    assert settings.target is not None
    return fingerprint(
        stage="target",
        version=VERSION,
        source=plain(settings.target),
        content=content_settings(settings.target),
        files=[[file.file, file.stamp] for file in target_files(settings)],
        index=plain(settings.index),
        task=settings.task.get("num_classes"),
    )


def target_output(run: RunFolder) -> Output:
    """Small facts of the indexed target; its mark says that the index is whole."""
    return Output(target_folder(run).root / "target.json")


def target_work(payload: dict[str, Any]) -> Receipt:
    """Index the target."""
    settings = parse_settings(payload["settings"])
    rows = index_target(target_settings(settings))
    output = target_output(RunFolder(Path(settings.run)))
    facts = {"rows": rows}
    output.write(lambda path: write_facts(path, facts), payload["fingerprint"], **facts)
    return facts


def index_target(settings: Settings, *, pool: Pool = INLINE) -> int:
    """Index the target; returns its rows.

    Args:
        settings: of `target_settings`.
        pool: where; by default here.

    Raises:
        InputError: it has no rows, or a column is missing.
        TooManyBadError: a row of it cannot be used.
    """
    try:
        return int(index_run(settings, pool=pool)["rows"])
    except TooManyBadError as error:
        raise TooManyBadError(
            f"target: {error.what}", fix="remove these rows from the target, or complete them"
        ) from error
    except CurateError as error:
        raise _named_target(error) from error


def write_facts(path: Path, value: dict[str, Any]) -> None:
    """Small facts as JSON, no number of which is infinite."""
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _named_target(error: CurateError) -> CurateError:
    """The same error; the index knows the target as a source of that name."""
    what, fix = (
        words.replace("sources.target.", "target.").replace("sources.*.", "target.")
        for words in (error.what, error.fix)
    )
    return type(error)(what, fix=fix)
