"""Results of proxy runs from CSV or Parquet files: the mixture of each run, and its losses.

One file: a column for each domain with its share of the tokens, and a column `loss.NAME` for each
loss; or two, mixtures and losses, that meet by the column `run`, `run_id` or `index`, as in Olmix
(`ratios.csv`, `metrics.csv`) and RegMix (`train_mixture_1m.csv`, `train_pile_loss_1m.csv`). Lower
losses are better. The columns `name` and those that name the run are not domains, and where
columns begin with `share.` only these are.

Shapes: n runs, m domains of the mixture, q losses.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from curate.config import nearest
from curate.errors import ConfigError, InputError, counted
from mixers.laws import Floats

IDS = ("run", "run_id", "index")
_NO_DATA = (*IDS, "name")
SHARE, LOSS, TOKENS = "share.", "loss.", "tokens."
_TOLERANCE = 0.01 + 1e-9
"""How far shares may be from adding up to 1: rounded ones are scaled."""


@dataclass(frozen=True, slots=True)
class Runs:
    """What proxies were trained on, and what came of it."""

    names: tuple[str, ...]
    """(n,) of the runs."""
    domains: tuple[str, ...]
    """(m,)"""
    mixtures: Floats
    """(n, m) rows on the simplex."""
    targets: tuple[str, ...]
    """(q,) names of the losses."""
    losses: Floats
    """(n, q) as they stand; NaN where there is none."""
    notes: tuple[str, ...] = ()


def read_runs(paths: Sequence[Path]) -> Runs:
    """Results from one file, or from one of mixtures and one of losses.

    Raises:
        ConfigError: neither one nor two files.
        InputError: a file is missing or is no table, a column is missing or no number, a run stands
            twice, or shares do not add up to 1.
    """
    if len(paths) not in (1, 2):
        raise ConfigError(
            f"mix.results names {len(paths)} files",
            fix="give one, or two: mixtures, then losses",
        )
    first = _table(paths[0])
    if len(paths) == 1:
        return _from_one(first, paths[0])
    return _from_two(first, _table(paths[1]), paths)


@dataclass(frozen=True, slots=True)
class Amounts:
    """Runs that differ in how many tokens they had, and the loss of each of their domains."""

    names: tuple[str, ...]
    """(n,) of the runs."""
    domains: tuple[str, ...]
    """(m,)"""
    tokens: Floats
    """(n, m)"""
    losses: Floats
    """(n, m) of the domains, nats."""
    notes: tuple[str, ...] = ()


def read_amounts(path: Path) -> Amounts:
    """Results from a file with `tokens.DOMAIN` and `loss.DOMAIN` for each domain.

    Raises:
        InputError: the file is missing or is no table, a domain lacks one of the two columns, a
            cell is no number, or a run stands twice.
    """
    table = _table(path)
    domains = [name.removeprefix(TOKENS) for name in table.columns if name.startswith(TOKENS)]
    lacking = [name for name in domains if f"{LOSS}{name}" not in table.columns]
    if not domains or lacking:
        missing = f"{LOSS}{lacking[0]}" if lacking else f"{TOKENS}DOMAIN"
        raise InputError(
            f"{path} has no column {missing}",
            fix="give tokens.DOMAIN and loss.DOMAIN of every domain, and a row for each run",
        )
    names = _names(table, path)
    losses = _floats(table, [f"{LOSS}{name}" for name in domains], path, empty=True)
    tokens = _floats(table, [f"{TOKENS}{name}" for name in domains], path, empty=False)
    finite = np.isfinite(losses)
    good = finite.all(axis=1)
    kept: list[bool] = np.asarray(good).tolist()
    return Amounts(
        tuple(name for name, fine in zip(names, kept, strict=True) if fine),
        tuple(domains),
        tokens[good],
        losses[good],
        _aside(names, finite, domains),
    )


def amounts_table(amounts: Amounts) -> pl.DataFrame:
    """The runs as one table that `read_amounts` reads back."""
    tokens = {f"{TOKENS}{name}": amounts.tokens[:, at] for at, name in enumerate(amounts.domains)}
    losses = {f"{LOSS}{name}": amounts.losses[:, at] for at, name in enumerate(amounts.domains)}
    return pl.DataFrame({"run": list(amounts.names), **tokens, **losses})


def chosen_losses(runs: Runs, target: Mapping[str, float]) -> tuple[Runs, Floats]:
    """The losses that count, the runs that have all of them, and the weights of these losses.

    Args:
        runs: as read.
        target: loss -> weight; all alike where it is empty.

    Returns:
        The runs, and (q,) weights that sum to 1.

    Raises:
        ConfigError: a loss is unknown, or no weight is above 0.
    """
    check_target(target, runs.targets)
    given = target or dict.fromkeys(runs.targets, 1.0)
    kept = [place for place, name in enumerate(runs.targets) if given.get(name, 0.0) > 0]
    if not kept:
        raise ConfigError("no weight of mix.target is above 0", fix="give a loss a weight")
    losses = runs.losses[:, kept]
    finite = np.isfinite(losses)
    whole = finite.all(axis=1)
    good: list[bool] = np.asarray(whole).tolist()
    targets = tuple(runs.targets[place] for place in kept)
    weights = np.array([given[runs.targets[place]] for place in kept])
    found = replace(
        runs,
        names=tuple(name for name, fine in zip(runs.names, good, strict=True) if fine),
        mixtures=runs.mixtures[whole],
        targets=targets,
        losses=losses[whole],
        notes=(*runs.notes, *_aside(runs.names, finite, targets)),
    )
    return found, weights / weights.sum()


def check_target(target: Mapping[str, float], known: Sequence[str]) -> None:
    """Refuse a target that names a loss which the runs do not have.

    Raises:
        ConfigError: names it, and what it may be.
    """
    for name in target:
        if name not in known:
            raise ConfigError(
                f"mix.target names {name!r}, which is no loss of the runs",
                fix=nearest(name, known) or f"use some of {', '.join(known[:10])}",
            )


def runs_table(runs: Runs) -> pl.DataFrame:
    """The runs as one table that `read_runs` reads back."""
    shares = {f"{SHARE}{name}": runs.mixtures[:, at] for at, name in enumerate(runs.domains)}
    losses = {f"{LOSS}{name}": runs.losses[:, at] for at, name in enumerate(runs.targets)}
    return pl.DataFrame({"run": list(runs.names), **shares, **losses})


def _from_one(table: pl.DataFrame, path: Path) -> Runs:
    targets = [name for name in table.columns if name.startswith(LOSS)]
    domains = _domain_columns([name for name in table.columns if name not in targets])
    if not targets or not domains:
        missing = "no column loss.NAME" if not targets else "no column of a domain"
        raise InputError(
            f"{path} has {missing}",
            fix="name losses loss.NAME, or give two files: mixtures, then losses",
        )
    names = _names(table, path)
    mixtures, notes = _shares(_floats(table, domains, path, empty=False), names, path)
    return Runs(
        tuple(names),
        tuple(name.removeprefix(SHARE) for name in domains),
        mixtures,
        tuple(name.removeprefix(LOSS) for name in targets),
        _floats(table, targets, path, empty=True),
        notes,
    )


def _from_two(first: pl.DataFrame, second: pl.DataFrame, paths: Sequence[Path]) -> Runs:
    keys = [_run_names(table, path) for table, path in zip((first, second), paths, strict=True)]
    places = {name: row for row, name in enumerate(keys[1])}
    common = [(row, places[name]) for row, name in enumerate(keys[0]) if name in places]
    if not common:
        raise InputError(
            f"no run of {paths[0]} is in {paths[1]}", fix="give two files of the same runs"
        )
    left, right = first[[row for row, _ in common]], second[[row for _, row in common]]
    names = [keys[0][row] for row, _ in common]
    domains, targets = _domain_columns(first.columns), _data_columns(second.columns)
    if not domains or not targets:
        empty = paths[0] if not domains else paths[1]
        raise InputError(f"{empty} has no column of numbers", fix="check the two files' order")
    mixtures, notes = _shares(_floats(left, domains, paths[0], empty=False), names, paths[0])
    alone = len(keys[0]) + len(keys[1]) - 2 * len(common)
    if alone:
        notes = (*notes, f"{counted(alone, 'run')} in one of the two result files only, left out")
    return Runs(
        tuple(names),
        tuple(_without(domains, "train_", "")),
        mixtures,
        tuple(_without(_without(targets, LOSS, ""), "metric/", "_val_loss")),
        _floats(right, targets, paths[1], empty=True),
        notes,
    )


def _table(path: Path) -> pl.DataFrame:
    if not path.is_file():
        raise InputError(f"there is no file of results {path}", fix="check mix.results")
    try:
        if path.suffix == ".parquet":
            return pl.read_parquet(path)
        return pl.read_csv(path, infer_schema_length=None)
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path} cannot be read as a table: {reason}", fix="save it as CSV with a header"
        ) from error


def _aside(
    names: Sequence[str], finite: npt.NDArray[np.bool_], losses: Sequence[str]
) -> tuple[str, ...]:
    """A note on runs that lack a loss: how many, which, and which loss.

    Args:
        names: (n,) of the runs.
        finite: (n, q) whether a loss is a finite number.
        losses: (q,) their names.
    """
    aside = [name for name, row in zip(names, finite, strict=True) if not row.all()]
    if not aside:
        return ()
    which = f" ({', '.join(aside[:10])}{' ...' if len(aside) > 10 else ''})"
    lacking = {
        f"{LOSS}{name}": int(count)
        for name, count in zip(losses, (~finite).sum(0), strict=True)
        if count
    }
    if len(lacking) == 1:
        why = f"{next(iter(lacking))} is no finite number"
    else:
        worst = sorted(lacking, key=lambda name: -lacking[name])[:5]
        named = ", ".join(f"{name} ({lacking[name]} of them)" for name in worst)
        why = f"{named}{' ...' if len(lacking) > 5 else ''} are no finite numbers"
    start = f"{len(aside)} of {counted(len(names), 'run')} set aside"
    return (f"{start}{which if len(aside) < len(names) else ''}: {why}",)


def _names(table: pl.DataFrame, path: Path) -> list[str]:
    """Of the runs: as the file says, or their numbers."""
    if not any(name in table.columns for name in IDS):
        return [str(number) for number in range(table.height)]
    return _run_names(table, path)


def _run_names(table: pl.DataFrame, path: Path) -> list[str]:
    named = [name for name in IDS if name in table.columns]
    if not named:
        raise InputError(
            f"{path} has no column that names its runs", fix=f"add one of {', '.join(IDS)}"
        )
    names = [str(value) for value in table[named[0]]]
    _check_once(names, path)
    return names


def _check_once(names: Sequence[str], path: Path) -> None:
    seen = set[str]()
    for name in names:
        if name in seen:
            raise InputError(f"{path} has the run {name} twice", fix="leave one of them out")
        seen.add(name)


def _data_columns(columns: Sequence[str]) -> list[str]:
    return [name for name in columns if name and name not in _NO_DATA]


def _domain_columns(columns: Sequence[str]) -> list[str]:
    said = [name for name in columns if name.startswith(SHARE)]
    return said or _data_columns(columns)


def _without(names: Sequence[str], prefix: str, suffix: str) -> list[str]:
    """Names without what all of them begin and end with."""
    if not all(name.startswith(prefix) and name.endswith(suffix) for name in names):
        return list(names)
    return [name.removeprefix(prefix).removesuffix(suffix) for name in names]


def _floats(table: pl.DataFrame, columns: Sequence[str], path: Path, *, empty: bool) -> Floats:
    """(rows, columns); NaN where a cell is empty, if it may be."""
    found = np.empty((table.height, len(columns)))
    for place, name in enumerate(columns):
        values = table[name].cast(pl.Float64, strict=False)
        bad = values.is_null() & table[name].is_not_null()
        if not empty:
            bad = bad | values.is_null() | ~values.is_finite().fill_null(value=False)
        if bad.any():
            row = int(bad.arg_true()[0])
            raise InputError(
                f"{path}, row {row + 1}: {name} is {table[name][row]!r}, no number",
                fix="correct the cell, or remove the column if it is neither domain nor loss",
            )
        found[:, place] = values.fill_null(math.nan).to_numpy()
    return found


def _shares(values: Floats, names: Sequence[str], path: Path) -> tuple[Floats, tuple[str, ...]]:
    """Rows on the simplex, and a note where they were not quite."""
    sums = values.sum(1)
    wrong = (values < 0).any(1) | (np.abs(sums - 1) > _TOLERANCE)
    if wrong.any():
        row = int(wrong.argmax())
        raise InputError(
            f"{path}: the shares of run {names[row]} add up to {sums[row]:.6g}, or are below 0",
            fix="give each domain's share of the tokens; the columns of a row add up to 1",
        )
    rounded = int((np.abs(sums - 1) > 1e-6).sum())
    notes = (f"{counted(rounded, 'mixture')} of the results scaled to add up to 1",)
    return values / sums[:, None], notes if rounded else ()
