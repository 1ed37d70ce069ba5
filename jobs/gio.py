"""The passes of the scorer `gio`: projection, k-means, the search, and a table for each partition.

    run/gio/prepared.safetensors   projection, and the target without repeated points, projected
    run/gio/points/part-….npy      candidates of the pool, projected; NaN for all other rows
    run/gio/centroids.npy          k-means of them
    run/gio/assigned/              cluster, and distance to the nearest target point
    run/gio/places.npy             place of every row of the pool, NaN where it is not chosen
    run/gio/steps.parquet          each addition: divergence, share of the target, examples
    run/gio/report.json            domains, total variation and MMD, of pool and of choice
    run/quantities/gio/            a table for each partition

The folder `gio` may be removed once the scores are there.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from curate.config import plain
from curate.data.files import fingerprint
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.errors import ConfigError
from jobs.own_passes import OwnPasses, Phase
from jobs.representations import open_vectors, representation
from jobs.run import Task
from jobs.settings import Settings
from jobs.target import check_target, target_folder
from jobs.tokenizer import training_digests
from scorers.gio import GIO
from scorers.protocol import Scorer

NAME = "gio"

VERSION = 1
"""Raised when the same vectors would give another choice."""

_PREPARED = ("dims", "max_target", "clusters", "start_source", "seed")


def passes(settings: Settings, scorer: Scorer) -> OwnPasses:
    """What is to be done; writes nothing.

    Raises:
        ConfigError: there is no target, or no such representation or source.
        InputError: index or vectors, of the target too, have not been made.
    """
    from jobs.gio_report import report_work
    from jobs.gio_select import select_work
    from jobs.gio_target import prepare_work
    from jobs.gio_work import assign_work, centroids_work, project_work, table_work

    check(settings, scorer)
    options = cast(GIO, scorer)
    run = RunFolder(Path(settings.run))
    parts = run.partitions()
    name = representation(settings, options.vectors)
    common = {"settings": plain(settings), "options": plain(options), "vectors": name}

    def task(label: str, output: Output, stamp: str, **more: Any) -> Task:
        return Task(label, common | more | {"fingerprint": stamp}, output, stamp)

    def tasks(stage: str, outputs: Sequence[Output], stamp: str) -> list[Task]:
        return [
            task(part.name, output, fingerprint(stage=stage, whole=stamp, part=number),
                 partition=asdict(part), index=number)
            for number, (part, output) in enumerate(zip(parts, outputs, strict=True))
        ]  # fmt: skip

    prepared = fingerprint(
        stage="gio prepared",
        version=VERSION,
        target=vector_digests(target_folder(run), name),
        vectors=vector_digests(run, name),
        pool=training_digests(run),
        options={key: plain(options)[key] for key in _PREPARED},
        seed=settings.seed,
        threads=settings.cluster.threads,
        device=device_of(settings),
    )
    centroids = fingerprint(stage="gio centroids", prepared=prepared, mode=options.mode)
    counting, tokens = _counting(settings, options)
    chosen = fingerprint(
        stage="gio choice",
        centroids=centroids,
        options=plain(options),
        tokens=[own.fingerprint for own in counting],
    )
    common["tokens"] = tokens
    assigned = tasks("assigned", [assigned_output(run, part) for part in parts], centroids)
    tables = tasks("tables", [run.quantities(part, NAME) for part in parts], chosen)
    points = tasks("points", [points_output(run, part) for part in parts], prepared)
    quantised = options.mode == "centroids"
    phases = [
        Phase(f"{NAME}: target", [task("the target", prepared_output(run), prepared)],
              prepare_work),
        Phase(f"{NAME}: projection", points, project_work),
        Phase(f"{NAME}: k-means",
              [task("the whole pool", centroids_output(run), centroids)] if quantised else [],
              centroids_work),
        Phase(f"{NAME}: assignment", assigned, assign_work),
        *_lengths_phase(counting),
        Phase(f"{NAME}: search", [task("the whole pool", steps_output(run), chosen)],
              select_work),
        Phase(f"{NAME}: report", [task("the whole pool", report_output(run), chosen)],
              report_work),
        Phase(f"{NAME}: tables", tables, table_work),
    ]  # fmt: skip
    if all(own.is_done() for own in tables):
        # Nothing reads what stands in the folder `gio`, which may have been removed.
        phases = phases[-1:]
    return OwnPasses(tuple(phases), ((NAME, 0),))


def check(settings: Settings, scorer: Scorer) -> None:
    """Refuse settings without a target, representation or source that is named.

    Raises:
        ConfigError: there is none.
        InputError: the target's files are missing.
    """
    options = cast(GIO, scorer)
    check_target(settings, NAME)
    representation(settings, options.vectors)
    source = options.start_source
    if source is not None and source not in settings.sources:
        raise ConfigError(
            f"gio.start_source names {source!r}, which is no source",
            fix=f"use one of {', '.join(settings.sources)}",
        )
    if source is not None and len(settings.sources) == 1:
        raise ConfigError(
            "gio.start_source is the only source, so that nothing is left to choose from",
            fix="name the pool as another source",
        )


def device_of(settings: Settings) -> str:
    """`cuda` where the models run on a GPU and faiss has one too."""
    from curate.models.load import pick_device
    from curate.vectors.engine import faiss_module

    on_gpu = pick_device(settings.model.device).type == "cuda"
    return "cuda" if on_gpu and hasattr(faiss_module(), "StandardGpuResources") else "cpu"


def vector_digests(run: RunFolder, name: str) -> list[str]:
    """Of the vectors of a run or of its target, partition by partition.

    Raises:
        InputError: they have not been made.
    """
    open_vectors(run, name)
    return [(run.vectors(part, name).mark() or {})["digest"] for part in run.partitions()]


def prepared_output(run: RunFolder) -> Output:
    return Output(run.root / NAME / "prepared.safetensors")


def points_output(run: RunFolder, part: Partition) -> Output:
    return Output(run.root / NAME / "points" / f"{part.name}.npy")


def centroids_output(run: RunFolder) -> Output:
    return Output(run.root / NAME / "centroids.npy")


def assigned_output(run: RunFolder, part: Partition) -> Output:
    return Output(run.root / NAME / "assigned" / f"{part.name}.parquet")


def places_output(run: RunFolder) -> Output:
    return Output(run.root / NAME / "places.npy")


def steps_output(run: RunFolder) -> Output:
    return Output(run.root / NAME / "steps.parquet")


def report_output(run: RunFolder) -> Output:
    return Output(run.root / NAME / "report.json")


def _counting(settings: Settings, options: GIO) -> tuple[list[Task], str | None]:
    """Tasks that count the tokens of a budget, and whose tokens these are."""
    from jobs.lengths import length_tasks, lengths_digest

    budget = options.budget
    if budget is None or (budget.tokens is None and budget.token_share is None):
        return [], None
    digest = lengths_digest(settings)
    return length_tasks(settings, digest), digest


def _lengths_phase(counting: list[Task]) -> list[Phase]:
    from jobs.lengths import lengths_work

    return [Phase(f"{NAME}: tokens", counting, lengths_work)] if counting else []
