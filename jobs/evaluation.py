"""The evaluation sets of a run, each indexed like a run of its own in `evaluation/<name>/`.

They are only ever compared with: nothing of them is trained on, scored or written.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import polars as pl

from curate.config import plain
from curate.data.files import fingerprint
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.data.reading import read_fields
from curate.data.sources import InputFile, find_files
from curate.errors import ConfigError, CurateError, InputError
from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.lengths import content_settings
from jobs.settings import Settings

VERSION = 1

LEAKAGE = "leakage"
"""The scorer that looks for them, and its folder."""

INLINE = Pool(InlineExecutor(), 1)


def check_evaluation(settings: Settings, scorer: str) -> None:
    """Refuse settings without an evaluation set, before anything is indexed.

    Args:
        settings: of the run.
        scorer: that needs one, for the message.

    Raises:
        ConfigError: there is none.
        InputError: files of one are missing.
    """
    if not settings.evaluation:
        raise ConfigError(
            f"scorer {scorer} looks for evaluation sets in the data, and the settings name none",
            fix="set evaluation: {NAME: {path: ..., text: ...}} to what the model will be judged"
            " on",
        )
    for name in settings.evaluation:
        evaluation_files(settings, name)


def evaluation_folder(run: RunFolder, name: str) -> RunFolder:
    """Where the index of a set lies."""
    return RunFolder(run.root / "evaluation" / name)


def sought_output(run: RunFolder, name: str) -> Output:
    """What of a set is looked for."""
    return Output(run.root / LEAKAGE / "sets" / f"{name}.safetensors")


def matches_output(run: RunFolder, part: Partition) -> Output:
    """What of the sets stands in a partition."""
    return Output(run.root / LEAKAGE / "matches" / f"{part.name}.parquet")


def evaluation_files(settings: Settings, name: str) -> list[InputFile]:
    """The files of a set.

    Raises:
        ConfigError: a setting of it does not fit.
        InputError: its files are missing.
    """
    try:
        return find_files(name, settings.evaluation[name])
    except (ConfigError, InputError) as error:
        raise _named_evaluation(error, name) from error


def evaluation_stamp(settings: Settings, name: str) -> str:
    """Of everything that the texts of a set depend on."""
    return fingerprint(
        stage="evaluation set",
        version=VERSION,
        source=plain(settings.evaluation[name]),
        content=content_settings(settings.evaluation[name]),
        files=[[file.file, file.stamp] for file in evaluation_files(settings, name)],
    )


def evaluation_fields(settings: Settings, name: str) -> Iterator[pl.DataFrame]:
    """Index a set, then its examples as fields, some at a time; see `read_fields`.

    Raises:
        InputError: it has no rows, or a column is missing.
        TooManyBadError: more rows cannot be used than the index allows.
    """
    folder = evaluation_folder(RunFolder(Path(settings.run)), name)
    own = replace(
        settings,
        run=str(folder.root),
        sources={name: settings.evaluation[name]},
        target=None,
        evaluation={},
        task={},
        index=replace(settings.index, held_out=0.0),
    )
    try:
        index_run(own, pool=INLINE)
        for part in folder.partitions():
            yield read_fields(folder, part, settings.evaluation[name])
    except CurateError as error:
        raise _named_evaluation(error, name) from error


def _named_evaluation(error: CurateError, name: str) -> CurateError:
    """The same error; the index knows the set as a source of that name."""
    what, fix = (
        words.replace(f"sources.{name}", f"evaluation.{name}").replace(
            "sources.*", f"evaluation.{name}"
        )
        for words in (error.what, error.fix)
    )
    where = f"evaluation.{name}"
    return type(error)(what if where in what else f"{where}: {what}", fix=fix)
