"""Scoring a table that is in memory: the same numbers, without a run folder."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import torch

from curate.data.columns import resolve_columns
from curate.data.example import KEY, Source
from curate.data.index import Rules, counts_by_reason, index_rows
from curate.data.reading import field_frame
from curate.errors import ConfigError
from curate.models.load import LoadedModel, load_model, tokenizer_of
from curate.models.quantities import measure
from curate.models.settings import Model, Score
from curate.models.tasks import build_task, task_class
from curate.models.tokens import count_tokens, text_columns
from jobs.chosen import Chosen, chosen_scorers, needed
from jobs.history import stacked
from jobs.measurers import seeds_of
from jobs.measuring import as_columns, batch_tokens, counts_of
from jobs.score_columns import quantities_of, scored_columns, table_quantities
from scorers.apply import columns_of, plain_columns

log = logging.getLogger(__name__)

NAME = "dataset"
"""Source of every key: a table in memory has no file."""

_PART_ROWS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """What measures a table in memory."""

    model: Model = field(default_factory=Model)
    task: Any = None
    """Settings of the task; None where no scorer needs a model."""
    checkpoints: tuple[Path, ...] = ()
    """Folders in place of `model.name`."""
    score: Score = field(default_factory=Score)
    seed: int = 0
    threads: int = 1


def score_table(table: pa.Table, source: Source, how: Measure) -> pl.DataFrame:
    """One row of score columns for each row of the table, in its order.

    A row that the index of a run would set aside, and one with nothing to score, has nulls. With
    checkpoints of several seeds (see `jobs.measurers.seeds_of`) `<column>_std` is their spread.

    Args:
        table: any columns.
        source: which of them hold what; only its column settings are read.
        how: model, task, scorers.

    Raises:
        ConfigError: a scorer, an option or the model does not fit, or two scorers have a column
            of the same name.
        InputError: a column is missing or of the wrong type, or the model is missing.
    """
    torch.set_num_threads(how.threads)
    chosen = chosen_scorers(how.score.named)
    _check(chosen, how)
    resolved = resolve_columns(source, table.schema, where="the data set")
    rules = Rules(
        seed=how.seed,
        held_out=0.0,
        num_classes=getattr(how.task, "num_classes", None),
        several_sources=False,
    )
    indexed = index_rows(table, resolved, name=NAME, file="", first_row=0, rules=rules)
    if indexed.quarantine.height:
        first = indexed.quarantine.row(0, named=True)
        log.warning("%d rows are not scored (%s); the first is row %d: %s",
                    indexed.quarantine.height, counts_by_reason(indexed.quarantine),
                    first["row"], first["detail"])  # fmt: skip
    examples = indexed.examples
    fields = field_frame(table.take(pa.array(examples["row"])), resolved)
    fields = examples.select(KEY).hstack(fields).with_columns(examples["label"])
    measured = _measured(chosen, _with_reference(chosen, fields, how), how)
    extra = _from_table(chosen, examples, fields, how)
    scores = _columns(chosen, measured, seeds_of(how.checkpoints) or [0], extra)
    place = pl.DataFrame({"row": np.arange(table.num_rows)})
    keyed = scores.with_columns(examples["row"])
    return place.join(keyed, on="row", how="left", maintain_order="left").drop("row")


def _measured(chosen: Sequence[Chosen], fields: pl.DataFrame, how: Measure) -> list[pl.DataFrame]:
    """Quantities of all examples, one table for each checkpoint."""
    if not any(entry.kind in ("pass", "log") for entry in chosen):
        return []
    found: list[pl.DataFrame] = []
    for folder in how.checkpoints or (None,):
        loaded = load_model(how.model, how.task, checkpoint=folder)
        found.append(_pass(loaded, fields, how, needed(chosen)))
    return found


def _with_reference(chosen: Sequence[Chosen], fields: pl.DataFrame, how: Measure) -> pl.DataFrame:
    """What a reference model says of the examples beside them, where the task has one."""
    from jobs.references import reference_columns

    if not any(entry.kind in ("pass", "log") for entry in chosen):
        return fields
    if not getattr(task_class(how.task), "needs_reference", False):
        return fields
    name = how.task.reference or how.model.name
    is_first = how.task.reference is None and Path(name or "") in how.checkpoints
    if name is None or is_first:
        raise ConfigError(
            "the answers are compared with a reference model, but none is named",
            fix="pass model= the model that training started from, or the task's reference",
        )
    model = replace(how.model, name=name, config=None, adapter=None, lora=None)
    loaded = load_model(model, how.task)
    budget = batch_tokens(how.score, loaded.device.type)
    return fields.hstack(reference_columns(loaded, how.task, fields, budget=budget))


def _pass(
    loaded: LoadedModel, fields: pl.DataFrame, how: Measure, wanted: frozenset[str]
) -> pl.DataFrame:
    task = build_task(how.task, loaded.tokenizer, max_positions=loaded.max_positions)
    budget = batch_tokens(how.score, loaded.device.type)
    parts: list[pl.DataFrame] = []
    for start in range(0, max(1, fields.height), _PART_ROWS):
        part = fields[start : start + _PART_ROWS]
        encoded = task.encode(part)
        values, _ = measure(
            loaded.model,
            task,
            encoded,
            batch_tokens=budget,
            device=loaded.device,
            wanted=wanted,
            is_compiled=how.score.compile,
        )
        parts.append(as_columns(values))
        counts_of(encoded, part.select(KEY).hstack(parts[-1]))
    return pl.concat(parts)


def _from_table(
    chosen: Sequence[Chosen], examples: pl.DataFrame, fields: pl.DataFrame, how: Measure
) -> dict[str, np.ndarray]:
    """Quantities that need no model."""
    tokens = None
    if any("num_tokens" in entry.needs for entry in chosen):
        tokens = _num_tokens(fields, how)
    return table_quantities(
        examples.select(KEY).rows(), examples["num_chars"].to_numpy(), tokens, seed=how.seed
    )


def _num_tokens(fields: pl.DataFrame, how: Measure) -> np.ndarray | None:
    if not text_columns(fields):
        return np.ones(fields.height, dtype=np.int64)
    if not isinstance(how.model.tokenizer, str) and how.model.name is None:
        return None
    folder = Path(how.model.name or "")
    return count_tokens(fields, tokenizer_of(how.model, folder))


def _columns(
    chosen: Sequence[Chosen],
    measured: Sequence[pl.DataFrame],
    seeds: Sequence[int],
    extra: Mapping[str, np.ndarray],
) -> pl.DataFrame:
    found: dict[str, pl.Series] = {}
    for entry in chosen:
        if entry.scorer is None:
            continue
        if entry.kind in ("pass", "log"):
            each, own = _each(entry, measured, seeds, extra)
            columns = columns_of(entry.scorer, each, own)
            if len(set(seeds)) == 1:
                columns = columns.select(
                    name for name in columns.columns if name.removesuffix("_std") == name
                    or name.removesuffix("_std") not in columns.columns
                )  # fmt: skip
        else:
            columns = plain_columns(entry.scorer, extra)
        for column in columns:
            if column.name in found:
                raise ConfigError(
                    f"two scorers have a column {column.name}", fix="call them one at a time"
                )
            found[column.name] = column
    if measured and "num_scored" not in found:
        found |= {name: measured[0][name] for name in scored_columns(measured[0])}
    return pl.DataFrame([series.alias(name) for name, series in found.items()])


def _each(
    entry: Chosen,
    measured: Sequence[pl.DataFrame],
    seeds: Sequence[int],
    extra: Mapping[str, np.ndarray],
) -> tuple[list[dict[str, np.ndarray]], list[int]]:
    """Quantities by checkpoint, or by training run where its history is asked for; their seeds."""
    if entry.kind == "pass":
        each = [quantities_of(frame, entry.needs) | dict(extra) for frame in measured]
        return each, list(seeds)
    own = sorted(set(seeds))
    of = [
        [frame for frame, seed in zip(measured, seeds, strict=True) if seed == each] for each in own
    ]
    return [stacked(frames, frames[0].height) for frames in of], own


def _check(chosen: Sequence[Chosen], how: Measure) -> None:
    for entry in chosen:
        if entry.table is not None:
            raise ConfigError(
                "external joins tables to the examples of a run", fix="join them yourself here"
            )
        if entry.kind == "own":
            raise ConfigError(
                f"{entry.name} makes passes of its own, which need a run folder",
                fix="score it with `curate score CONFIG`",
            )
        if entry.kind in ("pass", "log") and how.task is None:
            raise ConfigError(
                f"{entry.name} is measured by a model, but no task is set",
                fix='set task, such as task="causal-lm"',
            )
