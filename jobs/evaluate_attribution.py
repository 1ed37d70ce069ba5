"""`curate evaluate-attribution`: do attributions foretell retraining, do scores find wrong labels?

Rounds of tasks: lengths, partition by partition; one training for each subset and model; what is
finished is kept, whatever interrupts. Then every matrix (examples x target examples) that is found
is summed over each subset and compared with the losses, by `curate.evaluate.attribution`.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from curate.config import plain
from curate.data.example import KEY
from curate.data.files import fingerprint
from curate.data.layout import RunFolder
from curate.data.manifest import record_stage
from curate.data.partitions import remove_strays
from curate.data.tables import read_examples, write_table
from curate.errors import ConfigError, InputError, counted
from jobs.cluster import Pool
from jobs.lengths import content_settings
from jobs.run import Listener, Outcome, StageState, Task, ignore, raise_failures, require, run_tasks
from jobs.settings import Settings, task_settings
from jobs.target import index_target, target_folder, target_settings, target_stamp

VERSION = 1
"""Raised when the same settings would train other models, or measure them otherwise."""

STAGE = "evaluate-attribution"

log = logging.getLogger(__name__)


def evaluate_attribution_run(
    settings: Settings, *, pool: Pool, listener: Listener = ignore
) -> dict[str, Any]:
    """Train what is not trained yet, and compare.

    Returns:
        What `attribution/evaluation.json` holds, and how many trainings were `done` now or
        `skipped`.

    Raises:
        ConfigError: there is neither a target nor `attribution.labels`, or no model to train.
        InputError: the index or a matrix is missing or does not fit.
        CurateError: a training failed; the others have finished.
    """
    from jobs.evaluate_attribution_inputs import Tested
    from jobs.evaluate_attribution_results import judge, write_evaluation

    check_evaluate_attribution(settings)
    started = time.monotonic()
    run = RunFolder(Path(settings.run))
    require(run.partitions(), stage="the index", command=f"curate index {run.root}")
    outcome = Outcome()
    tasks: list[Task] = []
    if _trains(settings):
        _prepare(settings, run, pool)
        tasks = training_tasks(settings, run)
    tested = Tested.of(settings, run, trains=bool(tasks))
    if tasks:
        outcome = _train(tasks, pool, listener)
    value, table = judge(settings, tested, tasks)
    write_evaluation(run, value, table)
    record_stage(
        run,
        STAGE,
        outputs=[task.output for task in tasks],
        seconds=time.monotonic() - started,
        facts={"subsets": settings.attribution.subsets, "models": settings.attribution.models},
    )
    for note in value["notes"]:
        log.warning("%s: %s", STAGE, note)
    return {**value, "done": len(outcome.done), "skipped": len(outcome.skipped)}


def plan_evaluate_attribution(settings: Settings) -> StageState:
    """What `evaluate_attribution_run` would do; writes nothing."""
    if not _trains(settings):
        return StageState(STAGE, 0, 0)
    own = settings.attribution
    total = own.subsets * own.models
    run = RunFolder(Path(settings.run))
    if not run.partitions():
        return StageState(STAGE, total, 0, ("the index has not been made yet",))
    try:
        tasks = training_tasks(settings, run)
    except InputError as error:
        return StageState(STAGE, total, 0, (error.what,))
    done = sum(task.is_done() for task in tasks)
    why = (f"{counted(total - done, 'training is', 'trainings are')} due",) if done < total else ()
    return StageState(STAGE, total, done, why)


def check_evaluate_attribution(settings: Settings) -> None:
    """Refuse what cannot be evaluated, before anything is trained; loads no table.

    Raises:
        ConfigError: there is neither a target nor a column of wrong labels, or no model.
    """
    if not _trains(settings):
        if settings.attribution.labels is None:
            raise ConfigError(
                "there is nothing to evaluate: no target whose losses would be foretold"
                + (", no subsets" if settings.target is not None else "")
                + ", and no column of wrong labels",
                fix="set target, or attribution.labels to such a column",
            )
        return
    if settings.model.name is None and settings.model.config is None:
        raise ConfigError(
            "there is no model to train on the subsets",
            fix="set model.name or model.config, or attribution.subsets to 0",
        )
    task_settings(settings)


def training_tasks(settings: Settings, run: RunFolder) -> list[Task]:
    """One task for each subset and model, subset by subset.

    Raises:
        InputError: the index or the tokenizer is missing.
    """
    from jobs.evaluate_attribution_training import losses_output

    common = _Common.of(settings, run)
    own = settings.attribution
    tasks: list[Task] = []
    for model in range(own.models):
        for subset in range(own.subsets):
            stamp = fingerprint(**common.facts, subset=subset, number=model)
            payload = {**common.payload, "subset": subset, "model": model, "fingerprint": stamp}
            output = losses_output(run, subset, model)
            tasks.append(Task(f"subset {subset}, model {model}", payload, output, stamp))
    return tasks


def _trains(settings: Settings) -> bool:
    return settings.target is not None and settings.attribution.subsets > 0


def _train(tasks: Sequence[Task], pool: Pool, listener: Listener) -> Outcome:
    from jobs.evaluate_attribution_training import train_subset

    outcome = run_tasks(STAGE, tasks, train_subset, pool=pool, listener=listener)
    raise_failures(STAGE, outcome)
    return outcome


def _prepare(settings: Settings, run: RunFolder, pool: Pool) -> None:
    """Tokenizer, references, target, queries and lengths."""
    from jobs.evaluate_attribution_training import (
        FOLDER,
        subset_lengths_work,
        training_settings,
    )
    from jobs.references import references_run
    from jobs.tokenizer import tokenizer_run

    trainable = training_settings(settings)
    tokenizer_run(trainable)
    references_run(trainable, pool=pool)
    index_target(target_settings(trainable), pool=pool)
    references_run(target_settings(trainable), pool=pool)
    _choose_queries(settings, run)
    remove_strays(run.root / FOLDER / "lengths", {part.name for part in run.partitions()})
    tasks = _length_tasks(settings, run)
    outcome = run_tasks("lengths for the subsets", tasks, subset_lengths_work, pool=pool)
    raise_failures("lengths for the subsets", outcome)


def _choose_queries(settings: Settings, run: RunFolder) -> None:
    """Write which target examples are measured: those with the smallest hashes of content."""
    from jobs.evaluate_attribution_training import queries_output

    output, stamp = queries_output(run), _queries_stamp(settings)
    if output.is_done(stamp):
        return
    folder = target_folder(run)
    frames = [
        read_examples(folder, part, [*KEY, "content"])
        .with_row_index("position")
        .with_columns(pl.col("position").cast(pl.Int64), partition=pl.lit(part.name))
        for part in folder.partitions()
    ]
    chosen = pl.concat(frames).sort("content", *KEY).head(settings.attribution.queries)
    table = chosen.sort("partition", "position").select("partition", "position", *KEY)
    output.write(lambda path: write_table(table, path), stamp, rows=table.height)


def _queries_stamp(settings: Settings) -> str:
    return fingerprint(
        stage="attribution queries",
        version=VERSION,
        target=target_stamp(settings),
        queries=settings.attribution.queries,
    )


def _length_tasks(settings: Settings, run: RunFolder) -> list[Task]:
    from jobs.evaluate_attribution_training import lengths_payload, subset_lengths_output

    common = _Common.of(settings, run)
    tasks: list[Task] = []
    for part, digest in zip(run.partitions(), common.digests, strict=True):
        stamp = fingerprint(
            stage="attribution lengths",
            version=VERSION,
            identity=common.payload["identity"],
            source=content_settings(settings.sources[part.source]),
            examples=digest,
        )
        payload = lengths_payload(common.payload, part, stamp)
        tasks.append(Task(part.name, payload, subset_lengths_output(run, part), stamp))
    return tasks


@dataclass(frozen=True, slots=True)
class _Common:
    """What all trainings share."""

    payload: dict[str, Any]
    facts: dict[str, Any]
    """Of their fingerprints."""
    digests: list[str]
    """Of the partitions."""

    @classmethod
    def of(cls, settings: Settings, run: RunFolder) -> "_Common":
        from curate.models.tokens import tokenizer_digest
        from jobs.evaluate_attribution_training import training_settings
        from jobs.fields import reference_facts
        from jobs.tokenizer import training_digests
        from jobs.train import model_facts
        from jobs.training_work import make_workshop, training

        trainable = training_settings(settings)
        digests = training_digests(run)
        shop = make_workshop(trainable)
        identity = fingerprint(
            **reference_facts(trainable),
            task=plain(task_settings(trainable)),
            facts=shop.task.facts(),
            tokenizer=None if shop.tokenizer is None else tokenizer_digest(shop.tokenizer),
        )
        how = plain(training(trainable))
        for name in ("seeds", "resume_every_seconds", "save_every_epochs", "save_moments"):
            del how[name]  # they change nothing of one model
        facts = {
            "stage": STAGE,
            "version": VERSION,
            "train": how,
            "model": model_facts(trainable),
            "identity": identity,
            "sources": {n: content_settings(s) for n, s in settings.sources.items()},
            "queries": _queries_stamp(settings),
            "batch_tokens": settings.score.batch_tokens,
            "inputs": digests,
            "share": settings.attribution.share,
            "seeds": [settings.seed, settings.attribution.seed],
            "threads": settings.cluster.threads,
        }
        return cls({"settings": plain(trainable), "identity": identity}, facts, digests)
