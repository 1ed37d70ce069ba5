"""Self-influence from the gradient index: |L^-1 phi|^2 with the curvature of the training rows.

run/influence/<checkpoint>/                     index and curvature, shared with `influence`
run/quantities/self-influence-raw-<checkpoint>  value, loss and length of every example
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import polars as pl
import torch

from curate.config import plain
from curate.data.example import KEY
from curate.data.files import fingerprint
from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.data.tables import write_table
from curate.errors import ConfigError
from curate.models.projection import MATRICES, Projection
from jobs.influence import index_options, rows_by_name
from jobs.influence_build import build_tasks, build_work, pool_world
from jobs.influence_curvature import CurvatureOptions, curvature_plan, load_curvature
from jobs.influence_rows import known_rows, white_squares
from jobs.influence_sides import IndexOptions
from jobs.measurers import Measurer
from jobs.measuring import measurer_of
from jobs.own_passes import Phase
from jobs.run import Receipt, Task
from jobs.self_influence import NAME, raw_slug
from jobs.settings import Settings, parse_settings
from jobs.tokenizer import training_digests
from scorers.catalog import build_scorer
from scorers.influence import Influence
from scorers.self_influence import SelfInfluence

VERSION = 1
"""Raised when the same rows and factors would give other numbers."""


def whitened_phases(
    settings: Settings, options: SelfInfluence, chosen: Sequence[Measurer]
) -> tuple[list[Phase], dict[str, list[Task]]]:
    """What comes before the measuring, and checkpoint -> its tasks of measuring.

    Args:
        settings: of the run.
        options: of the scorer.
        chosen: checkpoints.
    """
    run = RunFolder(Path(settings.run))
    rows = build_tasks(pool_world(settings), chosen, index_of(options))
    by_name = rows_by_name(chosen, rows)
    curvature = CurvatureOptions(share=options.damping)
    training = training_digests(run)
    planned = curvature_plan(settings, chosen, curvature, by_name, training=training, scorer=NAME)
    phases = [Phase(f"{NAME}: gradients", rows, build_work), *planned.phases]
    found: dict[str, list[Task]] = {}
    for measurer in chosen:
        for part, row in zip(run.partitions(), by_name[measurer.name], strict=True):
            mark = fingerprint(
                stage="self-influence whitened",
                version=VERSION,
                rows=row.fingerprint,
                curvature=planned.stamps[measurer.name],
            )
            payload = {
                "settings": plain(settings),
                "measurer": {**asdict(measurer), "folder": str(measurer.folder)},
                "partition": asdict(part),
                "fingerprint": mark,
            }
            output = run.quantities(part, raw_slug(measurer))
            task = Task(f"{measurer.name}, {part.name}", payload, output, mark)
            found.setdefault(measurer.name, []).append(task)
    if all(task.is_done() for own in found.values() for task in own):
        phases = []  # nothing reads the index any more, which may have been removed
    return phases, found


def index_of(options: SelfInfluence) -> IndexOptions:
    """By default the same as that of `influence`, so that both share it."""
    parameters = MATRICES if options.parameters == "all" else options.parameters
    projection = Projection(parameters=parameters, dim=options.dim)
    return IndexOptions(projection=projection, reduction=options.reduction)


def check_index(settings: Settings, options: SelfInfluence) -> None:
    """Refuse two scorers of a run that would write over each other's index.

    Raises:
        ConfigError: they ask for different ones.
    """
    named = settings.score.named
    if options.metric != "whitened" or "influence" not in named:
        return
    other = cast(Influence, cast(object, build_scorer("influence", named["influence"])))
    if not other.uses_index:
        return
    own, its = plain(index_of(options)), plain(index_options(other))
    if other.metric == "influence":
        own |= {"curvature": "blocks", "damping": options.damping}
        its |= {"curvature": other.curvature, "damping": other.damping}
    differing = [name for name in own if own[name] != its[name]]
    if differing:
        raise ConfigError(
            "self_influence with metric whitened and influence share one index, and ask for"
            f" different ones: {', '.join(differing)}",
            fix="give both the same options, or use two runs",
        )


def whitened_work(payload: dict[str, Any]) -> Receipt:
    """Value, mean loss and counted positions of one partition with one checkpoint."""
    settings = parse_settings(payload["settings"])
    torch.set_num_threads(settings.cluster.threads)
    run, part = RunFolder(Path(settings.run)), Partition(**payload["partition"])
    measurer = measurer_of(payload["measurer"])
    known = known_rows(run, part, measurer.slug)
    values = white_squares(known, load_curvature(run, measurer.slug))
    rows = known.opened.table
    more = [name for name in ("num_positions", "num_scored") if name in rows.columns]
    table = rows.select(KEY).hstack([
        pl.Series("value", values).fill_nan(None).cast(pl.Float32),
        rows["loss"].cast(pl.Float32),
        *(rows[name].cast(pl.Float32) for name in more),
    ])  # fmt: skip
    unscored = table["value"].null_count()
    run.quantities(part, raw_slug(measurer)).write(
        lambda path: write_table(table, path),
        payload["fingerprint"],
        rows=table.height,
        unscored=unscored,
    )
    return {"rows": table.height, "unscored": unscored}
