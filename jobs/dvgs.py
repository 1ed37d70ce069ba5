"""The passes of the scorer `dvgs`: index the target, train on it, measure the pool at every step.

    run/target/                  the target, indexed like a run of its own
    run/dvgs/target.json         says that all of it can be trained on
    run/dvgs/seed-0/steps/       weights and target gradient of each evaluated step
    run/dvgs/seed-0/model/       the model that was trained on the target
    run/dvgs/seed-0/done.json    the evaluated steps: loss, learning rate, squared norm
    run/dvgs/seed-0/values/      for ranks only: similarities step by step; `ranks.safetensors`
    run/quantities/dvgs-seed-0/  a table for each partition

The folder `dvgs` can be removed once the scores are there; new data then costs the training again.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from curate.config import plain
from curate.data.files import fingerprint
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.errors import ConfigError
from curate.models.settings import Checkpoints, Train
from jobs.fields import reference_facts
from jobs.lengths import content_of, content_settings
from jobs.own_passes import OwnPasses, Phase
from jobs.run import Task
from jobs.settings import Settings, task_settings
from jobs.target import check_target, target_stamp
from scorers.dvgs import DVGS

VERSION = 1
"""Of what is measured: raised when the same settings and data would give other numbers."""

_LR_NEW, _LR_LOADED = 1e-3, 5e-5


def passes(settings: Settings, scorer: DVGS) -> OwnPasses:
    """What is to be done; writes nothing.

    Raises:
        ConfigError: there is no target or no model.
        InputError: the target's files or the model are missing.
    """
    from jobs.dvgs_target import target_work
    from jobs.dvgs_work import measure_work, record_work
    from jobs.references import reference_tasks, reference_work

    check(settings, scorer)
    run = RunFolder(Path(settings.run))
    common, identity = _common(settings, scorer)
    stamp = _target_stamp(settings, identity)
    target = Task("the target", common | {"fingerprint": stamp}, target_output(run), stamp)
    trainings: list[Task] = []
    for number, seed in enumerate(scorer.seeds):
        mark = _training_stamp(settings, scorer, stamp, seed)
        payload = common | {
            "seed": seed,
            "runs": len(scorer.seeds) - number,
            "fingerprint": mark,
        }
        trainings.append(Task(f"seed {seed}", payload, done_output(run, seed), mark))
    references = reference_tasks(settings)
    phases = [Phase("dvgs: the reference", references, reference_work)] if references else []
    phases += [
        Phase("dvgs: the target", [target], target_work),
        Phase("dvgs: training on the target", trainings, record_work),
    ]
    measuring = [
        _measuring_task(settings, scorer, part, common, training)
        for training in trainings
        for part in run.partitions()
    ]
    phases.append(Phase("dvgs: measuring", measuring, measure_work))
    if scorer.aggregate == "rank":
        phases += _rank_phases(settings, scorer, common, measuring)
    if all(task.is_done() for task in phases[-1].tasks):
        # Nothing reads what stands in the folder `dvgs`, which may have been removed.
        phases = phases[-1:]
    return OwnPasses(tuple(phases), tuple((slug_of(seed), seed) for seed in scorer.seeds))


def seed_folder(run: RunFolder, seed: int) -> Path:
    return run.root / "dvgs" / f"seed-{seed}"


def slug_of(seed: int) -> str:
    """Folder under `quantities/`."""
    return f"dvgs-seed-{seed}"


def target_output(run: RunFolder) -> Output:
    """Facts of the target; its mark says that all of it can be trained on."""
    return Output(run.root / "dvgs" / "target.json")


def done_output(run: RunFolder, seed: int) -> Output:
    return Output(seed_folder(run, seed) / "done.json")


def values_output(run: RunFolder, seed: int, part: Partition) -> Output:
    return Output(seed_folder(run, seed) / "values" / f"{part.name}.parquet")


def ranks_output(run: RunFolder, seed: int) -> Output:
    return Output(seed_folder(run, seed) / "ranks.safetensors")


def check(settings: Settings, _: DVGS) -> None:
    """Refuse what cannot be measured, before anything is indexed or trained.

    Raises:
        ConfigError: there is no target or no model.
        InputError: the target's files are missing.
    """
    has_model = settings.model.name is not None or settings.model.config is not None
    if settings.target is not None and not has_model:
        raise ConfigError(
            "scorer dvgs trains a model on the target, and there is none",
            fix="set model.name to go on from one, or model.config to make one from scratch",
        )
    check_target(settings, "dvgs")
    task_settings(settings)


def _common(settings: Settings, scorer: DVGS) -> tuple[dict[str, Any], str]:
    """What every task carries, and a digest of task and tokenizer."""
    from curate.models.tokens import tokenizer_digest
    from jobs.training_work import make_workshop

    train = Train(
        epochs=scorer.epochs,
        lr=scorer.lr or (_LR_LOADED if settings.model.config is None else _LR_NEW),
        weight_decay=0.0,
        warmup=0.0,
        schedule="constant",
        clip_norm=0.0,
    )
    own = replace(settings, checkpoints=Checkpoints(train=train))
    shop = make_workshop(own)
    identity = fingerprint(
        task=plain(task_settings(settings)),
        facts=shop.task.facts(),
        tokenizer=None if shop.tokenizer is None else tokenizer_digest(shop.tokenizer),
        reference=reference_facts(settings),
    )
    return {"settings": plain(own), "scorer": plain(scorer), "identity": identity}, identity


def _target_stamp(settings: Settings, identity: str) -> str:
    return fingerprint(
        stage="dvgs target", version=VERSION, identity=identity, index=target_stamp(settings)
    )


def _training_stamp(settings: Settings, scorer: DVGS, target: str, seed: int) -> str:
    from curate.models.load import pick_device
    from jobs.train import model_facts

    options = plain(scorer)
    names = ("epochs", "lr", "batch_size", "batch_tokens", "every", "parameters")
    return fingerprint(
        stage="dvgs training",
        version=VERSION,
        target=target,
        model=model_facts(settings),
        options={name: options[name] for name in names},
        seeds=[settings.seed, seed],
        threads=settings.cluster.threads,
        device=pick_device(settings.model.device).type,
    )


def _measuring_task(
    settings: Settings, scorer: DVGS, part: Partition, common: dict[str, Any], training: Task
) -> Task:
    run, seed = RunFolder(Path(settings.run)), training.payload["seed"]
    ranked = scorer.aggregate == "rank"
    mark = fingerprint(
        stage="dvgs",
        version=VERSION,
        training=training.fingerprint,
        source=content_settings(settings.sources[part.source]),
        examples=content_of(run, part),
        subsample=scorer.subsample,
        weight_by_norm=scorer.weight_by_norm,
        copies=scorer.copies,
        values=scorer.similarity if ranked else None,
        batch_tokens=settings.score.batch_tokens,
    )
    output = values_output(run, seed, part) if ranked else run.quantities(part, slug_of(seed))
    payload = common | {"seed": seed, "partition": asdict(part), "fingerprint": mark}
    return Task(f"seed {seed}, {part.name}", payload, output, mark)


def _rank_phases(
    settings: Settings, scorer: DVGS, common: dict[str, Any], measuring: list[Task]
) -> list[Phase]:
    """The ranks of a step take the whole pool, so that every partition waits for all others."""
    from jobs.dvgs_ranks import grid_work, rank_work

    run = RunFolder(Path(settings.run))
    grids: list[Task] = []
    tables: list[Task] = []
    for seed in scorer.seeds:
        own = [task for task in measuring if task.payload["seed"] == seed]
        mark = fingerprint(stage="dvgs ranks", version=VERSION, values=[t.fingerprint for t in own])
        payload = common | {"seed": seed, "fingerprint": mark}
        grids.append(Task(f"seed {seed}, ranks", payload, ranks_output(run, seed), mark))
        for task in own:
            part = Partition(**task.payload["partition"])
            stamp = fingerprint(stage="dvgs table", ranks=mark, values=task.fingerprint)
            payload = task.payload | {"fingerprint": stamp}
            output = run.quantities(part, slug_of(seed))
            tables.append(Task(f"seed {seed}, ranks of {part.name}", payload, output, stamp))
    return [
        Phase("dvgs: ranks", grids, grid_work),
        Phase("dvgs: ranks of the pool", tables, rank_work),
    ]
