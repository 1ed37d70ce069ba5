"""The passes of the scorer `influence`: gradients of target and pool, curvature, queries, scores.

run/influence/<checkpoint>/         the index, see `jobs.influence_build`; its curvature
run/influence/<metric>/             queries, lists and matrix, see `jobs.influence_work`
run/quantities/influence-seed-0/    a table for each partition

What lies in `influence/<checkpoint>/` can be removed once the scores are there; another question
then costs the gradients again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from curate.config import plain
from curate.data.files import fingerprint, read_json
from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.models.projection import Projection
from jobs.influence_build import build_tasks, build_work, pool_world
from jobs.influence_curvature import CurvatureOptions, Planned, curvature_plan
from jobs.influence_queries import features_name, query_tasks, query_work
from jobs.influence_sides import IndexOptions, sides_tasks, sides_work
from jobs.influence_target import gradients_tasks, gradients_work, index_task, index_work
from jobs.influence_work import (
    Family,
    matrix_output,
    matrix_work,
    score_work,
    targets_output,
    targets_work,
    top_output,
    top_part_output,
    top_work,
)
from jobs.measurers import Measurer, measurers
from jobs.own_passes import OwnPasses, Phase
from jobs.run import Task
from jobs.settings import Settings, task_settings
from jobs.target import check_target
from jobs.tokenizer import training_digests
from scorers.influence import Influence
from scorers.protocol import Scorer
from scorers.self_influence import interval_rates

VERSION = 1
"""Raised when the same rows and queries would give other scores."""

NAME = "influence"


def passes(settings: Settings, scorer: Scorer) -> OwnPasses:
    """What is to be done; writes nothing.

    Raises:
        ConfigError: there is no target or no model.
        InputError: there is no index or no checkpoint yet.
    """
    from jobs.references import reference_tasks, reference_work

    check(settings, scorer)
    options = cast(Influence, scorer)
    if options.metric == "ekfac":
        from jobs.ekfac_queries import passes as ekfac_passes

        return ekfac_passes(settings, scorer)
    families, chosen, notes = families_of(settings, options)
    training = training_digests(RunFolder(Path(settings.run)))
    index, plain_index = index_options(options), index_options(options, is_target=True)
    gradients = gradients_tasks(settings, chosen, plain_index, options.tasks)
    rows = build_tasks(pool_world(settings), chosen, index)
    by_name = rows_by_name(chosen, rows)
    curvature = Planned([], {})
    if options.has_curvature:
        how = curvature_options(options)
        curvature = curvature_plan(settings, chosen, how, by_name, training=training, scorer=NAME)
    queries = query_tasks(
        settings,
        chosen,
        options,
        plain_index,
        target=gradients,
        curvatures=curvature.stamps,
        notes=notes,
    )
    before = [
        Phase(f"{NAME}: the reference", reference_tasks(settings), reference_work),
        Phase(f"{NAME}: the target", [index_task(settings, options.tasks)], index_work),
        Phase(f"{NAME}: principal axes", sides_tasks(settings, chosen, index), sides_work),
        Phase(f"{NAME}: gradients of the target", gradients, gradients_work),
        Phase(f"{NAME}: gradients of the pool", rows, build_work),
        *curvature.phases,
        Phase(f"{NAME}: queries", queries, query_work),
    ]
    last = _last_phases(
        settings, options, families, queries=queries, rows=by_name, training=training
    )
    if all(task.is_done() for phase in last for task in phase.tasks):
        # Nothing reads the index any more, which may have been removed.
        before = before[-1:] if all(task.is_done() for task in queries) else []
    tables = tuple((family.slug, family.seed) for family in families)
    return OwnPasses((*(phase for phase in before if phase.tasks), *last), tables)


def check(settings: Settings, scorer: Scorer) -> None:
    """Refuse what cannot be measured, before anything is indexed or trained.

    Raises:
        ConfigError: there is no task or no target.
        InputError: the target's files are missing.
    """
    check_target(settings, NAME)
    task_settings(settings)
    if cast(Influence, scorer).metric == "ekfac":
        from jobs.ekfac_queries import check as check_ekfac

        check_ekfac(settings, cast(Influence, scorer))


def index_options(options: Influence, *, is_target: bool = False) -> IndexOptions:
    """What the index of the pool holds, or that of the target."""
    return IndexOptions(
        projection=Projection(
            parameters=options.layers,
            head=options.head,
            embedding=options.embedding,
            dim=options.dim,
            seed=options.seed,
            entries=options.entries,
            init=options.init,
            sample=options.sample,
        ),
        dtype=options.dtype,
        reduction=options.reduction,
        adam=options.adam,
    )


def curvature_options(options: Influence) -> CurvatureOptions:
    """What the curvature is made of."""
    return CurvatureOptions(
        structure=options.curvature,
        share=options.damping,
        features=features_name(options),
        whiten=options.whiten,
    )


def rows_by_name(chosen: Sequence[Measurer], rows: Sequence[Task]) -> dict[str, list[Task]]:
    """Checkpoint -> its tasks, of those of `build_tasks`."""
    size = len(rows) // len(chosen)
    return {
        measurer.name: list(rows[place * size : (place + 1) * size])
        for place, measurer in enumerate(chosen)
    }


def slug_of(seed: int) -> str:
    """Folder under `quantities/`; the user's own checkpoints have negative seeds."""
    return f"influence-seed-{seed}" if seed >= 0 else f"influence-path-{-seed}"


def families_of(
    settings: Settings, options: Influence
) -> tuple[list[Family], list[Measurer], dict[str, list[str]]]:
    """Whose scores are added up, all checkpoints that are used, and what is to be said of them.

    Raises:
        InputError: there is no checkpoint yet.
    """
    by_seed: dict[int, list[Measurer]] = {}
    for measurer in measurers(settings):
        by_seed.setdefault(measurer.seed, []).append(measurer)
    notes: dict[str, list[str]] = {}
    if options.metric == "trak":
        every = [own[-1] for own in by_seed.values()]
        if len(every) == 1:
            notes[every[0].name] = [
                "trak stands on one model; several that are trained independently are far better"
            ]
        slugs = tuple(each.slug for each in every)
        share = (1 / len(every),) * len(every)
        return [Family(0, slug_of(0), slugs, share)], every, notes
    families: list[Family] = []
    chosen: list[Measurer] = []
    for seed, every in by_seed.items():
        own = every[-1:] if options.metric == "influence" else every
        weights = [1.0]
        if options.metric in ("dot", "cosine"):
            rates = _rates(own)
            if None in rates:
                notes[own[0].name] = [
                    "the checkpoints do not all say their learning rates (lr in checkpoint.json),"
                    " and count alike"
                ]
            weights = interval_rates(rates)
        if options.metric == "cosine":
            weights = [weight / sum(weights) for weight in weights]
        slugs = tuple(each.slug for each in own)
        families.append(Family(seed, slug_of(seed), slugs, tuple(weights)))
        chosen += own
    return families, chosen, notes


def _rates(chosen: Sequence[Measurer]) -> list[float | None]:
    facts: list[Mapping[str, Any]] = [read_json(m.folder / "checkpoint.json") or {} for m in chosen]
    return [None if "lr" not in one else float(one["lr"]) for one in facts]


def _last_phases(
    settings: Settings,
    options: Influence,
    families: Sequence[Family],
    *,
    queries: Sequence[Task],
    rows: Mapping[str, Sequence[Task]],
    training: Sequence[str],
) -> list[Phase]:
    """Scores, lists and matrix."""
    run = RunFolder(Path(settings.run))
    common = {
        "settings": plain(settings),
        "scorer": plain(options),
        "families": [asdict(family) for family in families],
        "slugs": [slug for family in families for slug in family.checkpoints],
    }
    stamp = fingerprint(
        stage="influence scores",
        version=VERSION,
        queries=[task.fingerprint for task in queries],
        families=common["families"],
        options=[options.metric, options.aggregate, options.top],
        threads=settings.cluster.threads,
    )
    scores: list[Task] = []
    matrix: list[Task] = []
    for place, part in enumerate(run.partitions()):
        mark = fingerprint(
            scores=stamp,
            rows=[own[place].fingerprint for own in rows.values()],
            training=training[place],
        )
        payload = common | {"partition": asdict(part), "fingerprint": mark}
        scores.append(_score_task(run, options, families, part, payload))
        if options.matrix:
            output = matrix_output(run, options, part)
            matrix.append(Task(f"{part.name}, matrix", payload, output, mark))
    mark = fingerprint(stage="influence lists", scores=[task.fingerprint for task in scores])
    payload = common | {"fingerprint": mark}
    top = Task("the lists", payload, top_output(run, options), mark)
    phases = [
        Phase(f"{NAME}: scores", scores, score_work),
        Phase(f"{NAME}: lists", [top], top_work),
    ]
    if options.matrix:
        mark = fingerprint(
            stage="influence matrix",
            queries=[task.fingerprint for task in queries],
            tasks=options.tasks,
        )
        payload = common | {"fingerprint": mark}
        targets = Task("the matrix' columns", payload, targets_output(run, options), mark)
        phases.append(Phase(f"{NAME}: columns of the matrix", [targets], targets_work))
        phases.append(Phase(f"{NAME}: the matrix", matrix, matrix_work))
    return phases


def _score_task(
    run: RunFolder,
    options: Influence,
    families: Sequence[Family],
    part: Partition,
    payload: dict[str, Any],
) -> Task:
    """One task writes several files: it is done where all of them are."""
    mark = payload["fingerprint"]
    outputs = [
        *(run.quantities(part, family.slug) for family in families),
        top_part_output(run, options, part),
    ]
    due = [output for output in outputs if not output.is_done(mark)]
    return Task(part.name, payload, due[0] if due else outputs[-1], mark)
