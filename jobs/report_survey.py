"""The first pass over a run's tables: sizes, ranges, reasons, and which examples are shown.

Shapes: N rows of a partition, K columns of scores.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import polars as pl
from numpy.typing import NDArray

from curate.data.example import TRAIN
from curate.data.partitions import Partition
from curate.plan.positions import Bits
from curate.plan.weights import WeightSums
from jobs.report_best import Best, draws
from jobs.report_bins import Spread
from jobs.report_tables import Tables

SAMPLE_ROWS = 50_000
"""Rows that rank correlations stand on, where there are more."""
PER_REASON = 4
"""Examples of each reason."""
_MOST_PICKED = 24
"""Columns whose ends are shown."""
_SIZES = ("rows", "tokens", "kept_rows", "kept_tokens")


@dataclass(slots=True)
class Sizes:
    """Rows and tokens, there and kept, by the values of one column."""

    column: str
    _parts: list[pl.DataFrame] = field(default_factory=list[pl.DataFrame])
    _height: int = 0

    def add(self, rows: pl.DataFrame) -> None:
        """Add training rows with the columns `tokens`, `kept_rows` and `kept_tokens`."""
        found = rows.group_by(pl.col(self.column).cast(pl.String).alias("name")).agg(
            pl.len().cast(pl.Int64).alias("rows"), *(pl.col(name).sum() for name in _SIZES[1:])
        )
        self._parts.append(found)
        self._height += found.height
        if self._height > 200_000:
            self._parts = [self.table()]
            self._height = self._parts[0].height

    def table(self) -> pl.DataFrame:
        """name, rows, tokens, kept_rows, kept_tokens; the largest first."""
        if not self._parts:
            return pl.DataFrame(schema={"name": pl.String} | dict.fromkeys(_SIZES, pl.Int64))
        found = pl.concat(self._parts).group_by("name").agg(pl.col(_SIZES).sum())
        if self.column == "label" and found["name"].null_count() == found.height:
            return found.clear()  # there are no labels
        return found.sort(["rows", "name"], descending=[True, False], nulls_last=True)


@dataclass(slots=True)
class Moments:
    """Mean and mean square of a column, streamed; values that are not finite are left out."""

    rows: int = 0
    mean: float = 0.0
    _moved: float = 0.0
    """Sum of squares about the mean."""

    def add(self, values: NDArray[np.float64]) -> None:
        """Add (N,) values."""
        values = values[np.isfinite(values)]
        if not len(values):
            return
        # Chan, Golub and LeVeque's update: no difference of large sums.
        mean, total = float(values.mean()), self.rows + len(values)
        gap = mean - self.mean
        self._moved += float(((values - mean) ** 2).sum())
        self._moved += gap**2 * self.rows * len(values) / total
        self.mean += gap * len(values) / total
        self.rows = total

    @property
    def variance(self) -> float:
        """Of all that was added; 0 where nothing was."""
        return self._moved / self.rows if self.rows else 0.0

    @property
    def mean_square(self) -> float:
        """Mean of the squares."""
        return self.variance + self.mean**2


@dataclass(slots=True)
class Survey:
    """What the first pass found."""

    tables: Tables
    rows: int = 0
    held_out: int = 0
    tokens: int = 0
    """Of the training rows."""
    domains: Sizes = field(default_factory=lambda: Sizes("domain"))
    labels: Sizes = field(default_factory=lambda: Sizes("label"))
    sources: Sizes = field(default_factory=lambda: Sizes("source"))
    reasons: Counter[str] = field(default_factory=Counter[str])
    columns: dict[str, Spread] = field(default_factory=dict[str, Spread])
    moments: dict[str, Moments] = field(default_factory=dict[str, Moments])
    spreads: dict[str, Moments] = field(default_factory=dict[str, Moments])
    """Of the columns that end in `_std`."""
    longest: int = 0
    """Tokens, or characters, of the longest training row."""
    weights: WeightSums = field(default_factory=WeightSums)
    weight_spread: Spread = field(default_factory=Spread)
    copies: Counter[int] = field(default_factory=Counter[int])
    highest: dict[str, Best] = field(default_factory=dict[str, Best])
    lowest: dict[str, Best] = field(default_factory=dict[str, Best])
    random: Best = field(default_factory=lambda: Best(0))
    of_reason: dict[str, Best] = field(default_factory=dict[str, Best])
    duplicate_sizes: Counter[int] = field(default_factory=Counter[int])
    _sample: list[NDArray[np.float64]] = field(default_factory=list[NDArray[np.float64]])
    _sampled: list[Bits] = field(default_factory=list[Bits])
    _drawn: list[NDArray[np.int64]] = field(default_factory=list[NDArray[np.int64]])

    @property
    def training(self) -> int:
        """Training rows."""
        return self.rows - self.held_out

    @property
    def sample(self) -> NDArray[np.float64]:
        """(n, K) scores of some training rows, NaN where unscored; all rows where they are few."""
        self._shrink()
        return self._sample[0] if self._sample else np.zeros((0, len(self.tables.columns)))

    @property
    def sample_places(self) -> NDArray[np.int64]:
        """(n, 2) number of the partition, and place in it, of the rows of `sample`."""
        self._shrink()
        return self._drawn[0] if self._drawn else np.zeros((0, 2), np.int64)

    def sample_add(self, frame: pl.DataFrame, part: int, hashes: Bits) -> None:
        """Add the rows of a partition to what is drawn from; without scores there is no need."""
        if not self.tables.columns:
            return
        values = frame.select(pl.col(self.tables.columns).cast(pl.Float64)).to_numpy()
        self._sample.append(np.nan_to_num(values, nan=np.nan, posinf=np.nan, neginf=np.nan))
        self._sampled.append(hashes)
        places = frame["place"].to_numpy().astype(np.int64)
        self._drawn.append(np.stack([np.full_like(places, part), places], axis=1))
        if sum(map(len, self._sampled)) > 2 * SAMPLE_ROWS:
            self._shrink()

    def _shrink(self) -> None:
        """Only the rows with the smallest hashes stay, in the run's order."""
        if not self._sampled:
            return
        values, hashes = np.concatenate(self._sample), np.concatenate(self._sampled)
        drawn = np.concatenate(self._drawn)
        if len(hashes) > SAMPLE_ROWS:
            chosen = np.sort(np.argpartition(hashes, SAMPLE_ROWS)[:SAMPLE_ROWS])
            values, hashes, drawn = values[chosen], hashes[chosen], drawn[chosen]
        self._sample, self._sampled, self._drawn = [values], [hashes], [drawn]


def survey(tables: Tables, *, examples: int) -> Survey:
    """Go through all tables once.

    Args:
        tables: of the run.
        examples: how many of each end of a score are shown; three times as many are drawn.

    Raises:
        CurateError: a table is damaged, or is not of the same examples.
    """
    ordered = [name for name in tables.columns if name != "random.random"]
    picked = ordered[:_MOST_PICKED]
    found = Survey(
        tables,
        columns={name: Spread() for name in tables.columns},
        moments={name: Moments() for name in tables.columns},
        spreads={name: Moments() for name in tables.beside if name.endswith("_std")},
        highest={name: Best(examples) for name in picked},
        lowest={name: Best(examples) for name in picked},
        random=Best(3 * examples),
    )
    per_reason = PER_REASON if examples else 0
    for number, part, frame in tables.frames():
        found.rows += frame.height
        frame = frame.with_row_index("place")
        if tables.has_plan:
            _add_reasons(found, number, part, frame, per_reason)
        training = frame.filter(pl.col("split") == TRAIN)
        found.held_out += frame.height - training.height
        if training.height:
            _add_sizes(found, training)
            _add_scores(found, number, part, training)
    return found


def _add_reasons(
    found: Survey, number: int, part: Partition, frame: pl.DataFrame, count: int
) -> None:
    """Count the reasons of all rows, and draw a few examples of each."""
    hashes = draws(part, frame["row"].to_numpy(), seed=found.tables.settings.seed, label="reasons")
    places = frame["place"].to_numpy().astype(np.int64)
    for (reason,), own in frame.with_row_index("at").group_by("reason"):
        at = own["at"].to_numpy()
        best = found.of_reason.setdefault(str(reason), Best(count))
        best.add(hashes[at], hashes[at], number, places[at])
        found.reasons[str(reason)] += own.height


def _add_sizes(found: Survey, training: pl.DataFrame) -> None:
    """Sizes before and after, lengths, weights."""
    tables = found.tables
    unit = "num_chars" if tables.lengths is None else "num_tokens"
    copies = pl.col("copies").cast(pl.Int64) if tables.has_plan else pl.lit(0, pl.Int64)
    tokens = pl.lit(1, pl.Int64) if tables.unit == "examples" else pl.col("num_tokens")
    rows = training.with_columns(
        tokens=tokens,
        kept_rows=(copies > 0).cast(pl.Int64),
        kept_tokens=copies * tokens,
    )
    found.tokens += int(rows["tokens"].sum())
    lengths = training["num_chars"] if unit == "num_chars" else training["num_tokens"]
    longest: int | None = lengths.max()  # pyright: ignore[reportAssignmentType]
    found.longest = max(found.longest, longest or 0)
    found.domains.add(rows)
    found.sources.add(rows)
    found.labels.add(rows)
    if tables.has_plan:
        kept = training.filter(pl.col("keep"))
        times = kept["copies"].to_numpy().astype(np.int64)
        weight = kept["weight"].to_numpy().astype(np.float64)
        found.weights.add(weight, times)
        found.weight_spread.add(weight)
        values, counts = np.unique(times, return_counts=True)
        found.copies.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))


def _add_scores(found: Survey, number: int, part: Partition, training: pl.DataFrame) -> None:
    """Ranges, ends and the sample."""
    rows = training["row"].to_numpy()
    places = training["place"].to_numpy().astype(np.int64)
    seed = found.tables.settings.seed
    ties = draws(part, rows, seed=seed, label="examples")
    found.random.add(ties, ties, number, places)
    for name, spread in found.columns.items():
        values = training[name].cast(pl.Float64).to_numpy()
        spread.add(values)
        found.moments[name].add(values)
        if name == "duplicates.duplicate_size":
            sizes, counts = np.unique(values[np.isfinite(values)], return_counts=True)
            own = zip(sizes.astype(np.int64).tolist(), counts.tolist(), strict=True)
            found.duplicate_sizes.update(dict(own))
        if name in found.highest:
            known = np.isfinite(values)
            found.highest[name].add(-values[known], ties[known], number, places[known])
            found.lowest[name].add(values[known], ties[known], number, places[known])
    for name, moments in found.spreads.items():
        moments.add(training[name].cast(pl.Float64).to_numpy())
    found.sample_add(training, number, draws(part, rows, seed=seed, label="sample"))
