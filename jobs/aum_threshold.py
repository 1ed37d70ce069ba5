"""`aum_threshold`: two trainings in which some examples are of a class that does not exist.

run/aum_threshold/checkpoints/seed-0/log/   the margins of the first run, epoch by epoch
run/aum_threshold/limit-0.json              the area below which its examples are flagged
run/quantities/aum_threshold/               mean areas and flags, a table for each partition
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import torch
from torch import Tensor

from curate.config import parse, plain
from curate.data.example import KEY
from curate.data.files import fingerprint, read_json, remove_folder, write_json
from curate.data.files import replace as replace_file
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.data.tables import read_examples, write_table
from curate.errors import ConfigError, InputError
from curate.models.checkpoints import list_checkpoints
from curate.models.epochs import random_seed
from curate.models.presentations import mean_shown, rounds
from curate.models.settings import Train
from curate.models.tasks import Encoded
from curate.models.tokens import tokenizer_digest
from curate.models.training import train
from curate.models.training_data import Data, Files, join
from curate.models.training_log import log_table
from jobs.history import read_log
from jobs.lengths import content_settings
from jobs.own_passes import OwnPasses, Phase
from jobs.run import Task
from jobs.settings import Settings, task_settings
from jobs.tokenizer import training_digests
from jobs.train import model_facts
from jobs.training_work import (
    Workshop,
    begin,
    encode_partition,
    make_workshop,
    open_optimiser,
    open_workshop,
    plan_schedule,
    trained_lengths,
    write_model,
)
from scorers.aum_threshold import RUNS, AUMThreshold, limit_of, threshold_runs
from scorers.protocol import Scorer
from scorers.random import uniform

VERSION = 1
"""Raised when the same data and settings would give other numbers."""

NAME = "aum_threshold"


def passes(settings: Settings, scorer: Scorer) -> OwnPasses:
    """Trainings, the limit of each, judgement of each partition.

    Raises:
        ConfigError: nothing is trained, or the task has no classes.
        InputError: the index or the tokenizer has not been made yet.
    """
    options = cast(AUMThreshold, scorer)
    settings = _with_one_more_class(settings)
    run = RunFolder(Path(settings.run))
    trained = _trained_mark(settings, run)
    judged = fingerprint(trained=trained, options=plain(options))
    payload = {"settings": plain(settings), "options": plain(options), "identity": trained}
    trainings: list[Task] = []
    limits: list[Task] = []
    for number in range(RUNS):
        mark = fingerprint(trained=trained, run=number)
        more = payload | {"run": number, "fingerprint": mark}
        trainings.append(Task(f"run {number}", more, done_output(run, number), mark))
        mark = fingerprint(judged=judged, run=number)
        more = payload | {"run": number, "fingerprint": mark}
        limits.append(Task(f"run {number}", more, limit_output(run, number), mark))
    judgements: list[Task] = []
    for part in run.partitions():
        more = payload | {"partition": asdict(part), "fingerprint": judged}
        judgements.append(Task(part.name, more, run.quantities(part, NAME), judged))
    phases = (
        Phase(f"{NAME}: training", trainings, train_work),
        Phase(f"{NAME}: limits", limits, limit_work),
        Phase(f"{NAME}: judging", judgements, judge_work),
    )
    return OwnPasses(phases, ((NAME, 0),))


def check(settings: Settings, _: Scorer) -> None:
    """Refuse what cannot be measured, before anything is indexed or trained.

    Raises:
        ConfigError: nothing is trained, or the task has no classes.
    """
    _with_one_more_class(settings)


def own_folder(run: RunFolder) -> RunFolder:
    """A run folder of its own for both trainings: `seed-0` and `seed-1` are their numbers."""
    return RunFolder(run.root / NAME)


def done_output(run: RunFolder, number: int) -> Output:
    return Output(own_folder(run).checkpoints / f"seed-{number}" / "done.json")


def limit_output(run: RunFolder, number: int) -> Output:
    return Output(run.root / NAME / f"limit-{number}.json")


def _with_one_more_class(settings: Settings) -> Settings:
    num_classes = getattr(task_settings(settings), "num_classes", None)
    if num_classes is None:
        raise ConfigError(
            "aum_threshold gives examples a class that does not exist, but the task has no classes",
            fix="use aum, which needs none",
        )
    given = settings.checkpoints.train
    if given is None or (settings.model.name is None and settings.model.config is None):
        raise ConfigError(
            "aum_threshold trains a model twice, but nothing says how",
            fix="set checkpoints.train, and model.config or model.name",
        )
    # One checkpoint, which goes again: only the log counts.
    once: Train = replace(given, save_every_epochs=given.epochs, save_moments=False)
    return replace(
        settings,
        task={**settings.task, "num_classes": num_classes + 1},
        checkpoints=replace(settings.checkpoints, train=once),
    )


def _trained_mark(settings: Settings, run: RunFolder) -> str:
    shop = make_workshop(settings)
    values = plain(settings.checkpoints.train)
    for key in ("seeds", "resume_every_seconds"):
        del values[key]
    return fingerprint(
        stage=NAME,
        version=VERSION,
        seed=settings.seed,
        train=values,
        model=model_facts(settings),
        task=plain(task_settings(settings)),
        facts=shop.task.facts(),
        tokenizer=None if shop.tokenizer is None else tokenizer_digest(shop.tokenizer),
        sources={name: content_settings(source) for name, source in settings.sources.items()},
        threads=settings.cluster.threads,
        inputs=training_digests(run),
    )


def train_work(payload: dict[str, Any]) -> dict[str, Any]:
    """Train one run to the end, from where an earlier attempt stopped; leaves its log.

    Raises:
        InputError: there is nothing to train on.
        CurateError: the loss is no longer finite.
    """
    shop = open_workshop(payload)
    number, mark = int(payload["run"]), str(payload["fingerprint"])
    lengths = [
        trained_lengths(shop, part, read_examples(shop.run, part, ["split"])["split"])
        for part in shop.partitions
    ]
    draws = random_seed(shop.settings.seed, NAME, number)
    schedule = plan_schedule(shop, lengths, draws)
    if schedule.total_steps == 0:
        raise InputError(
            "there is nothing to train on: no training row has a token that counts",
            fix="check index.held_out and the columns of the sources",
        )
    root = own_folder(shop.run).checkpoints
    folder = root / f"seed-{number}"
    begin(folder, mark)
    optimiser = open_optimiser(shop, draws, schedule.total_steps)
    files = Files(
        root=root,
        seed=number,
        fingerprint=mark,
        write_model=lambda target: write_model(optimiser.model, shop.tokenizer, target),
    )
    data = Data(
        lengths=lengths,
        encoded=lambda parts: relabelled(shop, parts, number),
        held_out=None,
        write_log=lambda epoch, part, values: _write_log(shop, folder, epoch, part, values),
    )
    points = train(optimiser, shop.task, data, schedule, files)
    facts = {"schema_version": 1, "steps": points[-1]["step"], "loss": points[-1]["loss"]}
    output = done_output(shop.run, number)
    output.write(lambda path: path.write_text(f"{facts['steps']}\n"), mark, **facts)
    for entry in list_checkpoints(root):
        if entry.seed == number:
            remove_folder(entry.path)
    remove_folder(files.state.parent)
    return facts


def relabelled(shop: Workshop, parts: Sequence[int], number: int) -> Encoded:
    """Examples of some partitions; the run's threshold samples have the last class."""
    found: list[Encoded] = []
    for part in (shop.partitions[index] for index in parts):
        encoded = encode_partition(shop, part)
        is_sample = _runs(shop, read_examples(shop.run, part, KEY)) == number
        labels = encoded.arrays["labels"]
        fake = np.where(is_sample & (labels >= 0), _num_classes(shop), labels)
        found.append(replace(encoded, arrays={**encoded.arrays, "labels": fake}))
    return join(found)


def _num_classes(shop: Workshop) -> int:
    """C: the class that does not exist is the last of the task's."""
    return int(task_settings(shop.settings).num_classes) - 1


def _runs(shop: Workshop, keys: pl.DataFrame) -> np.ndarray:
    """(N,) run in which each example is a threshold sample, or -1."""
    seed = random_seed(shop.settings.seed, NAME, "samples") % 2**63
    return threshold_runs(uniform(keys.rows(), seed=seed), _num_classes(shop)).numpy()


def _write_log(
    shop: Workshop, folder: Path, epoch: int, part: int, values: np.ndarray | None
) -> None:
    partition = shop.partitions[part]
    table = log_table(read_examples(shop.run, partition, KEY), values)
    path = folder / "log" / f"epoch-{epoch:03d}" / f"{partition.name}.parquet"
    replace_file(path, lambda target: write_table(table, target))


def _areas(shop: Workshop, part: Partition, number: int, options: AUMThreshold) -> Tensor:
    """(N,) area under the margin of each example in one run, NaN where it was not shown."""
    keys = read_examples(shop.run, part, KEY)
    margins = read_log(own_folder(shop.run), part, keys, number)["margin_by_epoch"]
    chosen = rounds(torch.from_numpy(margins), skip_first=options.skip_first, epochs=options.epochs)
    return mean_shown(chosen)


def limit_work(payload: dict[str, Any]) -> dict[str, Any]:
    """The limit of one run, from its threshold samples in all partitions."""
    shop, options = open_workshop(payload), parse(AUMThreshold, payload["options"])
    number = int(payload["run"])
    samples: list[Tensor] = []
    for part in shop.partitions:
        is_sample = _runs(shop, read_examples(shop.run, part, KEY)) == number
        samples.append(_areas(shop, part, number, options)[torch.from_numpy(is_sample)])
    areas = torch.cat(samples)
    limit = limit_of(areas, options.percentile)
    if not np.isfinite(limit):
        raise InputError(
            f"aum_threshold: run {number} has no threshold sample among {len(areas)} examples",
            fix="the pool is too small for it; use aum",
        )
    facts = {"schema_version": 1, "limit": limit, "num_samples": int(areas.isfinite().sum())}
    limit_output(shop.run, number).write(
        lambda path: write_json(path, facts), str(payload["fingerprint"]), **facts
    )
    return facts


def judge_work(payload: dict[str, Any]) -> dict[str, Any]:
    """Areas and flags of one partition; null where an example was not trained on."""
    shop, options = open_workshop(payload), parse(AUMThreshold, payload["options"])
    part = Partition(**payload["partition"])
    keys = read_examples(shop.run, part, KEY)
    own_runs = torch.from_numpy(_runs(shop, keys))
    areas = torch.stack([_areas(shop, part, number, options) for number in range(RUNS)])
    limits = [read_json(limit_output(shop.run, number).path)["limit"] for number in range(RUNS)]
    kept = own_runs[None] != torch.arange(RUNS)[:, None]  # (RUNS, N) it had its own label
    is_low = areas < torch.tensor(limits, dtype=areas.dtype)[:, None]
    area = torch.where(kept, areas, torch.nan).nanmean(dim=0)
    flagged = torch.where(area.isnan(), torch.nan, (is_low | ~kept).all(dim=0).to(area.dtype))
    columns = [
        pl.Series(name, values.float().numpy()).fill_nan(None)
        for name, values in (("area", area), ("flagged", flagged))
    ]
    table = keys.hstack(columns)
    shop.run.quantities(part, NAME).write(
        lambda path: write_table(table, path), str(payload["fingerprint"]), rows=table.height
    )
    return {"rows": table.height}
