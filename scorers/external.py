"""External: scores that were made elsewhere, joined to the examples by their key.

A Parquet or CSV table names each example by (source, file, row), by (file, row) where the run has
one source, or by the user's own id; its number columns become a score of their own. A folder of
the tool Bergson has a row of scores, or of a gradient, for each row of the source's files.

Source: the user's.
Departures: numbers are stored as float32.
Cost: one read of the table's matching rows per partition.
Shapes: N examples of a partition.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import polars as pl

from curate.config import STRICT, parse
from curate.data.bergson import Store, is_store, open_store, store_digest
from curate.data.example import KEY
from curate.data.files import digest_file, fingerprint
from curate.errors import ConfigError, InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class External:
    """One table; `{external: {quality: table.parquet}}` or `{quality: {path: ..., on: id}}`."""

    __pydantic_config__: ClassVar = STRICT

    path: str
    """Parquet or CSV file, or a folder of Bergson's scores or gradients."""
    on: Literal["key", "id", "auto"] = "auto"
    """What names the example: `source`, `file`, `row`, or `id`; auto looks at the columns."""
    columns: tuple[str, ...] = ()
    """Which columns are scores; by default every number column that is not part of the key."""
    queries: str | None = None
    """With a folder of gradients: another one, whose mean asks."""
    source: str | None = None
    """With a folder of Bergson: whose rows it has; may be left out where the run has one source."""

    @property
    def is_by_position(self) -> bool:
        """Whether it is a folder of Bergson, whose rows have no names."""
        return is_store(Path(self.path).expanduser())

    def digest(self) -> str:
        """Of all that the scores are read from."""
        path = Path(self.path).expanduser()
        if not self.is_by_position:
            return digest_file(path)
        asked = None if self.queries is None else store_digest(Path(self.queries).expanduser())
        return fingerprint(rows=store_digest(path), queries=asked)

    def scan(self) -> pl.LazyFrame:
        """The table, unread.

        Raises:
            InputError: it is missing or cannot be read.
            ConfigError: it is neither Parquet nor CSV.
        """
        path = Path(self.path).expanduser()
        if path.is_dir():
            raise InputError(
                f"{path} is a folder and none of Bergson's: it has no info.json",
                fix="name a Parquet or CSV file",
            )
        if not path.is_file():
            raise InputError(f"there is no score table {path}", fix="check the path")
        if self.queries is not None or self.source is not None:
            raise ConfigError(
                f"{path} is a table, and queries and source are for folders of Bergson",
                fix="remove them",
            )
        if path.suffix not in (".parquet", ".csv"):
            raise ConfigError(
                f"{path} is neither Parquet nor CSV", fix="save it as .parquet or .csv"
            )
        try:
            if path.suffix == ".parquet":
                table = pl.scan_parquet(path)
            else:
                names = pl.scan_csv(path).collect_schema().names()
                words = {name: pl.String() for name in ("source", "file", "id") if name in names}
                # An id such as 007 is a word; a guess would take it for a number.
                table = pl.scan_csv(path, schema_overrides=words, infer_schema_length=10_000)
            table.collect_schema()
        except (pl.exceptions.PolarsError, OSError) as error:
            raise InputError(
                f"{path} cannot be read: {error}", fix="save it again as Parquet"
            ) from error
        return table

    def key(self, *, single_source: bool) -> tuple[str, ...]:
        """Columns that the table is joined on.

        Args:
            single_source: whether the run has one source, so that `source` may be left out.

        Raises:
            ConfigError: the table has neither a key nor an id, or a folder could be of any of
                several sources.
        """
        if self.is_by_position:
            if self.source is None and not single_source:
                raise ConfigError(
                    f"{self.path} has rows without names, and the run has several sources",
                    fix="say with `source` whose rows they are",
                )
            return KEY
        names = self.scan().collect_schema().names()
        candidates = [KEY, *([KEY[1:]] if single_source else [])] if self.on != "id" else []
        candidates += [("id",)] if self.on != "key" else []
        for candidate in candidates:
            if set(candidate) <= set(names):
                return candidate
        raise ConfigError(
            f"{self.path} names no examples: it has the columns {', '.join(names)}",
            fix="add the columns source, file and row, or id",
        )

    def measurements(self) -> tuple[str, ...]:
        """Columns that become scores.

        Raises:
            ConfigError: a named column is missing or holds no numbers, or there is none.
        """
        if self.is_by_position:
            return self._chosen(self._open().columns)
        schema = self.scan().collect_schema()
        numbers = [
            name
            for name, kind in schema.items()
            if (kind.is_numeric() or kind == pl.Boolean) and name not in (*KEY, "id")
        ]
        for name in self.columns:
            if name not in numbers:
                kind = schema.get(name)
                raise ConfigError(
                    f"{self.path}: column {name} "
                    + ("does not exist" if kind is None else f"holds {kind}, no numbers"),
                    fix=f"choose among {', '.join(numbers) or 'no number columns'}",
                )
        chosen = self.columns or tuple(numbers)
        if not chosen:
            raise ConfigError(f"{self.path} has no number columns", fix="add one")
        return chosen

    def join(
        self,
        examples: pl.DataFrame,
        *,
        single_source: bool,
        files: Mapping[tuple[str, str], int] | None = None,
    ) -> pl.DataFrame:
        """Scores of the examples, in their order; null where the table says nothing.

        Args:
            examples: key columns and `id` of one partition.
            single_source: whether the run has one source.
            files: (source, file) -> its rows, of all files of the run in its order; a folder of
                Bergson needs them.

        Raises:
            InputError: the table names an example of this partition twice, or an id of the
                examples stands twice; or a folder has another number of rows than the files.
        """
        if self.is_by_position:
            return self._by_position(examples, files or {})
        key = list(self.key(single_source=single_source))
        wanted = examples.select(key)
        kinds = wanted.schema
        columns = self.measurements()
        table = self.scan().select(*(pl.col(name).cast(kinds[name]) for name in key), *columns)
        if "row" in key and wanted.height:  # lets Parquet skip what belongs to other partitions
            first, last = wanted["row"].min(), wanted["row"].max()
            table = table.filter(
                pl.col("file") == wanted["file"][0], pl.col("row").is_between(first, last)
            )
        try:  # only this partition's rows are ever held
            table = table.join(wanted.lazy().unique(), on=key, how="semi").collect(
                engine="streaming"
            )
        except (pl.exceptions.PolarsError, OSError) as error:
            raise InputError(
                f"{self.path} cannot be read: {error}",
                fix="make row a whole number and each score a number in every line",
            ) from error
        repeated = table.filter(table.select(key).is_duplicated())
        if repeated.height:
            first = ", ".join(f"{name} {repeated[name][0]}" for name in key)
            raise InputError(
                f"{self.path} has more than one row for {first}",
                fix="keep one row for each example",
            )
        numbers = [pl.col(name).cast(pl.Float32) for name in columns]
        found = wanted.join(table, on=key, how="left", maintain_order="left", validate="m:1")
        # An unmatched example and a number that is none are the same to a plan: not scored.
        return examples.select(KEY).hstack(
            found.select(number.fill_nan(None) for number in numbers)
        )

    def _by_position(
        self, examples: pl.DataFrame, files: Mapping[tuple[str, str], int]
    ) -> pl.DataFrame:
        store = self._open()
        starts: dict[tuple[str, str], int] = {}
        total = 0
        for (source, file), rows in files.items():
            if self.source in (None, source):
                starts[source, file] = total
                total += rows
        if store.num_rows not in (None, total) or store.last_row >= total:
            held = store.last_row + 1 if store.num_rows is None else store.num_rows
            raise InputError(
                f"{self.path} has {held:,} rows, the files of"
                f" {'the run' if self.source is None else self.source} have {total:,}",
                fix="score the same files, in the order of their names and without filters, or"
                " join a table on the key",
            )
        names = list(store.columns)
        values = pl.DataFrame(dict.fromkeys(names, pl.Series([], dtype=pl.Float64)))
        start = starts.get(examples.select(KEY[:2]).row(0)) if examples.height else None
        if start is not None:
            places = examples["row"].to_numpy()
            first = int(places.min())
            found = store.read(start + first, start + int(places.max()) + 1)
            values = pl.DataFrame(found[places - first], schema=names)
        else:
            values = values.clear(examples.height)
        columns = [pl.col(name).cast(pl.Float32).fill_nan(None) for name in self.measurements()]
        return examples.select(KEY).hstack(values.select(columns))

    def _open(self) -> Store:
        asked = None if self.queries is None else Path(self.queries).expanduser()
        return open_store(Path(self.path).expanduser(), asked)

    def _chosen(self, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in self.columns:
            if name not in names:
                raise ConfigError(
                    f"{self.path}: column {name} does not exist",
                    fix=f"choose among {', '.join(names)}",
                )
        return self.columns or names


def tables(options: dict[str, Any]) -> dict[str, External]:
    """Score name -> its table, from the options of `external`.

    Raises:
        ConfigError: there is no table, or an entry has an unknown key.
    """
    if not options or "path" in options:
        raise ConfigError(
            "external names no table" if not options else "external gives its table no name",
            fix="write {external: {quality: quality.parquet}}; quality is what the score is called",
        )
    found: dict[str, External] = {}
    for name, value in options.items():
        fields = cast(Any, {"path": value} if isinstance(value, str) else value)
        found[name] = parse(External, fields, where=f"score.scorers.external.{name}")
    return found
