"""An example: which columns of an input mean what, its key, its content hash, its split."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import xxhash

from curate.config import STRICT
from curate.data.images import channels_last
from curate.errors import ConfigError

KEY = ("source", "file", "row")
"""Columns that identify an example, for ever: name of the source, path of the file relative to
the source, position in that file."""

TRAIN, HELD_OUT = "train", "held_out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One input data set and the meaning of its columns."""

    __pydantic_config__: ClassVar = STRICT

    path: str | tuple[str, ...]
    """A file, a folder, a glob, or a list of them: local, `pkg://package/folder` (data inside an
    installed package), `hf://datasets/owner/name`, `s3://` and any other fsspec address."""
    format: str | None = None
    """parquet, jsonl, csv, arrow, text, images or datasets; by default from the file names."""
    include: str | None = None
    """For a folder: only files whose relative path matches this glob, such as `**/*.py`."""
    split: str | None = None
    """Split of a `datasets` folder or a hub data set."""
    subset: str | None = None
    """Subset (configuration) of a hub data set."""
    revision: str | None = None
    """Commit of a hub data set; the resolved settings hold the one that was used."""
    header: bool | None = None
    """Whether CSV files begin with a line of column names; by default they do, unless that line
    has numbers only. Columns without names are `column_0`, `column_1`, ..."""
    separator: str | None = None
    """Sign between the fields of CSV files; by default a comma, in files called .tsv a tab."""
    passage_chars: int = 2000
    """Length to which the text format cuts files, at paragraph borders, in characters."""
    text: str | None = None
    """Column of plain text."""
    prompt: str | None = None
    """Column of the prompt; the loss ignores it."""
    response: str | None = None
    """Column of the response to `prompt`."""
    messages: str | None = None
    """Column of chat messages: a list of {role, content}."""
    chosen: str | None = None
    """Column of the preferred answer to `prompt`, or of the whole chat with it: text or messages;
    `prompt` may be messages too, or be left out where both answers hold it."""
    rejected: str | None = None
    """Column of the answer that is not preferred, of the type of `chosen`."""
    features: str | tuple[str, ...] | None = None
    """One column of number lists, or the number columns of a table; `pixel_*` stands for all
    columns of that form."""
    image: str | None = None
    """Column of images: structs of `bytes` and `path` as `datasets` keeps them, bytes, paths
    (relative to the file), or pixels as numbers."""
    shape: tuple[int, ...] | None = None
    """Of one image, where its numbers stand in one list: [28, 28] or [32, 32, 3]; not needed for
    lists in lists."""
    label: str | None = None
    """Column of the class: integers from 0, or class names where `classes` lists them."""
    classes: tuple[str, ...] = ()
    """Class names in label order, where the label column holds names."""
    domain: str | None = None
    """Column of the domain; by default the domain is the source."""
    id: str | None = None
    """Column with the user's own id; rides along."""
    document: str | None = None
    """Column that says which rows belong to one document; they share a split."""
    license: str | None = None
    """Licence of the data, such as `cc-by-4.0`; it stands in the card of the shards."""

    def __post_init__(self) -> None:
        if (self.chosen is None) != (self.rejected is None):
            raise ConfigError(
                "chosen and rejected belong together, but only one of them is set",
                fix="set both columns",
            )
        if (self.prompt is None) != (self.response is None) and (
            self.chosen is None or self.response is not None
        ):
            raise ConfigError(
                "prompt and response belong together, but only one of them is set",
                fix="set both columns, or text",
            )
        _check_shape(self.shape)
        if self.separator is not None and not re.fullmatch(r"[\t !#-~]", self.separator):
            raise ConfigError(
                f"separator is {self.separator!r}", fix='set one sign, such as ";" or "\\t"'
            )
        if self.passage_chars < 1:
            raise ConfigError(
                f"passage_chars is {self.passage_chars}", fix="set a length such as 2000"
            )

    @property
    def content_columns(self) -> dict[str, tuple[str, ...]]:
        """Field (`text`, `prompt`, `chosen`, `features` ...) -> its input columns."""
        found: dict[str, tuple[str, ...]] = {}
        for name in ("text", "prompt", "response", "messages", "chosen", "rejected", "features",
                     "image"):  # fmt: skip
            value = getattr(self, name)
            if value is not None:
                found[name] = (value,) if isinstance(value, str) else tuple(value)
        return found

    @property
    def columns(self) -> tuple[str, ...]:
        """All input columns that curate reads, without repeats."""
        named = [column for group in self.content_columns.values() for column in group]
        named += [c for c in (self.label, self.domain, self.id, self.document) if c is not None]
        return tuple(dict.fromkeys(named))


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """How inputs are cut into partitions, and what is done about bad rows."""

    __pydantic_config__: ClassVar = STRICT

    partition_rows: int | Literal["auto"] = "auto"
    """Examples in a partition, about; row groups are kept whole where they are smaller. auto is
    10,000, and more for large files: a sixteenth of the file, at most 50,000 and some 32 MB."""
    held_out: float = 0.05
    """Share of the documents that enter no plan and no training: evaluation stands on them."""
    max_bad_rows: float = 0.01
    """Share of rows that may be set aside before the run stops, in [0, 1]."""
    max_bad_files: int = 0
    """Number of unreadable files that are tolerated before the run stops."""

    def __post_init__(self) -> None:
        if self.partition_rows != "auto" and self.partition_rows < 1:
            raise ConfigError(
                f"partition_rows is {self.partition_rows}", fix="set index.partition_rows to auto"
            )
        for name in ("held_out", "max_bad_rows"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}, outside [0, 1]",
                    fix=f"set index.{name} to a share such as 0.01",
                )


def _check_shape(shape: tuple[int, ...] | None) -> None:
    if shape is not None and channels_last(shape) is None:
        raise ConfigError(
            f"shape is {list(shape)}, which is no image's",
            fix="set height and width, and 1 or 3 channels last or first: [32, 32, 3]",
        )


def content_hash(values: Sequence[bytes]) -> int:
    """xxh3-64 of the used fields of one example, in the order of `Source.content_columns`.

    Each field is preceded by its length, so that ("ab", "c") and ("a", "bc") differ.
    """
    state = xxhash.xxh3_64()
    for value in values:
        state.update(len(value).to_bytes(8, "little"))
        state.update(value)
    return state.intdigest()


def split_of(group: bytes, *, seed: int, held_out: float) -> str:
    """`held_out` for a seeded share of all groups, else `train`.

    Args:
        group: what stays together: the document's name, or the content hash as bytes.
        seed: the run's seed.
        held_out: share in [0, 1].
    """
    draw = xxhash.xxh3_64_intdigest(b"split" + group, seed=seed & 0xFFFF_FFFF_FFFF_FFFF)
    return HELD_OUT if draw < held_out * 2**64 else TRAIN
