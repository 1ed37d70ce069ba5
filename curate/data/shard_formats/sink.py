"""What a format of the shards is: where its files lie, how rows get into them, what goes beside.

One shard is written in every format that was asked for, from the same tables. A sink writes under
temporary names; the caller flushes the files to disk and gives them their names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from curate.data.example import Source
from curate.data.shard_layout import Shard
from curate.data.shard_settings import Shards


@dataclass(frozen=True, slots=True)
class Context:
    """What a sink may need to know beside the rows."""

    settings: Shards
    """Of `curate write`."""
    sources: Mapping[str, Source]
    """Name of a source -> what its columns mean; `curate_source` names it in each row."""
    tokenizer: str | None
    """Folder of the tokenizer for formats of tokens; None where no such format was asked for."""


class Sink(Protocol):
    """One shard that is being written."""

    def write(self, table: pa.Table) -> None:
        """Take rows in; one call is one row group where the format has such."""
        ...

    def close(self) -> dict[str, Any]:
        """Complete the files; returns what its receipt says besides, as JSON values."""
        ...

    def discard(self) -> None:
        """Let go of what is open; the files are removed by the caller. Raises nothing."""
        ...


class Format(Protocol):
    """One format, without state."""

    def files(self, shard: Shard) -> tuple[str, ...]:
        """The shard's files relative to the shards folder, the one that holds the rows first."""
        ...

    @property
    def pattern(self) -> str:
        """Regular expression of every file of the format, relative to the shards folder."""
        ...

    def open(self, paths: Sequence[Path], schema: pa.Schema, context: Context) -> Sink:
        """Begin a shard; the paths are temporary names of `files`."""
        ...

    def documents(self, shards: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        """Small files that loaders need, once all shards of the format are there.

        Args:
            shards: receipts of this format: `file`, `domain`, `phase`, `rows`, `bytes`, `digest`,
                `companions`, and what `close` said under `facts`.

        Returns:
            Path relative to the shards folder -> text.
        """
        ...

    def count_rows(self, paths: Sequence[Path]) -> int:
        """Rows in the files of a finished shard, counted from the files; OSError or
        pyarrow.ArrowException where they cannot be read."""
        ...
