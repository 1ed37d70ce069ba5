"""What the passes of `density_ratio` do with each partition, and over the whole pool."""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from safetensors.numpy import load_file, save_file

from curate.data.example import KEY, TRAIN
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.data.tables import read_examples, write_table
from curate.errors import CurateError, InputError
from jobs.density_ratio_fit import (
    NAME,
    Fit,
    Values,
    Work,
    load_fit,
    open_work,
    usable_of,
    values_of,
    vectors_of,
)
from jobs.run import Receipt
from jobs.target import target_folder
from scorers.density_ratio import DensityRatio, Scale, is_supported, scale_of, weights_of

log = logging.getLogger(__name__)

LEAST_SHARE = 0.05
"""Of effective examples, below which weights are refused."""

MOST_LOST = 0.5
"""Of the target's examples, above which weights are refused that nothing in the pool can bear."""

_SHOWN = 5


def ratios_output(run: RunFolder, part: Partition) -> Output:
    return Output(run.root / NAME / "ratios" / f"{part.name}.safetensors")


def target_output(run: RunFolder) -> Output:
    return Output(run.root / NAME / "target.parquet")


def judge_work(payload: dict[str, Any]) -> Receipt:
    """Log ratios of one partition, each by a model that did not see the example."""
    work = open_work(payload)
    part = Partition(**payload["partition"])
    examples = read_examples(work.run, part, ["content", "split"])
    is_train = (examples["split"] == TRAIN).to_numpy()
    vectors = vectors_of(work, is_target=False)
    values = values_of(work, part, int(payload["index"]), vectors, is_target=False)
    found = _judged(load_fit(work), values, examples["content"].to_numpy(), is_train)
    unscored = int(np.isnan(found).sum())
    ratios_output(work.run, part).write(
        lambda path: save_file({"log_ratios": found, "is_train": is_train}, path),
        work.stamp, unscored=unscored,
    )  # fmt: skip
    return {"rows": len(found), "unscored": unscored}


def _judged(
    fit: Fit, values: Values, contents: npt.NDArray[np.uint64], is_train: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """(N,) log ratios, NaN where there is nothing to read."""
    found = np.full(len(contents), np.nan)
    usable = np.flatnonzero(usable_of(values))
    if not len(usable):
        return found
    read = values if isinstance(values, list) else values[usable]
    places = fit.folds.of(contents[usable], is_train[usable])
    found[usable] = fit.models.log_ratios(fit.features.apply(read), places)
    return found


def weigh_work(payload: dict[str, Any]) -> Receipt:
    """Clip, normalise, and look at the target from the other side.

    Raises:
        CurateError: the weights leave too few effective examples, or most of the target has
            nothing like it in the pool.
        InputError: no example has anything to read.
    """
    work = open_work(payload)
    ratios = np.concatenate([own[is_train] for own, is_train in _ratios(work.run)])
    ratios = ratios[~np.isnan(ratios)]
    if not len(ratios):
        raise InputError(
            "density_ratio: no example of the pool can be read", fix="check its text or vectors"
        )
    scale = scale_of(ratios, clip=work.options.clip)
    table = _target_table(work, ratios)
    facts = _facts(scale, len(ratios), table)
    _report(facts, table, work.options)
    target_output(work.run).write(lambda path: write_table(table, path), work.stamp, **facts)
    _remove_strays(work.run)
    return facts


def _ratios(
    run: RunFolder,
) -> Iterator[tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]]:
    for part in run.partitions():
        found = load_file(ratios_output(run, part).path)
        yield found["log_ratios"], found["is_train"]


def _target_table(work: Work, ratios: npt.NDArray[np.float64]) -> pl.DataFrame:
    """Key, log ratio and support of each target example; null where there is nothing to read."""
    folder, fit = target_folder(work.run), load_fit(work)
    vectors = vectors_of(work, is_target=True)
    tables: list[pl.DataFrame] = []
    for index, part in enumerate(folder.partitions()):
        examples = read_examples(folder, part, [*KEY, "content"])
        values = values_of(work, part, index, vectors, is_target=True)
        is_train = np.ones(examples.height, dtype=np.bool_)
        found = _judged(fit, values, examples["content"].to_numpy(), is_train)
        tables.append(
            examples.select(KEY).with_columns(
                pl.Series("log_ratio", found).fill_nan(None),
                pl.Series("is_supported", is_supported(found, ratios)),
            )
        )
    return pl.concat(tables)


def _facts(scale: Scale, num_rows: int, table: pl.DataFrame) -> dict[str, Any]:
    readable = table.filter(pl.col("log_ratio").is_not_null())
    return {
        "rows": num_rows,
        "cut": scale.cut,
        "mean": scale.mean,
        "effective": round(scale.effective, 3),
        "effective_share": round(scale.effective / num_rows, 6),
        "target_rows": readable.height,
        "target_unreadable": table.height - readable.height,
        "target_without_support": int((~readable["is_supported"]).sum()),
    }


def _report(facts: dict[str, Any], table: pl.DataFrame, options: DensityRatio) -> None:
    lost = facts["target_without_support"]
    if lost:
        readable = pl.col("log_ratio").is_not_null()
        rows = table.filter(readable & ~pl.col("is_supported"))["row"].head(_SHOWN).to_list()
        log.warning("density_ratio: %d of %d target examples are less like the pool than any"
                    " example of it, rows %s first: no weight can stand for them",
                    lost, facts["target_rows"], ", ".join(map(str, rows)))  # fmt: skip
    log.info("density_ratio: %.0f effective examples of %d", facts["effective"], facts["rows"])
    if options.force:
        return
    fix = ("to choose examples set the option `force: true` of the scorer density_ratio under"
           " score.scorers and rank by density_ratio_log; for weights lower its option `clip`"
           " there")  # fmt: skip
    if facts["effective_share"] < LEAST_SHARE:
        raise CurateError(
            f"density_ratio: the weights leave {facts['effective']:,.0f} effective examples of"
            f" {facts['rows']:,}, {100 * facts['effective_share']:.2g} %, below"
            f" {100 * LEAST_SHARE:.0f} %: target and pool hardly overlap",
            fix=fix,
        )
    if lost > MOST_LOST * facts["target_rows"]:
        raise CurateError(
            f"density_ratio: {lost} of {facts['target_rows']} target examples have nothing like"
            " them in the pool: weights cannot stand for the target",
            fix=fix.partition(";")[0],
        )


def table_work(payload: dict[str, Any]) -> Receipt:
    """Weights, log ratios and probabilities of one partition; null where there is no ratio."""
    work = open_work(payload)
    part = Partition(**payload["partition"])
    mark = target_output(work.run).mark() or {}
    scale = Scale(mark["cut"], mark["mean"], mark["effective"])
    found = load_file(ratios_output(work.run, part).path)["log_ratios"]
    values = {
        "density_ratio": weights_of(found, scale),
        "density_ratio_log": found,
        "density_ratio_probability": 1 / (1 + np.exp(-np.clip(found, -700, 700))),
    }
    columns = pl.DataFrame(values).fill_nan(None).cast(pl.Float32)
    table = read_examples(work.run, part, KEY).hstack(columns)
    unscored = int(np.isnan(found).sum())
    work.run.quantities(part, NAME).write(
        lambda path: write_table(table, path), work.stamp, rows=table.height, unscored=unscored
    )
    return {"rows": table.height, "unscored": unscored}


def _remove_strays(run: RunFolder) -> None:
    """Ratios of partitions that are no longer part of the data."""
    names = {part.name for part in run.partitions()}
    for path in (run.root / NAME / "ratios").glob("part-*.safetensors"):
        if path.stem not in names:
            Output(path).remove()
