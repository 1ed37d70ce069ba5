"""Whether another seed would have given the same order.

Two views: from the `_std` columns of all rows, how much of a score's variance is not the spread
over seeds; and from what each checkpoint measured of some rows, the rank correlation of seeds.

Shapes: n sampled rows, S seeds.
"""

import re
from collections.abc import Mapping
from itertools import combinations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from curate.data.example import KEY
from curate.data.manifest import load_manifest
from curate.data.tables import read_table
from curate.errors import CurateError
from curate.evaluate.agreement import rank_correlations
from curate.report.document import Stability, StableColumn
from jobs.report_bins import rounded
from jobs.report_survey import Survey
from jobs.report_tables import Tables, titles

_ROWS = 5_000
_PARTS = 50
"""Partitions that are read once more for the rank correlation, evenly spread."""
_TRAINED = re.compile(r"quantities/(seed-(\d+)-step-\d+)/")


def stability_of(survey: Survey) -> Stability | None:
    """None where no score has a spread over seeds, and none was measured by several."""
    tables = survey.tables
    by_seed, rows = _by_seed(survey)
    short = titles(tables.columns)
    columns: list[StableColumn] = []
    for name in tables.columns:
        values = by_seed.get(name)
        spread = survey.spreads.get(f"{name}_std")
        if values is None and (spread is None or not spread.rows):
            continue
        pairs = _pairs(values) if values is not None else []
        seeds = values.shape[1] if values is not None else _num_seeds(tables)
        noise = spread.mean_square if spread is not None and spread.rows else None
        variance = survey.moments[name].variance
        columns.append(
            StableColumn(
                name=name,
                title=short[name],
                seeds=seeds,
                rank_correlation=rounded(float(np.mean(pairs))) if pairs else None,
                lowest=rounded(min(pairs)) if pairs else None,
                reliability=rounded(_reliability(noise, variance, seeds)),
                mean_std=rounded(spread.mean) if spread is not None and spread.rows else None,
                spread=rounded(variance**0.5),
            )
        )
    if not columns:
        return None
    notes: list[str] = []
    if rows and rows < survey.training:
        notes.append(f"rank correlations of seeds stand on {rows:,} of {survey.training:,} rows")
    return Stability(columns=columns, rows=rows or survey.training, notes=notes)


def _num_seeds(tables: Tables) -> int | None:
    train = tables.settings.checkpoints.train
    return len(train.seeds) if train is not None else None


def _reliability(noise: float | None, variance: float, seeds: int | None) -> float | None:
    """1 - (mean variance over seeds / S) / variance of the mean score over the examples."""
    if noise is None or not seeds or seeds < 2 or variance <= 0:
        return None
    return max(0.0, 1.0 - noise / seeds / variance)


def _pairs(values: NDArray[np.float64]) -> list[float]:
    """Rank correlations of every two seeds, those without an order left out."""
    found = rank_correlations(values)
    numbers = [float(found[pair]) for pair in combinations(range(values.shape[1]), 2)]
    return [number for number in numbers if np.isfinite(number)]


def _by_seed(survey: Survey) -> tuple[dict[str, NDArray[np.float64]], int]:
    """Column -> (n, S) of what each seed's checkpoints measured, and n; empty with one seed."""
    tables = survey.tables
    slugs = _slugs(tables)
    if len(slugs) < 2:
        return {}, 0
    places = _some(survey)
    from jobs.chosen import chosen_scorers  # torch and all that comes with it
    from jobs.score_columns import quantities_of
    from scorers.apply import columns_of

    try:
        chosen = chosen_scorers(tables.settings.score.named)
        frames = {slug: _rows(tables, slug, places) for own in slugs.values() for slug in own}
    except CurateError:  # a user's own scorer, or a checkpoint's table, has gone
        return {}, 0
    found: dict[str, NDArray[np.float64]] = {}
    for entry in chosen:
        wanted = [name for name in tables.columns if name.partition(".")[0] == entry.folder]
        if entry.kind != "pass" or entry.scorer is None or not wanted:
            continue
        seeds: list[pl.DataFrame] = []
        for own in slugs.values():
            measured = [quantities_of(frames[slug], entry.needs) for slug in own]
            if not all(measured):
                break
            seeds.append(columns_of(entry.scorer, measured, [0] * len(measured)))
        if len(seeds) < len(slugs):
            continue
        for name in wanted:
            column = name.partition(".")[2]
            if all(column in seed.columns for seed in seeds):
                found[name] = np.stack([seed[column].to_numpy() for seed in seeds], axis=1)
    return {name: values.astype(np.float64) for name, values in found.items()}, len(places)


def _slugs(tables: Tables) -> dict[int, list[str]]:
    """Seed -> folders under `quantities/` that the scores were made of."""
    files: Mapping[str, object] = load_manifest(tables.run)["stages"].get("score", {}).get(
        "files", {}
    )  # fmt: skip
    found: dict[int, set[str]] = {}
    for path in files:
        if (match := _TRAINED.match(path)) is not None:
            found.setdefault(int(match[2]), set()).add(match[1])
    return {seed: sorted(found[seed]) for seed in sorted(found)}


def _some(survey: Survey) -> NDArray[np.int64]:
    """(n, 2) partition and place of some sampled rows of a few partitions."""
    places = survey.sample_places
    numbers = np.unique(places[:, 0])
    if len(numbers) > _PARTS:
        numbers = numbers[np.linspace(0, len(numbers) - 1, _PARTS).round().astype(np.int64)]
        places = places[np.isin(places[:, 0], numbers)]
    return places[:: max(1, -(-len(places) // _ROWS))]


def _rows(tables: Tables, slug: str, places: NDArray[np.int64]) -> pl.DataFrame:
    """(n rows) what a checkpoint measured of them.

    Raises:
        InputError: a table is missing or damaged.
    """
    frames: list[pl.DataFrame] = []
    for number in np.unique(places[:, 0]).tolist():
        table = read_table(tables.run.quantities(tables.parts[number], slug).path).drop(KEY)
        frames.append(table[places[places[:, 0] == number, 1].tolist()])
    return pl.concat(frames)
