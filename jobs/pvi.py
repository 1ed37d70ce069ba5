"""`pvi`: models trained on all folds but one, one without the input, and what each says.

run/pvi/lengths/               tokens of each example in training, and its fold
run/pvi/fold-0/seed-0/ ...     a model that did not see fold 0; null/ the one without the input
run/pvi/measured/<model>/      surprise at the answers, by the model that judges the example
run/quantities/pvi-seed-0/     both surprises side by side
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from curate.config import plain
from curate.data.files import fingerprint
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.errors import ConfigError
from curate.models.load import pick_device
from curate.models.settings import Checkpoints, Train
from curate.models.tokens import tokenizer_digest
from jobs.lengths import content_settings
from jobs.measuring import batch_tokens
from jobs.own_passes import OwnPasses, Phase
from jobs.pvi_work import (
    NAME,
    NULL,
    done_output,
    join_work,
    lengths_output,
    lengths_work,
    measure_work,
    measured_output,
    table_name,
    train_work,
)
from jobs.run import Task
from jobs.settings import Settings, task_settings
from jobs.tokenizer import training_digests
from jobs.train import model_facts
from jobs.training_work import make_workshop
from scorers.protocol import Scorer
from scorers.pvi import PVI

VERSION = 1
"""Raised when the same data and settings would give other numbers."""


def passes(settings: Settings, scorer: Scorer) -> OwnPasses:
    """Lengths and folds, trainings, measuring with each model, and both surprises together.

    Raises:
        ConfigError: there is no model to train, or the task has no input to leave out.
        InputError: the index or the tokenizer has not been made yet.
    """
    options = cast(PVI, scorer)
    check(settings, scorer)
    train = options.train or settings.checkpoints.train or Train()
    settings = replace(settings, checkpoints=Checkpoints(train=train))
    run = RunFolder(Path(settings.run))
    facts = _facts(settings, run, options)
    payload = {"settings": plain(settings), "options": plain(options), "identity": facts["stamp"]}
    models = [*(f"fold-{fold}" for fold in range(options.folds)), NULL]
    parts = run.partitions()
    phases = (
        Phase(f"{NAME}: lengths", _lengths(run, parts, payload, facts), lengths_work),
        Phase(f"{NAME}: training", _trainings(run, models, train, payload, facts), train_work),
        Phase(f"{NAME}: measuring", _measurings(run, parts, models, train, payload, facts),
              measure_work),
        Phase(NAME, _joins(run, parts, models, train, payload, facts), join_work),
    )  # fmt: skip
    return OwnPasses(phases, tuple((table_name(seed), seed) for seed in train.seeds))


def check(settings: Settings, _: Scorer) -> None:
    """Refuse what cannot be measured, before anything is indexed or trained.

    Raises:
        ConfigError: there is no model to train, or the task has no input to leave out.
    """
    if settings.model.name is None and settings.model.config is None:
        raise ConfigError(
            "pvi trains models, but there is none to start from",
            fix="set model.name to fine-tune one, or model.config to make one from scratch",
        )
    kind = task_settings(settings).kind
    if kind == "causal-lm" and any(source.text for source in settings.sources.values()):
        raise ConfigError(
            "a plain text has no input apart from what is predicted, so pvi is not defined",
            fix="use pvi with labels, with prompt and response, or with messages",
        )
    if kind == "preference":
        raise ConfigError(
            "two answers and their prompt have no input that could be left out, so pvi is not"
            " defined",
            fix="use margin or loss, which the preference task has",
        )


def _facts(settings: Settings, run: RunFolder, options: PVI) -> dict[str, str]:
    """Fingerprints: `stamp` of the data, folds and encoding, `train` of the models, and
    `measure` of what measures."""
    shop = make_workshop(settings)
    device = pick_device(settings.model.device).type
    stamp = fingerprint(
        stage=NAME,
        version=VERSION,
        folds=options.folds,
        seed=settings.seed,
        task=plain(task_settings(settings)),
        facts=shop.task.facts(),
        tokenizer=None if shop.tokenizer is None else tokenizer_digest(shop.tokenizer),
        sources={name: content_settings(source) for name, source in settings.sources.items()},
        inputs=training_digests(run),
    )
    values = plain(settings.checkpoints.train)
    for key in ("seeds", "resume_every_seconds"):
        del values[key]
    train = fingerprint(
        stamp=stamp,
        train=values,
        model=model_facts(settings),
        stop=options.stop,
        threads=settings.cluster.threads,
    )
    measure = fingerprint(train=train, device=device,
                          batch_tokens=batch_tokens(settings.score, device))  # fmt: skip
    return {"stamp": stamp, "train": train, "measure": measure}


def _lengths(
    run: RunFolder, parts: list[Partition], payload: dict[str, Any], facts: Mapping[str, str]
) -> list[Task]:
    found: list[Task] = []
    for part in parts:
        more = {"partition": asdict(part), "fingerprint": facts["stamp"]}
        output = lengths_output(run, part)
        found.append(Task(part.name, payload | more, output, facts["stamp"]))
    return found


def _trainings(
    run: RunFolder,
    models: list[str],
    train: Train,
    payload: dict[str, Any],
    facts: Mapping[str, str],
) -> list[Task]:
    found: list[Task] = []
    for seed in train.seeds:
        for model in models:
            mark = fingerprint(train=facts["train"], model=model, seed=seed)
            more = {"model": model, "seed": seed, "fingerprint": mark}
            output = done_output(run, model, seed)
            found.append(Task(f"{model}, seed {seed}", payload | more, output, mark))
    return found


def _measurings(
    run: RunFolder,
    parts: list[Partition],
    models: list[str],
    train: Train,
    payload: dict[str, Any],
    facts: Mapping[str, str],
) -> list[Task]:
    """Model by model, so that a worker loads each once."""
    found: list[Task] = []
    for seed in train.seeds:
        for model in models:
            for part in parts:
                mark = fingerprint(measure=facts["measure"], model=model, seed=seed, part=part.name)
                more = {"model": model, "seed": seed, "partition": asdict(part),
                        "fingerprint": mark}  # fmt: skip
                name = f"{model}, seed {seed}, {part.name}"
                output = measured_output(run, model, seed, part)
                found.append(Task(name, payload | more, output, mark))
    return found


def _joins(
    run: RunFolder,
    parts: list[Partition],
    models: list[str],
    train: Train,
    payload: dict[str, Any],
    facts: Mapping[str, str],
) -> list[Task]:
    found: list[Task] = []
    for seed in train.seeds:
        for part in parts:
            mark = fingerprint(measure=facts["measure"], seed=seed, part=part.name, both=True)
            more = {"models": models, "seed": seed, "partition": asdict(part), "fingerprint": mark}
            output: Output = run.quantities(part, table_name(seed))
            found.append(Task(f"seed {seed}, {part.name}", payload | more, output, mark))
    return found
