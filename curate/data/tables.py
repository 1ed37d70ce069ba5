"""The tables of a run: their columns, how they are written, and how they meet.

All tables of a run exist once per partition, with the same rows in the same order, so that they
meet by position. The key stands first in each of them and is compared wherever two meet.
A table is held against the digest in its mark whenever it is read whole: Parquet has no checksums
of its own here, and a flipped byte may well read as another number.
"""

import io
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from curate.data.example import KEY
from curate.data.files import size_of
from curate.data.layout import RunFolder
from curate.data.mirror import ensure
from curate.data.partitions import Output, Partition
from curate.errors import CurateError, InputError

SCHEMA_VERSION = 1

REASONS = (
    "unparsable",
    "missing_text",
    "wrong_type",
    "invalid_utf8",
    "empty",
    "label_out_of_range",
    "missing_image",
    "unreadable_image",
    "unreadable_file",
)
"""Why a row, or with `unreadable_file` a whole file, was set aside."""

_KEY_TYPES: dict[str, pl.DataType] = {
    "source": pl.String(),
    "file": pl.String(),
    "row": pl.Int64(),
}

SCHEMAS: dict[str, dict[str, pl.DataType]] = {
    "examples": {
        **_KEY_TYPES,
        "id": pl.String(),
        "domain": pl.String(),
        "label": pl.Int64(),
        "num_chars": pl.Int64(),
        "content": pl.UInt64(),
        "split": pl.String(),
    },
    "quarantine": {**_KEY_TYPES, "reason": pl.String(), "detail": pl.String()},
    "domains": {**_KEY_TYPES, "domain": pl.String()},
    "lengths": {**_KEY_TYPES, "num_tokens": pl.Int64()},
    "plan": {
        **_KEY_TYPES,
        "keep": pl.Boolean(),
        "weight": pl.Float32(),
        "copies": pl.UInt32(),
        "reason": pl.String(),
    },
}
"""Table -> its columns. Scores and quantities have the key and one Float32 column each."""

_MADE_BY = {
    "examples": "index",
    "quarantine": "index",
    "domains": "domains",
    "lengths": "plan",
    "checkpoints": "train",
    "quantities": "score",
    "scores": "score",
    "plan": "plan",
    "compare": "compare",
    "attribution": "evaluate-attribution",
}
"""Folder of a run -> command that makes the tables in it."""

_ENCODED = ("source", "file", "domain")
"""Columns of few values, which `read_arrow` leaves as they are stored."""

_DAMAGE = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError)


def write_table(frame: pl.DataFrame, path: Path) -> None:
    """Write `frame` as Parquet; equal frames give equal bytes."""
    # Chunks and the number of threads would otherwise show in the pages.
    frame.rechunk().write_parquet(
        path,
        compression="zstd",
        statistics=True,
        row_group_size=1 << 17,
        metadata={"curate_schema_version": str(SCHEMA_VERSION)},
    )


def read_examples(
    run: RunFolder, part: Partition, columns: Sequence[str] | None = None
) -> pl.DataFrame:
    """The index of one partition; its domains are the clustered ones where the run has any.

    Raises:
        InputError: the partition has not been indexed, or its clustered domains are not those of
            the index as it is.
    """
    path = run.examples(part).path
    ensure(path)
    if not path.exists():
        raise InputError(
            f"{path} is missing: {part.source}/{part.file} has not been indexed",
            fix=f"run `curate index {run.root}`",
        )
    if run.clusters.mark() is None or (columns is not None and "domain" not in columns):
        return read_table(path, columns)
    own = read_table(path, None if columns is None else list(dict.fromkeys([*KEY, *columns])))
    clustered = read_table(_clustered(run, part).path, [*KEY, "domain"])
    meet(own, clustered)
    return own.with_columns(clustered["domain"]).select(columns or own.columns)


def read_table(path: Path, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """A table of the run, as its mark knows it.

    Raises:
        InputError: it is missing or damaged; names the file and the command that makes it anew.
    """
    try:
        return pl.read_parquet(
            io.BytesIO(_content(path)), columns=list(columns) if columns is not None else None
        )
    except _DAMAGE as error:
        raise _damaged(path, _first_line(error)) from error


def read_arrow(path: Path, columns: Sequence[str]) -> pa.Table:
    """`read_table` for those who read a few numbers of very many tables: a third of the time.

    Args:
        path: of the table.
        columns: among them `KEY`; what the table does not have is left out.

    Returns:
        The columns, each in one piece; source, file and domain as dictionaries.

    Raises:
        InputError: as `read_table`.
    """
    encoded = [name for name in columns if name in _ENCODED]
    try:
        with pq.ParquetFile(pa.BufferReader(_content(path)), read_dictionary=encoded) as file:
            table = file.read(columns=list(columns), use_threads=False)
    except (pa.ArrowException, KeyError, OSError) as error:
        raise _damaged(path, _first_line(error)) from error
    is_whole = all(column.num_chunks == 1 for column in table.columns)
    return table if is_whole else table.unify_dictionaries().combine_chunks()


def examples_arrow(run: RunFolder, part: Partition, columns: Sequence[str]) -> pa.Table:
    """`read_examples` as `read_arrow` reads."""
    if run.clusters.mark() is None and size_of(run.examples(part).path) is not None:
        return read_arrow(run.examples(part).path, columns)
    table = read_examples(run, part, columns).to_arrow()
    fields = [(name, table.column(name)) for name in columns]
    return pa.table({n: c.dictionary_encode() if n in _ENCODED else c for n, c in fields}
                    ).unify_dictionaries().combine_chunks()  # fmt: skip


def _content(path: Path) -> bytes:
    ensure(path)
    content = path.read_bytes()
    mark = Output(path).mark()
    if mark is not None and mark["digest"] != xxhash.xxh3_128_hexdigest(content):
        raise _damaged(path, "its bytes are not those that were written")
    return content


def table_columns(path: Path) -> list[str]:
    """Names of a table's columns.

    Raises:
        InputError: it is missing or damaged.
    """
    ensure(path)
    try:
        return pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, _first_line(error)) from error


@contextmanager
def damage_named(paths: Iterable[Path]) -> Generator[None]:
    """Around the reading of many tables at once: damage becomes an InputError that names the file.

    Raises:
        InputError: one of the tables is missing or damaged.
    """
    try:
        yield
    except _DAMAGE:
        for path in paths:
            read_table(path)
        raise


def meet(left: pl.DataFrame, right: pl.DataFrame) -> None:
    """Check that two tables hold the same examples in the same order.

    Raises:
        CurateError: they do not; names the first key that differs.
    """
    if left.height != right.height:
        raise CurateError(
            f"two tables of one partition have {left.height} and {right.height} rows",
            fix="run the stage that made the older one again",
        )
    for column in reversed(KEY):  # the row differs most often
        differs = left[column].ne_missing(right[column])
        if differs.any():
            at = differs.arg_max() or 0
            raise CurateError(
                f"two tables of one partition differ at row {at}:"
                f" {left.select(KEY).row(at)} against {right.select(KEY).row(at)}",
                fix="run the stage that made the older one again",
            )


def meet_arrow(left: pa.Table, right: pa.Table) -> None:
    """`meet` of what `read_arrow` has read."""
    is_same = left.num_rows == right.num_rows
    if is_same and all(_equal(left.column(name), right.column(name)) for name in KEY):
        return
    meet(*(pl.DataFrame({name: _plain(table.column(name)) for name in KEY})
           for table in (left, right)))  # fmt: skip


def _equal(left: pa.ChunkedArray, right: pa.ChunkedArray) -> bool:
    if pa.types.is_dictionary(left.type) and left.num_chunks == right.num_chunks == 1:
        values = left.chunk(0).dictionary, right.chunk(0).dictionary
        # As a rule there is one value, that of all rows.
        if len(values[0]) == len(values[1]) == 1 and left.null_count == right.null_count == 0:
            return values[0].equals(values[1])
    return _plain(left).equals(_plain(right))


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(pa.large_string()) if pa.types.is_dictionary(column.type) else column


def scan_examples(run: RunFolder) -> pl.LazyFrame:
    """The index of all partitions; its domains are the clustered ones where the run has any.

    Raises:
        InputError: as `scan` and `read_examples`.
    """
    index = scan(run, "examples")
    if run.clusters.mark() is None:
        return index
    clustered = [_clustered(run, part).path for part in run.partitions()]
    ensure(*clustered)
    with damage_named(clustered):
        names = index.collect_schema().names()
        domain = pl.scan_parquet(clustered, glob=False).select("domain")
        return pl.concat([index.drop("domain"), domain], how="horizontal").select(names)


def scan(run: RunFolder, folder: str) -> pl.LazyFrame:
    """One table of all partitions, in canonical order, read lazily; see `scan_examples` too.

    Args:
        run: the run folder.
        folder: of the table: `examples`, `plan`, `scores/el2n` ...

    Raises:
        InputError: a partition's table is missing: the stage has not finished.
    """
    paths = table_paths(run, folder)
    ensure(*paths)
    missing = [path for path in paths if not path.exists()]
    if missing or not paths:
        raise InputError(
            f"{run.root / folder} is not complete:"
            f" {len(missing)} of {len(paths)} tables are missing",
            fix=f"finish the stage first: `curate status {run.root}` says what is due",
        )
    with damage_named(paths):
        return pl.scan_parquet(paths, glob=False)


def _clustered(run: RunFolder, part: Partition) -> Output:
    """The clustered domains of a partition, made for the index and the clusters as they are."""
    output = run.domains(part)
    mark, clusters, index = output.mark(), run.clusters.mark(), run.examples(part).mark()
    made_from = [(entry or {}).get("clusters") for entry in (mark, clusters)]
    if mark is None or index is None or mark.get("rows") != index.get("rows"):
        made_from[0] = None
    if made_from[0] is None or made_from[0] != made_from[1]:
        raise InputError(
            f"{output.path} is missing or was made for other data or settings",
            fix=f"run `curate domains {run.root}`",
        )
    return output


def table_paths(run: RunFolder, folder: str) -> list[Path]:
    """One table of all partitions, as `scan` reads them; not all need be there."""
    return [run.root / folder / f"{part.name}.parquet" for part in run.partitions()]


def _damaged(path: Path, why: str) -> InputError:
    root = next((p for p in path.parents if RunFolder(p).config.is_file()), None)
    stage = root and _MADE_BY.get(path.relative_to(root).parts[0])
    again = f"`curate {stage} {root}`" if stage else "the same command"
    return InputError(
        f"{path} is missing or damaged: {why}",
        fix=f"remove what is left of it and run {again} again: only this partition is redone",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
