"""Data sets of the Hugging Face hub, read through `datasets` as a stream.

No code of the data set is run. The commit is part of the file's stamp, so that a data set that
moves on is noticed.
"""

import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from curate.data.example import Source
from curate.data.sources import InputFile
from curate.errors import InputError

_BATCH_ROWS = 1000


def find_hub(name: str, source: Source) -> list[tuple[str, str, int, str]]:
    """The one file that a hub data set stands for: (key, address, size, stamp).

    Raises:
        InputError: there is no such data set, or the hub cannot be reached.
    """
    split = _split(name, source)
    return [(split, name, 0, pinned_revision(name, source))]


def pinned_revision(name: str, source: Source) -> str:
    """The commit of a hub data set that the settings mean.

    Raises:
        InputError: there is no such data set, or the hub cannot be reached.
    """
    if source.revision is not None and re.fullmatch(r"[0-9a-f]{40}", source.revision):
        return source.revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import HFValidationError

    try:
        info = HfApi().dataset_info(name, revision=source.revision)
    except (HfHubHTTPError, OfflineModeIsEnabled, HFValidationError, OSError) as error:
        raise _unreachable(name, error) from error
    return str(info.sha)


def _split(name: str, source: Source) -> str:
    if source.split is None:
        raise InputError(
            f"{name} is a hub data set, and no split is named", fix="set split: train in the source"
        )
    return source.split


def read(file: InputFile, source: Source) -> Iterator[pa.RecordBatch]:
    """The rows of one split, in the order of its files."""
    import datasets

    revision = file.stamp or None
    try:
        stream: Any = datasets.load_dataset(
            file.address, source.subset, split=file.file, revision=revision, streaming=True
        )
        schema: pa.Schema | None = stream.features.arrow_schema if stream.features else None
        for table in stream.with_format("arrow").iter(batch_size=_BATCH_ROWS):
            schema = schema or table.schema
            yield from table.cast(schema).to_batches()
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        raise _unreachable(file.address, error) from error


def _unreachable(name: str, error: BaseException) -> InputError:
    text = " ".join(str(error).split())[:300]
    return InputError(
        f"the data set {name} cannot be had from the hub: {type(error).__name__}: {text}",
        fix="check the path (there is no such local folder either), split and network;"
        " or copy the files here and give their path",
    )
