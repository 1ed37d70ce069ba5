"""What workers do for `spread` at last: is it more than noise, and then scores of all examples."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from safetensors.numpy import load_file, save_file

from curate.data.example import KEY
from curate.data.files import read_json, write_json
from curate.data.partitions import Partition
from curate.data.tables import read_examples, read_table, write_table
from curate.errors import CurateError, InputError, counted
from curate.evaluate.fidelity import Fidelity, chance_level, fidelity, fold_numbers, out_of_fold
from curate.vectors.spreading import Ridge, by_neighbours, fit_ridge, unit
from curate.vectors.store import Floats, Positions, Vectors
from jobs.spread_work import LEAST, NAME, Scores, Work, check_neighbours, draws, open_work
from scorers.spread import MEASURED

FOLDS = 5


@dataclass(frozen=True, slots=True)
class Measured:
    """The examples of the core set that have a vector and all scores."""

    names: list[str]
    """C columns; those of the scorer that are not null throughout."""
    rows: Floats
    """(M, d) at length 1."""
    scores: Scores
    """(M, C)."""
    keys: pl.DataFrame
    """(M rows) key and position."""


def read_measured(work: Work, vectors: Vectors) -> Measured:
    """What spreads: the measured examples."""
    table = read_table(work.places.scores.path)
    names = [c for c in work.options.inner.columns if table[c].null_count() < table.height]
    table = table.drop_nulls(names) if names else table.clear()
    rows = unit(vectors.take(table["position"].to_numpy()))
    return Measured(names, rows, table.select(names).to_numpy().astype(np.float64), table)


def fidelity_work(payload: dict[str, Any]) -> dict[str, Any]:
    """Cross-validation in the core set, and the linear map of all of it."""
    work = open_work(payload)
    measured = read_measured(work, work.vectors())
    main = next(iter(work.options.inner.columns))
    num = len(measured.rows) if main in measured.names else 0
    if num < LEAST:
        size = read_table(work.places.scores.path).height
        raise InputError(
            f"{work.options.name} gave {counted(num, 'example')} of {size:,} in the core set a"
            f" score: too few to spread, which takes {LEAST}",
            fix=f"look at them with `curate show {work.places.core}`, or raise spread.core",
        )
    check_neighbours(work.options, num)
    folds = fold_numbers(draws(measured.keys, work, "folds"), FOLDS)
    methods = ["neighbours", "ridge"] if work.options.method == "auto" else [work.options.method]
    found: dict[str, dict[str, Fidelity]] = {}
    for method in methods:
        estimated = out_of_fold(folds, _estimator(work, measured, method))
        found[method] = {
            name: fidelity(measured.scores[:, i], estimated[:, i])
            for i, name in enumerate(measured.names)
        }
    best = max(methods, key=lambda method: found[method][main].rank_correlation)
    arrays: dict[str, npt.NDArray[Any]] = {}
    if best == "ridge":
        arrays = fit_ridge(measured.rows, measured.scores)._asdict()
    facts: dict[str, Any] = {
        "examples": num,
        "folds": FOLDS,
        "chance": chance_level(num),
        "method": best,
        "fidelity": {
            method: {name: one._asdict() for name, one in columns.items()}
            for method, columns in found.items()
        },
    }
    write_json(work.places.root / "fidelity.json", facts)
    arrays["examples"] = np.array([num])
    work.places.fit.write(lambda path: save_file(arrays, path), work.stamp, **facts)
    return {"method": best}


def _estimator(
    work: Work, measured: Measured, method: str
) -> Callable[[Positions, Positions], Scores]:
    def estimate(known: Positions, wanted: Positions) -> Scores:
        rows, scores = measured.rows[known], measured.scores[known]
        if method == "ridge":
            return fit_ridge(rows, scores).predict(measured.rows[wanted])
        return _by_neighbours(work, measured.rows[wanted], rows, scores)

    return estimate


def _by_neighbours(work: Work, queries: Floats, rows: Floats, scores: Scores) -> Scores:
    options = work.options
    return by_neighbours(
        queries, rows, scores, k=options.neighbours, temperature=options.temperature,
        threads=work.settings.cluster.threads,
    )  # fmt: skip


def gate_work(payload: dict[str, Any]) -> dict[str, Any]:
    """Refuse a score that does not spread; leave out other columns that do not.

    Raises:
        CurateError: names the rank correlation and the recall.
    """
    work = open_work(payload)
    options = work.options
    facts = work.places.fit.mark() or {}
    method = str(facts["method"])
    columns: dict[str, dict[str, float]] = facts["fidelity"][method]
    least = max(options.min_rank_correlation, float(facts["chance"]))
    main = next(iter(options.inner.columns))
    rho, recall = columns[main]["rank_correlation"], columns[main]["top_recall"]
    figures = f"rank correlation {rho:.2f}, {100 * recall:.0f} % of the highest tenth found"
    is_below = rho < least
    if is_below and not options.force:
        raise CurateError(
            f"{main} does not spread from {counted(facts['examples'], 'example')} to others: by"
            f" {method}, in cross-validation, {figures}; the least is {least:.2f}"
            f" (chance gives up to {facts['chance']:.2f}, and 10 %)",
            fix=f"measure all examples with {options.name} itself, try other vectors or a larger"
            " spread.core, or set spread.force: true to have it all the same",
        )
    passed = [
        name for name in columns if options.force or columns[name]["rank_correlation"] >= least
    ]
    pool = (work.places.choice.mark() or {})["pool"]
    says = f"{main} spread from {facts['examples']:,} of {pool:,} examples by {method}: {figures}"
    says += "; below the gate, but forced" if is_below else ""
    outside = [name for name in columns if name not in passed]
    says += f"; not spread: {', '.join(outside)}" if outside else ""
    told = {"method": method, "columns": passed, "says": says, **columns[main]}
    work.places.gate.write(
        lambda path: write_json(path, {**told, "all": columns}), work.stamp, **told
    )
    return {"says": says}


def tables_work(payload: dict[str, Any]) -> dict[str, Any]:
    """Scores of one partition: what was measured as it is, all else spread from it."""
    work = open_work(payload)
    part, index = Partition(**payload["partition"]), int(payload["index"])
    keys = read_examples(work.run, part, KEY)
    vectors = work.vectors()
    measured = read_measured(work, vectors)
    gate = read_json(work.places.gate.path)
    queries = unit(vectors.part(index))
    missing = np.isnan(queries).any(axis=1)
    if gate["method"] == "ridge":
        arrays = load_file(work.places.fit.path)
        estimated = Ridge(*(arrays[name] for name in Ridge._fields)).predict(queries)
    else:
        estimated = _by_neighbours(work, queries, measured.rows, measured.scores)
    core = read_table(work.places.scores.path)
    first = int(vectors.starts[index])
    core = core.filter(pl.col("position").is_between(first, first + keys.height - 1))
    rows = core["position"].to_numpy() - first
    flags = np.where(missing, np.nan, 0.0)
    flags[rows] = 1.0
    found: dict[str, npt.NDArray[np.float64]] = {}
    for name in work.options.inner.columns:
        whole = np.full(keys.height, np.nan)
        if name in gate["columns"]:
            whole = estimated[:, measured.names.index(name)].copy()
        whole[rows] = _or_nan(core[name])
        found[name] = whole
    table = keys.hstack(_columns({**found, MEASURED: flags}))
    work.run.quantities(part, NAME).write(
        lambda path: write_table(table, path), work.stamp, rows=table.height,
        measured=len(rows), unscored=int(missing.sum()),
    )  # fmt: skip
    return {"rows": table.height, "unscored": int(missing.sum())}


def _or_nan(values: pl.Series) -> Scores:
    return values.cast(pl.Float64).fill_null(float("nan")).to_numpy()


def _columns(found: Mapping[str, Scores]) -> list[pl.Series]:
    return [
        pl.Series(name, values.astype(np.float32)).fill_nan(None) for name, values in found.items()
    ]


def part_payload(part: Partition, index: int) -> dict[str, Any]:
    """What says which partition a task is about."""
    return {"partition": asdict(part), "index": index}
