"""The unit of work: some rows of one file, the file it becomes, and the mark that says done.

A mark is a small JSON file beside the table it vouches for. It holds the fingerprint of all that
the table was made from and the digest of the table itself; later stages build their own
fingerprints from that digest. It goes first and comes back last, so that half a result never
looks done.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from curate.data.files import (
    digest_file,
    discard,
    misshapen,
    read_document,
    remove,
    replace,
    size_of,
    write_json,
)
from curate.data.mirror import held_below
from curate.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """A run of rows of one file. All tables of a run have these rows in this order."""

    name: str
    """Stable name of the partition's files: made from source, file and ordinal within the file,
    so that a new file renames nothing."""
    source: str
    file: str
    """Path of the original file relative to its source; part of the key."""
    address: str
    """Where the rows are read: a fsspec address of a Parquet file. A path without a scheme that
    is not absolute is relative to the run folder (converted inputs)."""
    first_row: int
    """Number of the first row in the file."""
    num_rows: int
    """Rows of the file in this partition, those that were set aside included."""
    stamp: str
    """Fingerprint of the stored file (size and time, or the store's own tag)."""


def partition_name(source: str, file: str, ordinal: int) -> str:
    """Name of the `ordinal`-th partition of a file, the same in every run."""
    return f"part-{xxhash.xxh3_64_hexdigest(f'{source}/{file}'.encode())[:10]}-{ordinal:05d}"


def save_partitions(path: Path, partitions: Sequence[Partition]) -> None:
    """Write the list, in its canonical order (source, file, row), as JSON."""
    write_json(path, {"schema_version": 1, "partitions": [asdict(part) for part in partitions]})


def load_partitions(path: Path) -> list[Partition]:
    """The list that `save_partitions` wrote; empty where there is none yet.

    Raises:
        InputError: it is damaged.
    """
    saved = read_document(path, partitions=list)
    try:
        return [Partition(**part) for part in saved["partitions"]] if saved else []
    except TypeError as error:
        raise misshapen(path, str(error)) from error


@dataclass(frozen=True, slots=True)
class Output:
    """One file of a stage and its mark."""

    path: Path

    @property
    def mark_path(self) -> Path:
        """Marks live in a hidden folder, so that a glob over the tables sees tables only."""
        return self.path.parent / ".done" / f"{self.path.name}.json"

    def mark(self) -> dict[str, Any] | None:
        """What the mark says, or None where the file is not done."""
        try:
            mark = read_document(self.mark_path, fingerprint=str, digest=str, size_bytes=int)
        except InputError:  # torn by a power cut: marks are not flushed, since tables are
            return None
        return mark if size_of(self.path) is not None else None

    def is_done(self, fingerprint: str) -> bool:
        """Whether the file was made, whole, from just what `fingerprint` stands for."""
        mark = self.mark()
        return (
            mark is not None
            and mark["fingerprint"] == fingerprint
            and mark["size_bytes"] == size_of(self.path)
        )

    def write(
        self, write: Callable[[Path], object], fingerprint: str, **facts: Any
    ) -> dict[str, Any]:
        """Write the file, then its mark; returns the mark.

        Args:
            write: writes the file at the path it is given.
            fingerprint: of everything the content depends on.
            **facts: small JSON values to keep in the mark (`rows`, counts, ...).
        """
        discard(self.mark_path)
        replace(self.path, write)
        return self.adopt(fingerprint, **facts)

    def adopt(self, fingerprint: str, **facts: Any) -> dict[str, Any]:
        """Mark the file that lies there as made from `fingerprint`; returns the mark."""
        mark = {
            "fingerprint": fingerprint,
            "digest": digest_file(self.path),
            "size_bytes": self.path.stat().st_size,
            **facts,
        }
        write_json(self.mark_path, mark, flush=False)
        return mark

    def remove(self) -> None:
        """Take the file and its mark away, the mark first."""
        discard(self.mark_path)
        remove(self.path)


def remove_strays(folder: Path, names: set[str]) -> int:
    """Remove tables (and marks) of partitions that are no longer part of the data.

    A table of a removed input file must not be read with the rest.

    Returns:
        How many were removed.
    """
    kinds = ("parquet", "npy", "vectors")
    paths = {path for kind in kinds for path in folder.glob(f"part-*.{kind}")}
    paths |= {p for p in held_below(folder) if p.parent == folder and p.match("part-*")}
    strays = [path for path in paths if path.stem not in names]
    for path in strays:
        Output(path).remove()
    return len(strays)
