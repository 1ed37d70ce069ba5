"""Writes the shards of one component in a group, one after the other, in every format asked for."""

import errno
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from curate.data.choice import IntArray
from curate.data.files import digest_file, publish, temporary_for
from curate.data.shard_formats import open_format
from curate.data.shard_formats.sink import Context, Format, Sink
from curate.data.shard_layout import Shard
from curate.errors import CurateError, OutputError

# The next file would meet the same end.
_HOPELESS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


class ComponentWriter:
    """Takes rows in, and cuts them into row groups and shards as they were laid out.

    Args:
        root: the shards folder.
        shards: of one component, in order.
        schema: of the tables.
        context: formats, and what they need to know.
    """

    def __init__(
        self, root: Path, shards: Sequence[Shard], schema: pa.Schema, context: Context
    ) -> None:
        self._root, self._schema, self._context = root, schema, context
        self._formats = {name: open_format(name) for name in context.settings.formats}
        self._shards = shards
        self._due = [(nth, rows) for nth, shard in enumerate(shards) for rows in shard.row_groups]
        self._due.reverse()
        self._tokens = [0] * len(shards)
        self._facts: dict[tuple[int, str], dict[str, Any]] = {}
        self._buffer: list[pa.Table] = []
        self._buffered = 0
        self._open: dict[str, Sink] = {}

    def add(self, table: pa.Table, tokens: IntArray | None) -> None:
        """Take rows in; whole row groups go to the files.

        Args:
            table: rows with the schema of the shards.
            tokens: (n,) of each row, or None where nothing counts them.
        """
        at = 0
        while at < table.num_rows:
            nth, size = self._due[-1]
            room = size - self._buffered
            part = table if at == 0 and room >= table.num_rows else table.slice(at, room)
            self._buffer.append(part)
            self._buffered += part.num_rows
            if tokens is not None:
                self._tokens[nth] += int(tokens[at : at + room].sum())
            if table.num_rows - at >= room:
                self._flush(nth)
            at += room

    def publish(self) -> list[dict[str, Any]]:
        """Give every file its name.

        Returns:
            What to know of each shard in each format: file, format, domain, phase, rows, tokens,
            bytes, digest; companions, where it has more files; and what the format says besides.
        """
        assert not self._due, "the plan changed while it was written"
        return [
            self._publish(nth, name, layout)
            for nth in range(len(self._shards))
            for name, layout in self._formats.items()
        ]

    def discard(self) -> None:
        """Remove what has no name yet; after `publish` there is nothing left to remove."""
        self._buffer = []
        for sink in self._open.values():
            sink.discard()
        self._open = {}
        for shard in self._shards:
            for layout in self._formats.values():
                for file in layout.files(shard):
                    with suppress(OSError):
                        temporary_for(self._root / file).unlink(missing_ok=True)

    def _publish(self, nth: int, name: str, layout: Format) -> dict[str, Any]:
        shard = self._shards[nth]
        found: list[dict[str, Any]] = []
        for file in layout.files(shard):
            target = self._root / file
            with _naming(target):
                publish(temporary_for(target), target)
                size, digest = target.stat().st_size, digest_file(target)
            found.append({"file": file, "bytes": size, "digest": digest})
        main, *companions = found
        receipt = {
            "file": main["file"],
            "format": name,
            "domain": shard.component.domain,
            "phase": shard.component.phase,
            "rows": shard.num_rows,
            "tokens": self._tokens[nth],
            "bytes": main["bytes"],
            "digest": main["digest"],
        }
        facts = self._facts[nth, name]
        return (
            receipt
            | ({"companions": companions} if companions else {})
            | ({"facts": facts} if facts else {})
        )

    def _flush(self, nth: int) -> None:
        # One array per column: how the rows were read must not show in the bytes.
        table = pa.concat_tables(self._buffer).unify_dictionaries().combine_chunks()
        self._buffer, self._buffered = [], 0
        self._due.pop()
        is_last = not self._due or self._due[-1][0] != nth
        for name, layout in self._formats.items():
            files = [self._root / file for file in layout.files(self._shards[nth])]
            with _naming(files[0]):
                if name not in self._open:
                    files[0].parent.mkdir(parents=True, exist_ok=True)
                    paths = [temporary_for(file) for file in files]
                    self._open[name] = layout.open(paths, self._schema, self._context)
                self._open[name].write(table)
                if is_last:
                    self._facts[nth, name] = self._open[name].close()
                    del self._open[name]


@contextmanager
def _naming(target: Path) -> Generator[None]:
    """Says which file could not be written, and whether others still can."""
    try:
        yield
    except OSError as error:
        what = f"shard {target} could not be written: {error.strerror or error}"
        if error.errno in _HOPELESS:
            raise OutputError(
                what,
                fix="free some space, then run the same command again; what is finished is kept",
            ) from error
        raise CurateError(
            what, fix="remove what is in its way, then run the same command again"
        ) from error
