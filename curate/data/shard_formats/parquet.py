"""Parquet, the default: files with a page index.

data/<domain>/train-00000-of-00024.parquet
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curate.data.shard_dictionaries import compared_columns, repeating_columns
from curate.data.shard_formats.sink import Context
from curate.data.shard_layout import Shard
from curate.data.shard_settings import Shards
from curate.errors import ConfigError


def writer_options(settings: Shards) -> dict[str, Any]:
    """Keyword arguments of `pyarrow.parquet.ParquetWriter`."""
    options: dict[str, Any] = {
        "compression": settings.compression,
        "compression_level": settings.level,
        "write_page_index": True,
    }
    if settings.content_chunks:
        if int(pa.__version__.split(".")[0]) < 21:
            raise ConfigError(
                f"shards.content_chunks needs pyarrow 21 or newer, and this is {pa.__version__}",
                fix="install a newer pyarrow, or remove shards.content_chunks",
            )
        options["use_content_defined_chunking"] = True
    return options


def table_options(settings: Shards, table: pa.Table) -> dict[str, Any]:
    """`writer_options` for a file that starts with the rows of a table."""
    return writer_options(settings) | {
        "use_dictionary": repeating_columns(table),
        "write_statistics": compared_columns(table),
    }


class _Sink:
    def __init__(self, path: Path, schema: pa.Schema, settings: Shards) -> None:
        self._schema, self._settings = schema, settings
        self._file = pa.OSFile(str(path), "wb")
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        if self._writer is None:
            options = table_options(self._settings, table)
            self._writer = pq.ParquetWriter(self._file, self._schema, **options)
        self._writer.write_table(table, row_group_size=table.num_rows)

    def close(self) -> dict[str, Any]:
        assert self._writer is not None, "a shard has rows"
        self._writer.close()
        self._file.close()
        return {}

    def discard(self) -> None:
        # pyarrow would try to write the footer, and fail again, when it is collected.
        if self._writer is not None:
            self._writer.is_open = False
        with suppress(OSError):
            self._file.close()


@dataclass(frozen=True, slots=True)
class Parquet:
    """See `curate.data.shard_formats.sink.Format`."""

    pattern: str = r"data/(?:[^/]+/){0,2}train-\d{5,}-of-\d{5,}\.parquet"

    def files(self, shard: Shard) -> tuple[str, ...]:
        return (shard.path("data", f"{shard.stem}.parquet"),)

    def open(self, paths: Sequence[Path], schema: pa.Schema, context: Context) -> _Sink:
        return _Sink(paths[0], schema, context.settings)

    def documents(self, shards: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        del shards
        return {}

    def count_rows(self, paths: Sequence[Path]) -> int:
        return pq.read_metadata(paths[0]).num_rows


PARQUET = Parquet()
