"""The passes of the scorer `influence` with EK-FAC: fit, queries, one pass over the pool.

run/ekfac/<checkpoint>/                                      the fit, see `jobs.ekfac`
run/influence/ekfac/queries/<checkpoint>-<group>.safetensors directions of the sub-tasks
run/influence/ekfac/targets/<checkpoint>-<group>.safetensors with `matrix`: of each target example
run/influence/ekfac/scores/<checkpoint>/part-….parquet       scores for each sub-task
run/influence/ekfac/{top,matrix}…, run/quantities/…          see `jobs.influence_work`

A group is some layers of the model. Once all is there, what was fitted may be removed.
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
from jobs.ekfac import FitOptions, fit_folder, fit_phases, identity_of
from jobs.influence import NAME, slug_of
from jobs.influence_queries import results_folder
from jobs.influence_target import index_task, index_work, indexed_stamp
from jobs.influence_work import matrix_output, targets_output, top_output, top_part_output
from jobs.lengths import content_of, content_settings
from jobs.measurers import Measurer, measurers
from jobs.own_passes import OwnPasses, Phase
from jobs.run import Task
from jobs.self_influence import NAME as SELF
from jobs.self_influence import fit_options as self_fit
from jobs.settings import Settings
from jobs.tokenizer import training_digests
from scorers.catalog import build_scorer
from scorers.influence import Influence
from scorers.protocol import Scorer
from scorers.self_influence import SelfInfluence

VERSION = 1
"""Of what is measured: raised when the same settings and data would give other numbers."""

_HEAD = "."
"""Every name: the fit leaves a language model's head out unless it is named."""


def passes(settings: Settings, scorer: Scorer) -> OwnPasses:
    """What is to be done; writes nothing.

    Raises:
        InputError: there is no index or no checkpoint yet.
        ConfigError: no model is set, or an option has no meaning for EK-FAC.
    """
    from jobs.ekfac_queries_work import queries_work
    from jobs.ekfac_scores_work import matrix_work, raw_work, table_work
    from jobs.influence_work import targets_work, top_work
    from jobs.references import reference_tasks, reference_work

    options = cast(Influence, scorer)
    check(settings, options)
    fit = fit_options(options)
    chosen = list({measurer.seed: measurer for measurer in measurers(settings)}.values())
    identity = identity_of(settings, chosen[0])
    plan = _Plan(settings, options, chosen, identity)
    before = [
        Phase(f"{NAME}: the reference", reference_tasks(settings), reference_work),
        Phase(f"{NAME}: the target", [index_task(settings, options.tasks)], index_work),
    ]
    for measurer in chosen:
        found = fit_phases(settings, fit, measurer, identity=identity)
        before += found.phases
        plan.add_queries(measurer, found.curvature)
    before.append(Phase(f"{NAME}: queries", plan.queries + plan.targets, queries_work))
    before.append(Phase(f"{NAME}: gradients of the pool", plan.raw(), raw_work))
    tables = plan.tables()
    last = [
        Phase(f"{NAME}: scores", tables, table_work),
        Phase(f"{NAME}: lists", [plan.top(tables)], top_work),
    ]
    if options.matrix:
        last.append(Phase(f"{NAME}: columns of the matrix", [plan.columns()], targets_work))
        last.append(Phase(f"{NAME}: the matrix", plan.matrix(), matrix_work))
    if all(task.is_done() for phase in last for task in phase.tasks):
        before = []  # nothing reads it any more, and it may have been removed
    phases = (*(phase for phase in before if phase.tasks), *last)
    return OwnPasses(phases, tuple((slug_of(each.seed), each.seed) for each in chosen))


def fit_options(options: Influence) -> FitOptions:
    """What is fitted; as `self_influence` has it by default, so that both share it.

    Raises:
        ConfigError: embeddings are asked for.
    """
    if options.embedding:
        raise ConfigError(
            "influence.embedding is set, and EK-FAC has no curvature of an embedding",
            fix="leave embedding out, or choose metric: influence",
        )
    parameters = options.layers
    if options.layers == "matrices":
        parameters = _HEAD if options.head else "all"
    elif options.layers == "all":
        parameters = _HEAD
    return FitOptions.of(NAME, options, parameters=parameters)


def check(settings: Settings, options: Influence) -> None:
    """Refuse what EK-FAC cannot do, and two fits of one checkpoint: each run would make both again.

    Raises:
        ConfigError: embeddings are asked for, or `self_influence` asks for another fit.
    """
    fit = fit_options(options)
    named = settings.score.named
    if SELF not in named:
        return
    other = cast(SelfInfluence, build_scorer(SELF, named[SELF]))
    if other.metric != "ekfac":
        return
    theirs, own = plain(self_fit(other)), plain(fit)
    for name, value in own.items():
        if name != "scorer" and value != theirs[name]:
            raise ConfigError(
                f"influence and {SELF} share the fit of EK-FAC, but {name} is {value} in the one"
                f" and {theirs[name]} in the other",
                fix="give both the same, or score one of them in a run of its own",
            )


def queries_output(run: RunFolder, options: Influence, kind: str, slug: str, group: int) -> Output:
    """Directions of sub-tasks (`queries`) or of target examples (`targets`)."""
    return Output(results_folder(run, options) / kind / f"{slug}-{group:03d}.safetensors")


def scores_output(run: RunFolder, options: Influence, part: Partition, slug: str) -> Output:
    """Key, mean_loss, num_scored, then task-000000, ... : a column for each sub-task."""
    return Output(results_folder(run, options) / "scores" / slug / f"{part.name}.parquet")


class _Plan:
    """The tasks of all checkpoints."""

    def __init__(
        self, settings: Settings, options: Influence, chosen: Sequence[Measurer], identity: str
    ) -> None:
        self._run = RunFolder(Path(settings.run))
        self._settings, self._options, self._chosen = settings, options, chosen
        self._common: dict[str, Any] = {
            "settings": plain(settings),
            "scorer": plain(options),
            "fit": plain(fit_options(options)),
        }
        self._stamp = {"version": VERSION, "identity": identity}
        self.queries: list[Task] = []
        self.targets: list[Task] = []
        self._training = training_digests(self._run)

    def add_queries(self, measurer: Measurer, fit: Sequence[Task]) -> None:
        """One task for each group of layers."""
        for kind, tasks in (("queries", self.queries), ("targets", self.targets)):
            if kind == "targets" and not self._options.matrix:
                continue
            for group, curvature in enumerate(fit):
                mark = fingerprint(
                    **self._stamp,
                    stage=f"influence {kind}",
                    model=measurer.digest,
                    fit=curvature.fingerprint,
                    target=indexed_stamp(self._settings, self._options.tasks),
                    rank=self._options.rank,
                )
                output = queries_output(self._run, self._options, kind, measurer.slug, group)
                more = {"group": group, "kind": kind, "fingerprint": mark}
                label = f"{measurer.name}, {kind}, layers {group}"
                tasks.append(Task(label, self._of(measurer) | more, output, mark))

    def raw(self) -> list[Task]:
        """The pass over each partition with each checkpoint."""
        found: list[Task] = []
        for measurer in self._chosen:
            for part in self._run.partitions():
                mark = self._mark("influence scores", part, self.queries, model=measurer.digest)
                output = scores_output(self._run, self._options, part, measurer.slug)
                payload = self._of(measurer) | {"partition": asdict(part), "fingerprint": mark}
                found.append(Task(f"{measurer.name}, {part.name}", payload, output, mark))
        return found

    def tables(self) -> list[Task]:
        """What columns are made of; one task writes a table for each seed and the candidates."""
        found: list[Task] = []
        slugs = [slug_of(measurer.seed) for measurer in self._chosen]
        for place, part in enumerate(self._run.partitions()):
            mark = self._mark(
                "influence tables",
                part,
                self.queries,
                how=[self._options.aggregate, self._options.top, slugs],
                training=self._training[place],
            )
            outputs = [self._run.quantities(part, slug) for slug in slugs]
            outputs.append(top_part_output(self._run, self._options, part))
            due = [output for output in outputs if not output.is_done(mark)]
            payload = self._common | {
                "partition": asdict(part),
                "slugs": slugs,
                "checkpoints": [measurer.slug for measurer in self._chosen],
                "fingerprint": mark,
            }
            found.append(Task(part.name, payload, due[0] if due else outputs[-1], mark))
        return found

    def top(self, tables: Sequence[Task]) -> Task:
        mark = fingerprint(stage="influence lists", scores=[task.fingerprint for task in tables])
        folder = results_folder(self._run, self._options).name
        slugs = [f"{folder}/scores/{measurer.slug}" for measurer in self._chosen]
        payload = self._common | {"slugs": slugs, "fingerprint": mark}
        return Task("the lists", payload, top_output(self._run, self._options), mark)

    def columns(self) -> Task:
        mark = fingerprint(
            stage="influence matrix",
            target=indexed_stamp(self._settings, self._options.tasks),
        )
        payload = self._common | {"fingerprint": mark}
        output = targets_output(self._run, self._options)
        return Task("the matrix' columns", payload, output, mark)

    def matrix(self) -> list[Task]:
        found: list[Task] = []
        own = [self._of(measurer)["measurer"] for measurer in self._chosen]
        folders = [self._of(measurer)["folder"] for measurer in self._chosen]
        for part in self._run.partitions():
            mark = self._mark("influence matrix", part, self.targets)
            output = matrix_output(self._run, self._options, part)
            payload = self._common | {
                "partition": asdict(part),
                "measurers": own,
                "folders": folders,
                "fingerprint": mark,
            }
            found.append(Task(f"{part.name}, matrix", payload, output, mark))
        return found

    def _of(self, measurer: Measurer) -> dict[str, Any]:
        return self._common | {
            "measurer": {**asdict(measurer), "folder": str(measurer.folder)},
            "folder": str(fit_folder(self._run, measurer)),
        }

    def _mark(self, stage: str, part: Partition, asked: Sequence[Task], **more: Any) -> str:
        return fingerprint(
            **more,
            stage=stage,
            queries=[task.fingerprint for task in asked],
            source=content_settings(self._settings.sources[part.source]),
            examples=content_of(self._run, part),
        )
