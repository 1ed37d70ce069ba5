"""The core set of `spread` as a run of its own: indexed, scored by the same stages, opened by the
same commands."""

from dataclasses import replace
from typing import Any

import polars as pl

from curate.config import plain
from curate.data.columns import resolve_columns
from curate.data.cutting import LEAST_ROWS
from curate.data.example import KEY, Source
from curate.data.layout import RunFolder
from curate.data.reading import stored_schema
from curate.data.tables import read_table, write_table
from curate.models.settings import Checkpoints, Tokenizer
from curate.plan.settings import Plan
from jobs.all_stages import run_stages, stages_for
from jobs.chosen import Chosen, chosen_scorers
from jobs.cluster import Pool
from jobs.compare_settings import Compare
from jobs.measurers import measurers
from jobs.opening import open_run
from jobs.run import Listener, Receipt
from jobs.settings import Settings
from jobs.spread_work import Places, Work, open_work
from scorers.spread import Spread

_PARTITIONS = 16
_LEAST_ROWS = 1024


def inner_scorer(options: Spread) -> Chosen:
    """The scorer that measures, as one of a run."""
    return chosen_scorers({options.name: options.options})[0]


def reads_checkpoints(entry: Chosen) -> bool:
    """Whether a scorer measures with the checkpoints of the run, and not with models of its own."""
    return entry.kind in ("pass", "log") or entry.name == "vog"


def inner_settings(settings: Settings, options: Spread) -> Settings:
    """The settings of the run with the scorer that measures as the only one."""
    named = {options.name: options.options}
    return replace(settings, score=replace(settings.score, scorers=(named,)))


def measure_core(payload: dict[str, Any], pool: Pool, listener: Listener) -> Receipt:
    """Index and score the core set in its own run folder, and gather its scores."""
    work = open_work(payload)
    with open_run(core_settings(work)) as settings:
        run_stages(settings, stages_for(settings, "score"), pool=pool, listener=listener)
    table = _gathered(work.places, work.options)
    work.places.scores.write(lambda path: write_table(table, path), work.stamp, rows=table.height)
    return {"rows": table.height}


def core_settings(work: Work) -> Settings:
    """Settings of the core set's run.

    Scorers that share the pass of a checkpoint find the run's checkpoints, trained on all of it;
    those with models of their own train them on the core set.
    """
    settings, options = inner_settings(work.settings, work.options), work.options
    entry = inner_scorer(options)
    score, given, checkpoints = settings.score, dict(options.options), settings.checkpoints
    if checkpoints.train is not None and reads_checkpoints(entry):
        # Chosen by name already.
        checkpoints = Checkpoints(paths=tuple(str(one.folder) for one in measurers(settings)))
        score = replace(score, checkpoints="all")
    elif checkpoints.train is not None:
        if hasattr(entry.scorer, "train"):
            given["train"] = given.get("train") or plain(checkpoints.train)
        checkpoints = Checkpoints()
    model = settings.model
    if isinstance(model.tokenizer, Tokenizer):
        model = replace(model, tokenizer=str(work.run.tokenizer))
    size = (work.places.choice.mark() or {})["rows"]
    most = settings.index.partition_rows
    rows = min(LEAST_ROWS if most == "auto" else most, max(_LEAST_ROWS, -(-size // _PARTITIONS)))
    return replace(
        settings,
        run=str(work.places.core),
        sources=_sources(work),
        model=model,
        checkpoints=checkpoints,
        index=replace(settings.index, partition_rows=rows),
        embed={},
        score=replace(score, scorers=({options.name: given},)),
        mix={},
        plan=Plan(),
        compare=Compare(),
    )


def _sources(work: Work) -> dict[str, Source]:
    """Where the copied rows lie, and what their columns mean."""
    found: dict[str, Source] = {}
    for part in work.run.partitions():
        output = work.places.rows(part.source)
        if part.source in found or not (output.mark() or {}).get("rows"):
            continue
        source = resolve_columns(
            work.settings.sources[part.source],
            stored_schema(work.run, part),
            where=f"{part.source}/{part.file}",
        )
        found[part.source] = replace(
            source, path=str(output.path), format="parquet", include=None, split=None,
            subset=None, revision=None, header=None,
        )  # fmt: skip
    return found


def _gathered(places: Places, options: Spread) -> pl.DataFrame:
    """What was measured of the core set, by the keys of the whole run."""
    run = RunFolder(places.core)
    entry = inner_scorer(options)
    names = list(entry.scorer.columns) if entry.scorer is not None else []
    tables = [
        read_table(run.scores(part, entry.folder).path, [*KEY, *names]) for part in run.partitions()
    ]
    measured = pl.concat(tables).select("source", pl.col("row").alias("core_row"), *names)
    choice = read_table(places.choice.path)
    joined = choice.join(
        measured, on=["source", "core_row"], how="left", maintain_order="left", validate="1:1"
    )
    return joined.drop("core_row")
