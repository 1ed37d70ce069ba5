"""The gradient of a query with one checkpoint, made ready for the rows of its index.

Shapes: k numbers of a row.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor

from curate.data.layout import RunFolder
from curate.errors import ConfigError, InputError
from curate.models.index_pass import IndexPass, index_rows
from curate.models.index_rows import Header
from curate.models.influence_scores import odds_factors, unit_factors
from curate.models.load import LoadedModel
from curate.models.projection import blocks_of, describe
from curate.models.tasks import Encoded, Task
from curate.models.tasks.preference import REFERENCE
from curate.models.tokens import tokenizer_digest
from jobs.influence import index_options
from jobs.influence_build import vectors_output
from jobs.influence_curvature import curvature_output
from jobs.influence_fields import how_to_ask
from jobs.influence_queries import features_name, prepared
from jobs.influence_query import Query
from jobs.influence_ready import check_query, naming
from jobs.influence_rows import known_rows
from jobs.influence_sides import IndexOptions, common_facts, sides_of, sides_output
from jobs.measurers import Measurer
from jobs.measuring import batch_tokens, ready
from jobs.settings import Settings
from scorers.influence import Influence


class Asked(NamedTuple):
    """The query with one checkpoint."""

    header: Header
    values: Tensor
    """(1, k) float64, prepared."""
    loss: float
    encoded: Encoded


def asked_of(settings: Settings, options: Influence, measurer: Measurer, query: Query) -> Asked:
    """The query's gradient with one checkpoint, as rows of the pool are multiplied with it.

    Args:
        settings: of the run.
        options: of the scorer.
        measurer: the checkpoint.
        query: what is asked about.

    Raises:
        InputError: nothing of the query counts, or its gradient is not finite.
        ConfigError: it lacks what the task reads, or the index is of another model, tokenizer,
            task or projection.
    """
    run = RunFolder(Path(settings.run))
    task, loaded = ready(settings, measurer)
    index = index_options(options, is_target=True)
    header, rows, loss, encoded = _gradient(settings, task, loaded, measurer, index, query)
    part = run.partitions()[0]
    vectors = vectors_output(run, part, measurer.slug)
    with naming(run, options, vectors):
        known = known_rows(run, part, measurer.slug)
    check_query(run, known.header, header, vectors.path.parent)
    values = rows.double()
    if options.metric == "trak":
        counts = float(encoded.num_scored[0]) if index.reduction == "sum" else 1.0
        values = values * torch.from_numpy(odds_factors(np.array([loss * counts])))[:, None]
    elif options.metric == "cosine":
        values = values * torch.from_numpy(unit_factors(values))[:, None]
    with naming(run, options, curvature_output(run, measurer.slug, features_name(options))):
        values = prepared(run, values, options, measurer.slug)
    return Asked(header, values, loss, encoded)


def _gradient(
    settings: Settings,
    task: Task,
    loaded: LoadedModel,
    measurer: Measurer,
    index: IndexOptions,
    query: Query,
) -> tuple[Header, Tensor, float, Encoded]:
    """(1, k) projected gradient of the query's loss, what it is of, and the loss."""
    encoded = _encoded(settings, task, query)
    run = RunFolder(Path(settings.run))
    place = sides_output(run, measurer.slug)
    axes = (place.mark() or {}).get("fingerprint")
    sides = sides_of(loaded, index, place=place, stamp=axes)
    taken: list[Tensor] = []
    columns, _ = index_rows(
        IndexPass(loaded.model, task, sides, reduction=index.reduction),
        task,
        encoded,
        lambda _, rows: taken.append(rows.cpu()),
        batch_tokens=batch_tokens(settings.score, loaded.device.type),
        device=loaded.device,
    )
    rows = taken[-1]
    if not bool(rows.isfinite().all()):
        raise InputError(
            f"the gradient of the query is not finite with {measurer.name}",
            fix="try model.dtype: float32",
        )
    header = Header(
        dtype="float32",
        num_rows=1,
        first_row=0,
        blocks=blocks_of(sides),
        projection=describe(index.projection, sides),
        model=measurer.digest,
        tokenizer=None if loaded.tokenizer is None else tokenizer_digest(loaded.tokenizer),
        reduction=index.reduction,
        task=common_facts(settings, [measurer], index)["task_digest"],
    )
    return header, rows, float(columns["loss"][0]), encoded


def _encoded(settings: Settings, task: Task, query: Query) -> Encoded:
    """The query as numbers.

    Raises:
        InputError: nothing of it counts.
        ConfigError: it lacks what the task reads.
    """
    fix = how_to_ask(settings)
    needs = getattr(task, "needs_reference", False)
    if needs and not set(REFERENCE) <= set(query.fields.columns):
        raise ConfigError(
            "pairs of answers are compared with a reference, which has not measured this query",
            fix=fix,
        )
    try:
        encoded = task.encode(query.fields)
    except (ConfigError, pl.exceptions.PolarsError) as error:
        what = error.what if isinstance(error, ConfigError) else str(error)
        raise ConfigError(f"the query lacks what the task reads: {what}", fix=fix) from error
    if not encoded.num_scored[0]:
        why = encoded.problems.get(0, "nothing in it counts")
        raise InputError(f"the query cannot be scored: {why}", fix=fix)
    return encoded
