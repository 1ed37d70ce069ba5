"""`curate train`: the models that measure, one training run per seed, each resumable.

Two rounds of tasks: the lengths of the training examples, partition by partition, from which every
batch of every epoch is planned; then one task per seed.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from curate.config import plain
from curate.data.files import fingerprint
from curate.data.layout import RunFolder
from curate.data.manifest import record_stage
from curate.data.partitions import remove_strays
from curate.errors import ConfigError, InputError
from jobs.cluster import Pool
from jobs.lengths import content_settings
from jobs.run import Listener, Outcome, StageState, Task, ignore, raise_failures, run_tasks
from jobs.settings import Settings, task_settings
from jobs.tokenizer import plan_tokenizer, tokenizer_run, training_digests
from jobs.train_notes import training_notes

__all__ = ["VERSION", "measure_train", "plan_tokenizer", "plan_train", "tokenizer_run", "train_run"]

VERSION = 1

log = logging.getLogger(__name__)


def train_run(settings: Settings, *, pool: Pool, listener: Listener = ignore) -> dict[str, Any]:
    """Train a model for each seed; finished seeds are skipped, unfinished ones resumed.

    Returns:
        `seeds`, how many were `done` now or `skipped`, `checkpoints` (names), and per seed the
        last `loss` and `held_out_loss`; `notes` on what speaks against them. Nothing where
        `checkpoints.train` is not set.

    Raises:
        ConfigError: there is no model to train, or it does not fit the task.
        InputError: the index is missing, or there is nothing to train on.
        CurateError: a run diverged; the others have finished.
    """
    if settings.checkpoints.train is None:
        return {}
    from jobs.training_work import lengths_output, measure_lengths, train_seed

    started = time.monotonic()
    _check_model(settings)
    tokenizer_run(settings)
    from jobs.references import references_run

    references_run(settings, pool=pool, listener=listener)
    run = RunFolder(Path(settings.run))
    inputs = _inputs(settings, run)
    lengths = _length_tasks(settings, run, inputs)
    remove_strays(run.checkpoints / "lengths", {part.name for part in run.partitions()})
    measured = run_tasks("lengths for training", lengths, measure_lengths, pool=pool)
    raise_failures("lengths for training", measured)
    tasks = _seed_tasks(settings, run, inputs)
    outcome = run_tasks("train", tasks, train_seed, pool=pool, listener=listener)
    summary = _summary(run, tasks, outcome)
    outputs = [lengths_output(run, part) for part in run.partitions()]
    record_stage(
        run,
        "train",
        outputs=[*outputs, *(task.output for task in tasks)],
        seconds=time.monotonic() - started,
        facts={"summary": summary, "device": _device_name(settings)},
    )
    raise_failures("train", outcome)
    for note in summary["notes"]:
        log.warning("train: %s", note)
    return summary


def plan_train(settings: Settings) -> StageState:
    """What `train_run` would do; writes nothing."""
    if settings.checkpoints.train is None:
        return StageState("train", 0, 0)
    _check_model(settings)
    total = len(settings.checkpoints.train.seeds)
    run = RunFolder(Path(settings.run))
    tokenizer = plan_tokenizer(settings)
    if tokenizer.done < tokenizer.total:
        return StageState("train", total, 0, tokenizer.why)
    try:
        tasks = _seed_tasks(settings, run, _inputs(settings, run))
    except InputError as error:
        return StageState("train", total, 0, (error.what,))
    due = [task for task in tasks if not task.is_done()]
    begun = [task for task in due if _state_path(run, task).exists()]
    changed = [task for task in due if task.output.mark() is not None]
    counts = {
        "training runs are new": len(due) - len(begun) - len(changed),
        "training runs were interrupted and go on": len(begun),
        "training runs have changed data or settings and start again": len(changed),
    }
    why = tuple(f"{count} {what}" for what, count in counts.items() if count)
    return StageState("train", total, total - len(due), why)


def measure_train(settings: Settings) -> dict[str, Any]:
    """Time a few steps and say what the seeds that are due will take; writes nothing.

    Returns:
        `seconds`, `size_bytes`, and what they stand on: `steps` per seed, `step_seconds`.
    """
    state = plan_train(settings)
    if state.total == state.done:
        return {"seconds": 0.0, "size_bytes": 0, "steps": 0, "step_seconds": 0.0}
    run = RunFolder(Path(settings.run))
    try:
        training_digests(run)
    except InputError:
        return {"seconds": None, "size_bytes": None}
    if plan_tokenizer(settings).done < plan_tokenizer(settings).total:
        return {"seconds": None, "size_bytes": None}
    from jobs.training_measure import measure

    return measure(settings, due=state.total - state.done)


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What the tasks' fingerprints are made of."""

    encoding: dict[str, Any]
    """All that decides how an example becomes numbers."""
    digests: list[str]
    """Of each partition."""

    def payload(self, settings: Settings) -> dict[str, Any]:
        """What every task carries; a worker makes its tokenizer anew when the identity changes."""
        identity = fingerprint(encoding=self.encoding, inputs=self.digests)
        return {"settings": plain(settings), "identity": identity}


def _length_tasks(settings: Settings, run: RunFolder, inputs: _Inputs) -> list[Task]:
    from jobs.training_work import lengths_output

    common = inputs.payload(settings)
    tasks: list[Task] = []
    for part, digest in zip(run.partitions(), inputs.digests, strict=True):
        mark = fingerprint(
            stage="training lengths",
            version=VERSION,
            encoding=inputs.encoding,
            source=content_settings(settings.sources[part.source]),
            inputs=[digest],
        )
        payload = common | {"partition": asdict(part), "fingerprint": mark}
        tasks.append(Task(part.name, payload, lengths_output(run, part), mark))
    return tasks


def _seed_tasks(settings: Settings, run: RunFolder, inputs: _Inputs) -> list[Task]:
    from jobs.training_work import done_output

    train = settings.checkpoints.train
    assert train is not None
    sources = {name: content_settings(source) for name, source in settings.sources.items()}
    values = plain(train)
    for key in ("seeds", "resume_every_seconds"):  # say which runs there are, and nothing of one
        del values[key]
    tasks: list[Task] = []
    model = model_facts(settings)
    for seed in train.seeds:
        mark = fingerprint(
            stage="train",
            version=VERSION,
            train=values,
            model=model,
            encoding=inputs.encoding,
            sources=sources,
            inputs=inputs.digests,
            seeds=[settings.seed, seed],
            threads=settings.cluster.threads,
        )
        payload = inputs.payload(settings) | {"seed": seed, "fingerprint": mark}
        tasks.append(Task(f"seed-{seed}", payload, done_output(run, seed), mark))
    return tasks


def _inputs(settings: Settings, run: RunFolder) -> _Inputs:
    """Tokenizer, task and partitions, as they are now.

    Raises:
        InputError: the index or the tokenizer is missing.
    """
    from curate.models.tokens import tokenizer_digest
    from jobs.fields import reference_facts
    from jobs.training_work import make_workshop

    digests = training_digests(run)
    shop = make_workshop(settings)
    encoding = {
        **reference_facts(settings),
        "task": plain(task_settings(settings)),
        "facts": shop.task.facts(),
        "tokenizer": None if shop.tokenizer is None else tokenizer_digest(shop.tokenizer),
    }
    return _Inputs(encoding, digests)


def model_facts(settings: Settings) -> dict[str, Any]:
    from curate.models.adapters import measurer_digest
    from curate.models.load import model_folder

    model = settings.model
    if model.config is not None:
        return {"config": model.config, "dtype": model.dtype}
    return {"digest": measurer_digest(model, model_folder(model)), "dtype": model.dtype}


def _check_model(settings: Settings) -> None:
    if settings.model.name is None and settings.model.config is None:
        raise ConfigError(
            "checkpoints.train is set, but there is no model to train",
            fix="set model.name to fine-tune one, or model.config to make one from scratch",
        )
    task_settings(settings)


def _state_path(run: RunFolder, task: Task) -> Path:
    return run.checkpoints / task.name / "resume" / "state.safetensors"


def _summary(run: RunFolder, tasks: list[Task], outcome: Outcome) -> dict[str, Any]:
    from curate.models.checkpoints import list_checkpoints

    marks: Mapping[str, dict[str, Any]] = {
        task.name: task.output.mark() or {} for task in tasks if task.is_done()
    }
    return {
        "seeds": len(tasks),
        "done": len(outcome.done),
        "skipped": len(outcome.skipped),
        "checkpoints": [c.name for c in list_checkpoints(run.checkpoints) if _is_of(c.name, marks)],
        "loss": {name: mark["loss"] for name, mark in marks.items()},
        "held_out_loss": {name: mark["held_out_loss"] for name, mark in marks.items()},
        "notes": training_notes(run, marks),
    }


def _is_of(checkpoint: str, marks: Mapping[str, Any]) -> bool:
    return checkpoint.split("/")[0] in marks


def _device_name(settings: Settings) -> str:
    """The kind of device of this process; workers of a cluster may have another."""
    from curate.models.load import pick_device

    return pick_device(settings.model.device).type
