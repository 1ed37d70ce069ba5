"""How near influence scores of a model come to the damped exact answer; for `curate doctor`.

    fisher     metric influence: projected gradients, curvature layer by layer
    ekfac      metric ekfac
    gradients  metrics dot and cosine: no curvature at all
    datainf    the mean of inverses, which no metric stands on

The exact answer takes conjugate gradients on Gauss-Newton products: about two training steps over
the rows for each iteration of each of ten queries. See `curate.models.influence_check`.
"""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl
import torch

from curate.data.example import Source
from curate.errors import ConfigError, InputError, counted
from curate.models.influence_check import Check as How
from curate.models.influence_check import influence_distances
from curate.models.influence_distance import QUERIES, Distance
from curate.models.load import load_model
from curate.models.projection import Projection, choose_parameters, draw_sides
from curate.models.tasks import Encoded, Task, build_task
from curate.models.tasks.preference import REFERENCE
from jobs.check_examples import given_examples
from jobs.doctor import Check
from jobs.measuring import batch_tokens
from jobs.model_check import Asked, asked_model
from scorers.catalog import build_scorer
from scorers.influence import Influence, Metric

log = logging.getLogger(__name__)

WAYS: dict[Metric, str] = {
    "influence": "fisher",
    "trak": "fisher",
    "ekfac": "ekfac",
    "dot": "gradients",
    "cosine": "gradients",
}
"""Metric -> the way that is nearest to it."""
LEAST_ROWS = 2 * QUERIES
"""Fewer leave nothing to rank."""
_TOLERANCE = 1e-3
"""Of the exact solution: what is compared is ranks."""
COARSE = 0.1
"""Residual of the exact answer above which nothing can be judged by it."""
LOW = 0.5
"""Rank correlation below which the chosen way is noted."""


@dataclass(frozen=True, slots=True)
class Nearness:
    """What the comparison found."""

    metric: str
    """Of the settings' scorer `influence`, or its default."""
    way: str
    """The nearest of `ways`."""
    rows: int
    """Training rows."""
    queries: int
    damping: float
    """Share of a layer's mean eigenvalue."""
    seconds: float
    residual: float
    """Of the worst exact answer, as a share of the query's length; 0.1 is too much to judge by."""
    ways: dict[str, dict[str, float]]
    """Way -> relative_error, scale, pearson, spearman, num_queries: means over the queries."""

    def check(self) -> Check:
        """As one line among the others."""
        own = self.ways[self.way]["spearman"]
        best = max(self.ways, key=lambda name: self.ways[name]["spearman"])
        text = (
            f"{self.way} (metric {self.metric}) ranks {counted(self.rows, 'row')} like the damped"
            f" exact answer with a correlation of {own:.2f}, mean of"
            f" {counted(self.queries, 'query', 'queries')}"
        )
        if self.residual > COARSE:
            text = (
                f"the exact answer was not found: conjugate gradients left {self.residual:.2f} of"
                " a query, and what follows says little"
            )
            return Check("influence", "note", text, "raise influence.damping, or give fewer rows")
        if not own < LOW:
            return Check("influence", "ok" if math.isfinite(own) else "note", text)
        fix = "raise dim, or the rows of this check"
        if best != self.way:
            fix += f"; {best} reaches {self.ways[best]['spearman']:.2f}"
        return Check("influence", "note", text, fix)


def influence_nearness(
    name: str | None, config: Path | None, *, kind: str | None, data: str | None, rows: int
) -> Nearness:
    """Compare all ways on the first rows of some data; the last ten are the queries.

    Args:
        name: folder or hub id; or
        config: settings whose model, scorer and data are taken.
        kind: of the task, where the model does not say it.
        data: examples; those of the settings' first source by default.
        rows: how many to look at.

    Raises:
        ConfigError: too few rows are asked for, or there is no data.
        InputError: too few of them can be scored.
    """
    if rows < LEAST_ROWS:
        raise ConfigError(
            f"{rows} rows are too few to compare with {QUERIES} queries",
            fix=f"give --influence {LEAST_ROWS} or more; some hundreds say most",
        )
    asked = asked_model(name, config, kind)
    options = _options(asked)
    loaded = load_model(replace(asked.model, dtype="float32"), asked.task)
    loaded.model.double()  # conjugate gradients lose their way in float32
    task = build_task(asked.task, loaded.tokenizer, max_positions=loaded.max_positions)
    encoded = _encoded(task, data, asked, rows)
    projection = Projection(
        parameters=options.layers,
        head=options.head,
        dim=options.dim,
        seed=options.seed,
        entries=options.entries,
    )
    sides = draw_sides(
        loaded.model,
        dim=options.dim,
        seed=options.seed,
        layers=choose_parameters(loaded.model, projection),
        entries=options.entries,
    )
    if asked.settings is not None:
        torch.set_num_threads(asked.settings.cluster.threads)
    of = "" if asked.checkpoint is None else f" of {asked.checkpoint}"
    log.info("influence%s: %d rows against %d queries; the exact answer takes a while",
             of, len(encoded) - QUERIES, QUERIES)  # fmt: skip
    started = time.monotonic()
    budget = 16_384
    if asked.settings is not None:
        budget = batch_tokens(asked.settings.score, loaded.device.type)
    how = How(
        rank=options.rank,
        damping=options.damping,
        reduction=options.reduction,
        batch_tokens=max(1, budget // 4),
        tolerance=_TOLERANCE,
    )
    residuals: list[float] = []
    found = influence_distances(
        loaded.model,
        task,
        encoded,
        device=loaded.device,
        how=how,
        sides=sides,
        residuals=residuals,
    )
    return Nearness(
        metric=options.metric,
        way=WAYS[options.metric],
        rows=int((encoded.num_scored > 0).sum()) - QUERIES,
        queries=QUERIES,
        damping=options.damping,
        seconds=round(time.monotonic() - started, 1),
        residual=max(residuals),
        ways=_plain(found),
    )


def _plain(found: Mapping[str, Distance]) -> dict[str, dict[str, float]]:
    """The best first."""
    order = sorted(found, key=lambda name: -found[name].spearman)
    return {name: found[name]._asdict() for name in order}


def _options(asked: Asked) -> Influence:
    """Of the settings' scorer `influence`; its defaults where there is none."""
    named: Mapping[str, Any] = asked.settings.score.named if asked.settings is not None else {}
    found = build_scorer("influence", named.get("influence", {}))
    assert isinstance(found, Influence)
    return found


def _encoded(task: Task, data: str | None, asked: Asked, rows: int) -> Encoded:
    sources: Mapping[str, Source] = asked.settings.sources if asked.settings is not None else {}
    source = asked.source
    if data is None:
        if not sources:
            raise ConfigError(
                "influence is compared on examples of the user's, and there are none",
                fix="add --data FILE, or --config FILE with sources",
            )
        source = next(iter(sources.values()))
        data = source.path if isinstance(source.path, str) else source.path[0]
    fields = given_examples(data, source, rows=rows)
    if getattr(task, "needs_reference", False):  # any will do: approximations are to be compared
        fields = fields.with_columns(pl.lit(0.0).alias(each) for each in REFERENCE)
    encoded = task.encode(fields)
    scored = int((encoded.num_scored > 0).sum())
    if scored < LEAST_ROWS:
        why = next(iter(encoded.problems.values()), "the others hold nothing that counts")
        raise InputError(
            f"only {counted(scored, 'row')} of {data} can be scored: {why}",
            fix=f"give data with {LEAST_ROWS} rows or more",
        )
    return encoded
