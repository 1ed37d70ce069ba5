"""The passes of the scorer `self_influence`: fit where the metric needs one, measure, regress.

run/ekfac/<checkpoint>/                        what EK-FAC is fitted with, see `jobs.ekfac`
run/influence/<checkpoint>/                    with whitened the index, see `jobs.influence_build`
run/quantities/self-influence-raw-<checkpoint> value, loss and length of every example
run/self-influence/seed-0.json                 the line of log value on log length
run/quantities/self-influence-seed-0           a table for each partition
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from curate.config import plain
from curate.data.files import fingerprint, read_json
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from jobs.ekfac import FitOptions, fit_folder, fit_phases, identity_of
from jobs.lengths import content_of, content_settings
from jobs.measurers import Measurer, measurers
from jobs.own_passes import OwnPasses, Phase
from jobs.run import Task
from jobs.settings import Settings, task_settings
from scorers.protocol import Scorer
from scorers.self_influence import SelfInfluence, interval_rates

NAME = "self_influence"

VERSION = 1
"""Of what is measured: raised when the same settings and data would give other numbers."""


def passes(settings: Settings, scorer: Scorer) -> OwnPasses:
    """What is to be done; writes nothing.

    Raises:
        InputError: there is no index or no checkpoint yet.
        ConfigError: no model is set.
    """
    from jobs.references import reference_tasks, reference_work
    from jobs.self_influence_whitened import whitened_phases, whitened_work
    from jobs.self_influence_work import line_work, raw_work, table_work

    options = cast(SelfInfluence, scorer)
    run = RunFolder(Path(settings.run))
    by_seed = _by_seed(settings, options)
    identity = identity_of(settings, next(iter(by_seed.values()))[0])
    references = reference_tasks(settings)
    phases = [
        Phase("self_influence: the reference", references, reference_work)
    ] if references else []  # fmt: skip
    white: dict[str, list[Task]] = {}
    if options.metric == "whitened":
        found, white = whitened_phases(settings, options, [own[-1] for own in by_seed.values()])
        phases += found
    raw: list[Task] = []
    lines: list[Task] = []
    tables: list[Task] = []
    for seed, chosen in by_seed.items():
        marks: dict[str, list[str]] = {}
        for measurer in chosen:
            fit = ""
            if options.metric == "ekfac":
                found = fit_phases(settings, fit_options(options), measurer, identity=identity)
                phases += found.phases
                fit = fingerprint(fit=[task.fingerprint for task in found.curvature])
            for place, part in enumerate(run.partitions()):
                if options.metric == "whitened":
                    task = white[measurer.name][place]
                else:
                    task = _raw_task(settings, options, measurer, part, identity=identity, fit=fit)
                raw.append(task)
                marks.setdefault(part.name, []).append(task.fingerprint)
        common = {
            "settings": plain(settings),
            "scorer": plain(options),
            "seed": seed,
            "raw": [raw_slug(measurer) for measurer in chosen],
            "rates": _rates(chosen, options),
        }
        lines.append(_line_task(run, common, marks))
        tables += [_table_task(run, common, lines[-1], part, marks) for part in run.partitions()]
    work = whitened_work if options.metric == "whitened" else raw_work
    phases.append(Phase("self_influence: measuring", raw, work))
    phases.append(Phase("self_influence: lengths", lines, line_work))
    phases.append(Phase("self_influence: tables", tables, table_work))
    return OwnPasses(tuple(phases), tuple((slug_of(seed), seed) for seed in by_seed))


def check(settings: Settings, scorer: Scorer) -> None:
    """Refuse what cannot be measured, before anything is indexed or trained.

    Raises:
        ConfigError: there is no task, or the scorer `influence` keeps another index in its place.
    """
    from jobs.self_influence_whitened import check_index

    task_settings(settings)
    check_index(settings, cast(SelfInfluence, scorer))


def slug_of(seed: int) -> str:
    """Folder under `quantities/`; the user's own checkpoints have negative seeds."""
    return f"self-influence-seed-{seed}" if seed >= 0 else f"self-influence-path-{-seed}"


def raw_slug(measurer: Measurer) -> str:
    return f"self-influence-raw-{measurer.slug}"


def fit_options(options: SelfInfluence) -> FitOptions:
    return FitOptions.of(NAME, options, parameters=options.parameters)


def line_output(run: RunFolder, seed: int) -> Output:
    """Intercept and slope of log value on log length."""
    return Output(run.root / "self-influence" / f"{slug_of(seed)}.json")


def _by_seed(settings: Settings, options: SelfInfluence) -> dict[int, list[Measurer]]:
    """The checkpoints of each seed, in order of step; the last one alone but for identity."""
    found: dict[int, list[Measurer]] = {}
    for measurer in measurers(settings):
        found.setdefault(measurer.seed, []).append(measurer)
    if options.metric != "identity":
        return {seed: own[-1:] for seed, own in found.items()}
    return found


def _rates(chosen: list[Measurer], options: SelfInfluence) -> list[float]:
    if options.metric != "identity":
        return [1.0]
    facts: list[Mapping[str, Any]] = [read_json(m.folder / "checkpoint.json") or {} for m in chosen]
    return interval_rates([None if "lr" not in one else float(one["lr"]) for one in facts])


def _raw_task(
    settings: Settings,
    options: SelfInfluence,
    measurer: Measurer,
    part: Partition,
    *,
    identity: str,
    fit: str,
) -> Task:
    run = RunFolder(Path(settings.run))
    mark = fingerprint(
        stage="self-influence raw",
        version=VERSION,
        identity=identity,
        model=measurer.digest,
        metric=options.metric,
        parameters=options.parameters,
        # The identity's value is divided when the table is made.
        reduction=options.reduction if options.metric == "ekfac" else None,
        fit=fit,
        source=content_settings(settings.sources[part.source]),
        examples=content_of(run, part),
    )
    payload = {
        "settings": plain(settings),
        "scorer": plain(options),
        "measurer": {**asdict(measurer), "folder": str(measurer.folder)},
        "fit": plain(fit_options(options)),
        "folder": str(fit_folder(run, measurer)),
        "partition": asdict(part),
        "raw": raw_slug(measurer),
        "fingerprint": mark,
    }
    output = run.quantities(part, raw_slug(measurer))
    return Task(f"{measurer.name}, {part.name}", payload, output, mark)


def _line_task(run: RunFolder, common: dict[str, Any], marks: Mapping[str, list[str]]) -> Task:
    mark = fingerprint(
        stage="self-influence line",
        raw=dict(marks),
        rates=common["rates"],
        reduction=common["scorer"]["reduction"],
        index=[(run.examples(part).mark() or {}).get("digest") for part in run.partitions()],
    )
    payload = {**common, "fingerprint": mark}
    return Task(f"seed {common['seed']}", payload, line_output(run, common["seed"]), mark)


def _table_task(
    run: RunFolder,
    common: dict[str, Any],
    line: Task,
    part: Partition,
    marks: Mapping[str, list[str]],
) -> Task:
    mark = fingerprint(stage="self-influence table", raw=marks[part.name], line=line.fingerprint)
    payload = {**common, "partition": asdict(part), "fingerprint": mark}
    output = run.quantities(part, slug_of(common["seed"]))
    return Task(f"seed {common['seed']}, {part.name}", payload, output, mark)
