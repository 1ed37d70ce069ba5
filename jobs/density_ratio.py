"""The passes of the scorer `density_ratio`: fit on folds, judge, weigh over the whole pool.

run/density_ratio/fit.safetensors            features, one model a fold, calibration
run/density_ratio/ratios/part-….safetensors  log ratios of a partition
run/density_ratio/target.parquet             log ratio of each target example, and whether any
                                             example of the pool is as much like the target
run/quantities/density_ratio/                a table for each partition
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from curate.config import plain
from curate.data.files import fingerprint
from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from jobs.density_ratio_fit import NAME, fit_output, fit_work
from jobs.density_ratio_work import (
    judge_work,
    ratios_output,
    table_work,
    target_output,
    weigh_work,
)
from jobs.lexical import pool_stamp, target_digest
from jobs.own_passes import OwnPasses, Phase
from jobs.representations import representation
from jobs.run import Task
from jobs.settings import Settings
from jobs.target import check_target, target_folder
from jobs.tokenizer import training_digests
from scorers.density_ratio import DensityRatio
from scorers.protocol import Scorer

VERSION = 1
"""Raised when the same data and settings would give other numbers."""


def check(settings: Settings, scorer: Scorer) -> None:
    """Refuse settings without a target or without the representation that is named.

    Raises:
        ConfigError: there is none.
        InputError: the target's files are missing.
    """
    check_target(settings, NAME)
    options = cast(DensityRatio, scorer)
    if options.on == "vectors":
        representation(settings, options.vectors)


def passes(settings: Settings, scorer: Scorer) -> OwnPasses:
    """One fit, ratios of each partition, weights over all, a table of each partition.

    Raises:
        ConfigError: there is no target.
        InputError: vectors, or the index of the target, have not been made.
    """
    check(settings, scorer)
    options = cast(DensityRatio, scorer)
    run = RunFolder(Path(settings.run))
    name = representation(settings, options.vectors) if options.on == "vectors" else None
    common = {"settings": plain(settings), "options": plain(options), "vectors": name}
    left = ("clip", "force", "vectors")
    fitted = fingerprint(
        stage="density_ratio fit",
        version=VERSION,
        options={key: value for key, value in plain(options).items() if key not in left},
        seed=settings.seed,
        threads=settings.cluster.threads,
        pool=training_digests(run),
        read=_read(settings, run, name),
        target=target_digest(settings),
    )
    fit = Task("the whole pool", common | {"fingerprint": fitted}, fit_output(run), fitted)
    weighed = fingerprint(
        stage="density_ratio weights", fit=fitted, clip=options.clip, force=options.force
    )
    weigh = Task("the whole pool", common | {"fingerprint": weighed}, target_output(run), weighed)
    judging: list[Task] = []
    tables: list[Task] = []
    for index, part in enumerate(run.partitions()):
        entry = common | {"partition": asdict(part), "index": index}
        stamp = fingerprint(stage="density_ratio ratios", fit=fitted, part=part.name)
        output = ratios_output(run, part)
        judging.append(Task(part.name, entry | {"fingerprint": stamp}, output, stamp))
        stamp = fingerprint(stage=NAME, weights=weighed, part=part.name)
        output = run.quantities(part, NAME)
        tables.append(Task(part.name, entry | {"fingerprint": stamp}, output, stamp))
    phases = (
        Phase(f"{NAME}: fit", [fit], fit_work),
        Phase(f"{NAME}: ratios", judging, judge_work),
        Phase(f"{NAME}: weights", [weigh], weigh_work),
        Phase(f"{NAME}: tables", tables, table_work),
    )
    if all(task.is_done() for task in tables):
        # Nothing reads what stands in the folder `density_ratio`, which may have been removed.
        phases = phases[-1:]
    return OwnPasses(phases, ((NAME, 0),))


def _read(settings: Settings, run: RunFolder, name: str | None) -> Any:
    """What the classifier reads of pool and target."""
    if name is not None:
        from jobs.embedding import vectors_digest

        return [vectors_digest(settings, name, folder) for folder in (run, target_folder(run))]
    parts: list[Partition] = run.partitions()
    return [pool_stamp(settings, part) for part in parts]
