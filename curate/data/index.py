"""The index: from the rows of one partition to examples, and to the rows that are set aside."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute
import xxhash

from curate.data.example import Source, content_hash, split_of
from curate.data.image_values import note_damaged
from curate.data.tables import SCHEMAS
from curate.data.values import (
    Problems,
    Turns,
    Values,
    byte_views,
    field_values,
    label_values,
    noted_problems,
    plain_texts,
    turn_bytes,
)

pc: Any = pyarrow.compute

VERSION = 1
"""Of the rules below: part of every fingerprint of the index."""

LATER_FIELDS = ("chosen", "rejected", "image", "shape")
"""Settings of a source that are part of fingerprints only where they are set."""

UNKNOWN_DOMAIN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the rows of examples/ depend on besides the data."""

    seed: int
    held_out: float
    num_classes: int | None
    """Of a classification task; labels are then required and in range."""
    several_sources: bool
    """Domains are then called `source/value`."""


@dataclass(frozen=True, slots=True)
class Indexed:
    """What became of the rows of a partition."""

    examples: pl.DataFrame
    quarantine: pl.DataFrame
    num_features: int | None
    """Length of the feature vectors, where the source has features."""


def index_rows(table: pa.Table, source: Source, *, name: str, file: str, first_row: int,
               rules: Rules) -> Indexed:  # fmt: skip
    """Index the rows of one partition.

    Args:
        table: the columns that the source uses, every row of the partition.
        source: resolved by `curate.data.columns.resolve_columns`.
        name: of the source.
        file: key of the file.
        first_row: number of the table's first row in the file.
        rules: seed, split, classes.

    Returns:
        The examples, in order, and the rows that were set aside with reason and detail.
    """
    problems: Problems = {}
    noted_problems(table, problems)
    values = field_values(table, source, problems)
    _note_empty(values, problems)
    if isinstance(files := values.get("image"), pa.Array):
        note_damaged(files, table.column(source.image), problems)
    label = None
    if source.label is not None:
        column = table.column(source.label)
        label = label_values(column, source, problems, num_classes=rules.num_classes)
    texts = {
        field: plain_texts(table.column(column), column, problems)
        for field, column in (("id", source.id), ("domain", source.domain),
                              ("document", source.document))
        if column is not None
    }  # fmt: skip
    good = np.ones(table.num_rows, bool)
    good[list(problems)] = False
    rows = np.flatnonzero(good)
    kept = {field: _take(array, rows) for field, array in values.items()}
    content = _content(kept, len(rows))
    taken = {field: array.take(pa.array(rows)) for field, array in texts.items()}
    examples = pl.DataFrame(
        {
            "source": [name] * len(rows),
            "file": [file] * len(rows),
            "row": rows + first_row,
            "id": _series(taken.get("id"), len(rows)),
            "domain": _domains(taken.get("domain"), name, len(rows), rules),
            "label": _series(label.take(pa.array(rows)) if label is not None else None, len(rows)),
            "num_chars": _num_chars(kept, len(rows)),
            "content": pl.Series(content, dtype=pl.UInt64),
            "split": _splits(content, taken.get("document"), rules),
        },
        schema=SCHEMAS["examples"],
    )
    features = values.get("features")
    return Indexed(
        examples,
        quarantine_table(name, file, [(first_row + row, *why) for row, why in problems.items()]),
        features.shape[1] if isinstance(features, np.ndarray) else None,
    )


def content_digest(examples: pl.DataFrame) -> str:
    """Digest of the keys, contents and labels of the examples of one partition.

    What a model measures depends on these alone: another domain column or another held-out share
    changes the index, and no score.

    Args:
        examples: at least source, file, row, content and label.
    """
    first = examples.select("source", "file").row(0) if examples.height else ()
    state = xxhash.xxh3_128("\0".join(first).encode())
    for column in (examples["row"], examples["content"], examples["label"].fill_null(-1)):
        state.update(column.to_numpy().tobytes())
    return state.hexdigest()


def quarantine_table(
    name: str, file: str, entries: list[tuple[int | None, str, str]]
) -> pl.DataFrame:
    """Rows that were set aside, sorted; a row number of None stands for the whole file."""
    entries = sorted(entries, key=lambda entry: -1 if entry[0] is None else entry[0])
    return pl.DataFrame(
        [(name, file, row, reason, detail) for row, reason, detail in entries],
        schema=SCHEMAS["quarantine"],
        orient="row",
    )


def source_settings(source: Source) -> dict[str, Any]:
    """Settings of a source that the index depends on; how files are found is not among them."""
    names = ("text", "prompt", "response", "messages", "features", "label", "classes", "domain",
             "id", "document")  # fmt: skip
    settings = asdict(source)
    # Later fields only where they are set: a run without them keeps its fingerprints.
    more = {name: settings[name] for name in LATER_FIELDS if settings[name] is not None}
    return {name: settings[name] for name in names} | more


def counts_by_reason(quarantine: pl.DataFrame) -> dict[str, int]:
    """How many rows were set aside for each reason, by name of the reason."""
    return dict(sorted(Counter(quarantine["reason"].to_list()).items()))


def _note_empty(values: dict[str, Values], problems: Problems) -> None:
    """Nothing but white space, or nothing to learn from: an empty response, no word in a chat."""
    for field, array in values.items():
        if isinstance(array, Turns):
            blank = _blank(array.contents).to_numpy(zero_copy_only=False)
            filled = np.concatenate([[0], np.cumsum(~blank)])
            words = filled[array.starts[1:]] - filled[array.starts[:-1]]
            for row in np.flatnonzero(words == 0).tolist():
                problems.setdefault(row, ("empty", "no message has content"))
        elif field in ("text", "response", "chosen", "rejected"):
            for row in pc.indices_nonzero(_blank(array)).to_pylist():
                problems.setdefault(row, ("empty", f"{field} is empty"))


def _blank(texts: pa.Array) -> pa.Array:
    return pc.fill_null(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0), False)


def _take(values: Values, rows: np.ndarray) -> Values:
    if isinstance(values, np.ndarray):
        return values[rows]
    if not isinstance(values, Turns):
        return values.take(pa.array(rows))
    lengths = np.diff(values.starts)[rows]
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    inside = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    turns = pa.array(np.repeat(values.starts[:-1][rows], lengths) + inside)
    return Turns(starts, values.roles.take(turns), values.contents.take(turns))


def _content(values: dict[str, Values], count: int) -> list[int]:
    """Content hash of each row, over the fields in the order of the settings."""
    columns: list[list[Any]] = []
    for array in values.values():
        if isinstance(array, Turns):
            columns.append(turn_bytes(array))
        elif isinstance(array, np.ndarray):
            kind = "u1" if array.dtype == np.uint8 else "<f4"
            columns.append([row.tobytes() for row in np.ascontiguousarray(array, kind)])
        else:
            columns.append(byte_views(array))
    return [content_hash(row) for row in zip(*columns, strict=True)] if columns else [0] * count


def _num_chars(values: dict[str, Values], count: int) -> np.ndarray:
    """Characters of text, prompt and response, or of all messages; 0 for features and images."""
    total = np.zeros(count, np.int64)
    for array in values.values():
        if isinstance(array, Turns):
            lengths = pc.utf8_length(array.contents).to_numpy(zero_copy_only=False)
            sums = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
            total += sums[array.starts[1:]] - sums[array.starts[:-1]]
        elif isinstance(array, pa.LargeStringArray):
            total += pc.utf8_length(array).to_numpy(zero_copy_only=False)
    return total


def _domains(values: pa.Array | None, name: str, count: int, rules: Rules) -> list[str]:
    if values is None:
        return [name] * count
    prefix = f"{name}/" if rules.several_sources else ""
    return [prefix + (value or UNKNOWN_DOMAIN) for value in values.to_pylist()]


def _splits(content: list[int], documents: pa.Array | None, rules: Rules) -> list[str]:
    groups = [value.to_bytes(8, "little") for value in content]
    if documents is not None:
        named = documents.to_pylist()
        groups = [g if d is None else d.encode() for g, d in zip(groups, named, strict=True)]
    return [split_of(group, seed=rules.seed, held_out=rules.held_out) for group in groups]


def _series(values: pa.Array | None, count: int) -> list[Any]:
    return [None] * count if values is None else values.to_pylist()
