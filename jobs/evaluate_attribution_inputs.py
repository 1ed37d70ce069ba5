"""What `curate evaluate-attribution` tests: matrices and scores of the run, or from elsewhere.

    run/influence/<name>/matrix/part-….parquet      key, then a column for each target example

A matrix from elsewhere is a Parquet file, or a folder of them, with the same columns in the same
order; its rows are found by their key. What earlier settings, data or models left in the run is not
tested, unless the settings name it.

Shapes: N examples of a partition, Q target examples.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from curate.config import nearest
from curate.data.example import KEY, TRAIN
from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.data.reading import read_rows
from curate.data.tables import meet, read_examples, read_table
from curate.errors import ConfigError, InputError
from jobs.plan_tables import complete_scorers, score_columns
from jobs.score_finished import Finished
from jobs.settings import Settings
from jobs.target import target_folder

Floats = npt.NDArray[np.float64]

_OTHERS = ("num_scored", "scored_share")
"""Score columns that count what was read."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """One attribution: a score of every example for every target example."""

    name: str
    run: RunFolder
    num_queries: int
    """Of all target examples."""
    folder: Path | None = None
    """Tables like those of the run."""
    frame: pl.DataFrame | None = field(default=None, repr=False)
    """Rows from elsewhere."""

    @property
    def partitions(self) -> list[Partition]:
        return self.run.partitions()

    def read(self, part: Partition) -> Floats:
        """(N, Q) scores, NaN where there is none.

        Raises:
            InputError: the table is damaged, or of other examples.
        """
        keys = read_examples(self.run, part, KEY)
        if self.folder is not None:
            table = read_table(self.folder / f"{part.name}.parquet")
            meet(keys, table)
        else:
            assert self.frame is not None
            table = keys.join(self.frame, on=KEY, how="left", maintain_order="left")
        _check_width(self.name, table, self.num_queries)
        return table.drop(KEY).cast(pl.Float64).fill_null(float("nan")).to_numpy()


@dataclass(frozen=True, slots=True)
class Scores:
    """One score column."""

    name: str
    run: RunFolder
    scorer: str
    column: str

    @property
    def partitions(self) -> list[Partition]:
        return self.run.partitions()

    def read(self, part: Partition) -> Floats:
        """(N,) scores, NaN where there is none."""
        table = read_table(self.run.scores(part, self.scorer).path, [*KEY, self.column])
        meet(read_examples(self.run, part, KEY), table)
        return table[self.column].cast(pl.Float64).fill_null(float("nan")).to_numpy()


@dataclass(frozen=True, slots=True)
class Tested:
    """All that is tested; looked up before anything is trained, so that it fails early."""

    matrices: list[Matrix]
    scores: list[Scores]
    labels: tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]] | None
    """(N,) of all rows: wrong, and whether that is known."""
    notes: tuple[str, ...] = ()
    """What is left out, or tested though it is of other settings."""

    @classmethod
    def of(cls, settings: Settings, run: RunFolder, *, trains: bool) -> "Tested":
        """What there is.

        Args:
            settings: of the run.
            run: its folder.
            trains: whether there are subsets, and so an indexed target.

        Raises:
            ConfigError: a score column or a matrix is named wrongly.
            InputError: a matrix does not fit, or a column is missing.
        """
        finished = Finished.of(settings)
        scores = find_scores(settings, run, finished)
        labels = None if settings.attribution.labels is None else wrong_labels(settings, run)
        matrices = find_matrices(settings, run, finished, num_target(run)) if trains else []
        notes = _of_others(settings, run, finished, scores, matrices=trains)
        return cls(matrices, scores, labels, tuple(notes))


def num_target(run: RunFolder) -> int:
    """Target examples."""
    target = target_folder(run)
    return sum(read_examples(target, part, ["row"]).height for part in target.partitions())


def find_matrices(
    settings: Settings, run: RunFolder, finished: Finished, num_queries: int
) -> list[Matrix]:
    """Those that the settings make in the run, then those that they name.

    Args:
        settings: of the run.
        run: its folder.
        finished: what of the run is of these settings.
        num_queries: target examples.

    Raises:
        InputError: one that is named is missing, or does not fit.
        ConfigError: one that is named has the name of one of the run.
    """
    found = [
        Matrix(folder.parent.name, run, num_queries, folder=folder) for folder in finished.matrices
    ]
    for name, place in settings.attribution.matrices.items():
        if any(matrix.name == name for matrix in found):
            raise ConfigError(
                f"attribution.matrices names {name}, and this run has one of that name",
                fix="give it another name",
            )
        found.append(Matrix(name, run, num_queries, frame=_outside(name, Path(place), num_queries)))
    return found


def find_scores(settings: Settings, run: RunFolder, finished: Finished) -> list[Scores]:
    """The columns that the settings name, whoever made them; by default all that they make.

    Raises:
        ConfigError: one that is named does not exist.
    """
    known = _all_scores(run)
    wanted = settings.attribution.scores
    if not wanted:
        return [scores for scores in known if scores.scorer in finished.scorers]
    found: list[Scores] = []
    for name in wanted:
        fits = [s for s in known if name in (s.name, s.column, f"{s.scorer}.{s.column}")]
        exact = [s for s in fits if name == s.name]
        if len(exact or fits) != 1:
            several = " or ".join(s.name for s in fits)
            names = [s.name for s in known]
            raise ConfigError(
                f"attribution.scores names {name}, which "
                + (f"may be {several}" if fits else "has not been scored in this run"),
                fix=several or nearest(name, names) or f"use one of {', '.join(names) or 'none'}",
            )
        found += exact or fits
    return found


def _all_scores(run: RunFolder) -> list[Scores]:
    """All whole columns in the run, old ones too."""
    whole = set(complete_scorers(run))
    return [
        Scores(column if column == scorer else f"{scorer}.{column}", run, scorer, column)
        for scorer, columns in score_columns(run).items()
        if scorer in whole
        for column in columns
        if column not in _OTHERS and not column.endswith("_std")
    ]


def _of_others(
    settings: Settings,
    run: RunFolder,
    finished: Finished,
    scores: list[Scores],
    *,
    matrices: bool,
) -> list[str]:
    """Sentences on what in the run is not of these settings."""
    left: list[str] = []
    if matrices:
        folders = sorted((run.root / "influence").glob("*/matrix"))
        old = [each for each in folders if any(each.glob("part-*.parquet"))]
        names = [each.parent.name for each in old if each not in finished.matrices]
        left += [f"the matrix {name}" for name in names]
    if not settings.attribution.scores:
        others = dict.fromkeys(each.scorer for each in _all_scores(run))
        left += [f"the scores {name}" for name in others if name not in finished.scorers]
    notes: list[str] = []
    if left:
        notes.append(f"left out, as of other settings than these: {', '.join(left)}")
    named = [each.name for each in scores if each.scorer not in finished.scorers]
    if named:
        notes.append(f"{', '.join(named)}: tested as named, but of other settings than these")
    return notes


def wrong_labels(
    settings: Settings, run: RunFolder
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Of all rows in order, which labels are wrong, and of which training rows that is known.

    Raises:
        InputError: a file has no such column, or it does not fit the labels.
    """
    column = settings.attribution.labels
    assert column is not None
    wrong: list[npt.NDArray[np.bool_]] = []
    known: list[npt.NDArray[np.bool_]] = []
    for part in run.partitions():
        examples = read_examples(run, part, ["row", "label", "split"])
        rows = examples["row"].to_numpy()
        stored = read_rows(run, part, [column], rows)
        values = pl.Series(stored[column].to_pylist())
        classes = settings.sources[part.source].classes
        is_wrong = _is_wrong(values, examples["label"], classes, f"{part.source}/{part.file}")
        wrong.append(is_wrong.fill_null(False).to_numpy())
        known.append((is_wrong.is_not_null() & (examples["split"] == TRAIN)).to_numpy())
    return np.concatenate(wrong), np.concatenate(known)


def _is_wrong(
    values: pl.Series, labels: pl.Series, classes: tuple[str, ...], where: str
) -> pl.Series:
    """Null where it is not known."""
    if values.dtype == pl.Boolean:
        return values
    if values.dtype == pl.Null:
        return pl.Series([None] * len(values), dtype=pl.Boolean)
    if values.dtype == pl.String and classes:
        numbers = {name: number for number, name in enumerate(classes)}
        values = values.replace_strict(numbers, default=None, return_dtype=pl.Int64)
    if not values.dtype.is_integer():
        raise InputError(
            f"attribution.labels: the column of {where} holds {values.dtype}, neither true and"
            " false nor labels",
            fix="name a column of true and false, or of the right label",
        )
    return values.cast(pl.Int64) != labels


def _outside(name: str, place: Path, num_queries: int) -> pl.DataFrame:
    paths = sorted(place.glob("*.parquet")) if place.is_dir() else [place]
    paths = [path for path in paths if path.name != "targets.parquet"]  # of a run's own matrix
    if not paths or not all(path.is_file() for path in paths):
        raise InputError(
            f"attribution.matrices.{name}: there is no Parquet file at {place}",
            fix="name a file, or a folder of them",
        )
    try:
        frame = pl.concat([pl.read_parquet(path) for path in paths])
    except (pl.exceptions.PolarsError, OSError) as error:
        first = str(error).splitlines()[0]
        raise InputError(
            f"attribution.matrices.{name}: {place} cannot be read: {first}",
            fix="write it again, as Parquet",
        ) from error
    missing = [column for column in KEY if column not in frame.columns]
    if missing:
        raise InputError(
            f"attribution.matrices.{name}: {place} has no column {missing[0]!r}",
            fix="begin each row with source, file and row, as the tables of a run do",
        )
    _check_width(name, frame, num_queries)
    if frame.select(KEY).is_duplicated().any():
        raise InputError(
            f"attribution.matrices.{name}: some examples of {place} stand there twice",
            fix="keep one row for each example",
        )
    return frame.with_columns(pl.col("row").cast(pl.Int64))


def _check_width(name: str, table: pl.DataFrame, num_queries: int) -> None:
    columns = [column for column in table.columns if column not in KEY]
    if len(columns) != num_queries:
        raise InputError(
            f"{name} has {len(columns)} columns of scores, and the target {num_queries} examples",
            fix="give it one column for each target example, in the target's order",
        )
    odd = [column for column in columns if not table.schema[column].is_numeric()]
    if odd:
        raise InputError(
            f"{name}: the column {odd[0]!r} holds {table.schema[odd[0]]}",
            fix="write numbers",
        )
