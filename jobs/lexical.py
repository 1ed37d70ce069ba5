"""The texts of pool and target, as scorers that count words read them."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from curate.data.example import TRAIN
from curate.data.files import fingerprint
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.data.reading import read_fields
from curate.data.tables import read_examples
from curate.errors import ConfigError, CurateError, InputError
from curate.models.plain_inputs import plain_inputs
from curate.models.text_ngrams import Hashes
from jobs.lengths import content_of, content_settings
from jobs.settings import Settings, task_settings
from jobs.target import target_folder

_SIEVE = 1 << 22


def pool_texts(settings: Settings, part: Partition, *, scorer: str) -> list[str]:
    """(N,) the text of each example of a partition, at most its first 10,000 characters.

    Raises:
        ConfigError: the examples have no text.
    """
    run = RunFolder(Path(settings.run))
    return _texts(settings, run, part, settings.sources[part.source], scorer)


def target_texts(settings: Settings, part: Partition, *, scorer: str) -> list[str]:
    """(N,) the text of each target example of a partition of the target.

    Raises:
        ConfigError: they have none.
    """
    assert settings.target is not None
    folder = target_folder(RunFolder(Path(settings.run)))
    try:
        return _texts(settings, folder, part, settings.target, scorer)
    except CurateError as error:
        raise type(error)(f"target: {error.what}", fix=error.fix) from error


def target_parts(settings: Settings) -> list[Partition]:
    """Partitions of the target.

    Raises:
        InputError: the target has not been indexed.
    """
    parts = target_folder(RunFolder(Path(settings.run))).partitions()
    if not parts:
        raise InputError(
            "the target has not been indexed", fix=f"run `curate embed {settings.run}`"
        )
    return parts


def target_digest(settings: Settings) -> str:
    """Of the texts of the target.

    Raises:
        InputError: it has not been indexed.
    """
    assert settings.target is not None
    folder = target_folder(RunFolder(Path(settings.run)))
    return fingerprint(
        source=content_settings(settings.target),
        examples=[content_of(folder, part) for part in target_parts(settings)],
    )


def pool_stamp(settings: Settings, part: Partition) -> dict[str, Any]:
    """What a fingerprint says of the texts of a partition of the pool."""
    return {
        "source": content_settings(settings.sources[part.source]),
        "examples": content_of(RunFolder(Path(settings.run)), part),
    }


def is_train(settings: Settings, part: Partition) -> npt.NDArray[np.bool_]:
    """(N,) False for held-out examples, which enter no statistics of the pool."""
    examples = read_examples(RunFolder(Path(settings.run)), part, ["split"])
    return (examples["split"] == TRAIN).to_numpy()


def note_found(hashes: Hashes, wanted: Hashes, is_found: npt.NDArray[np.bool_]) -> None:
    """Mark which of the wanted hashes are among some others.

    Args:
        hashes: (M,) as they come.
        wanted: (T,) ascending, each once.
        is_found: (T,) changed in place; what is True is not looked for again.
    """
    left = wanted[~is_found]
    if not len(left):
        return
    # A table of the low bits keeps nearly all others from being looked up.
    low = np.uint64(_SIEVE - 1)
    sieve = np.zeros(_SIEVE, dtype=np.bool_)
    sieve[left & low] = True
    rest = np.unique(hashes[sieve[hashes & low]])
    places = np.minimum(np.searchsorted(wanted, rest), len(wanted) - 1)
    is_found[places[wanted[places] == rest]] = True


def remove_stray_counts(run: RunFolder, scorer: str) -> None:
    """Remove counts of partitions that are no longer part of the data."""
    names = {part.name for part in run.partitions()}
    for path in (run.root / scorer / "counts").glob("part-*.safetensors"):
        if path.stem not in names:
            Output(path).remove()


def _texts(
    settings: Settings, run: RunFolder, part: Partition, source: Any, scorer: str
) -> list[str]:
    task = task_settings(settings) if settings.task else None
    values = plain_inputs(read_fields(run, part, source), task)
    if isinstance(values, np.ndarray):
        raise ConfigError(
            f"scorer {scorer} counts words, and the examples are numbers or images",
            fix="use a scorer of vectors, such as rds or gio",
        )
    return values
