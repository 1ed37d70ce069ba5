"""The label columns of some data over all of its rows, where it is not too large to read."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from curate.config import resolve
from curate.data.example import Source
from curate.data.formats import READERS
from curate.data.sources import InputFile
from curate.data.storage import is_local
from curate.errors import CurateError

_MOST_BYTES = {"parquet": 256 << 20, "jsonl": 32 << 20, "csv": 32 << 20}
_COMPRESSED = 8
"""Times as large as they lie there: text files that are compressed."""
_ENOUGH_ROWS = 1000


def label_rows(
    files: Sequence[InputFile],
    source: Source,
    rows: pa.Table,
    names: Sequence[str],
    *,
    has_all: bool,
) -> tuple[pa.Table, bool]:
    """The columns that may be a label, and whether these are all their rows.

    Args:
        files: of the source.
        source: its settings.
        rows: the first ones of the first file.
        names: of the columns, where they are there.
        has_all: whether `rows` is all of the first file.
    """
    first = rows.select([name for name in names if name in rows.column_names])
    likely = [name for name in first.column_names if not _all_differ(first.column(name))]
    if has_all and len(files) == 1:
        return first, True
    if not likely or not _is_small(files):
        return first, False
    try:
        tables = [_columns(file, source, likely) for file in files]
        found = pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowException, OSError, CurateError):
        return first, False
    return found.select([name for name in likely if name in found.column_names]), True


def _all_differ(column: pa.ChunkedArray) -> bool:
    """Whether hardly a value repeats: such a column is no label, and may be long."""
    if len(column) < _ENOUGH_ROWS or pa.types.is_nested(column.type):
        return pa.types.is_nested(column.type)
    return len(column.unique()) > 0.9 * len(column)


def _is_small(files: Sequence[InputFile]) -> bool:
    sizes = [file.size_bytes * (_COMPRESSED if _is_compressed(file) else 1) for file in files]
    return all(is_local(file.address) for file in files) and sum(sizes) <= _MOST_BYTES.get(
        files[0].format, 0
    )


def _is_compressed(file: InputFile) -> bool:
    return file.file.lower().endswith((".gz", ".zst", ".bz2"))


def _columns(file: InputFile, source: Source, names: Sequence[str]) -> pa.Table:
    """Some columns of a file, of all its rows; those that it does not have are left out."""
    if file.format == "parquet":
        with pq.ParquetFile(file.address) as stored:
            there = [name for name in names if name in stored.schema_arrow.names]
            return stored.read(columns=there)
    reader = resolve(READERS, file.format, what="format")
    batches = [
        batch.select([name for name in names if name in batch.schema.names])
        for batch in reader(file, source)
    ]
    return pa.Table.from_batches(batches) if batches else pa.table({})
