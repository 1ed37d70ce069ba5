"""What a worker does for `curate compare`: token counts of a partition, or one arm with one seed.

Weights are drawn, and data are shuffled, by the seed alone, so that the arms of one seed differ in
nothing but their data.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from curate.data.example import KEY
from curate.data.files import remove_folder
from curate.data.partitions import Partition
from curate.data.tables import read_examples, write_table
from curate.errors import DivergedError, InputError
from curate.models.checkpoints import list_checkpoints
from curate.models.epochs import Lengths, Schedule, plan_epochs
from curate.models.load import load_model
from curate.models.optimiser import Optimiser
from curate.models.settings import Checkpoints
from curate.models.tasks import Encoded
from curate.models.training import train
from curate.models.training_data import Data, Files, join
from jobs.compare_arms import result_output
from jobs.compare_budget import (
    Budget,
    Fit,
    Rows,
    fit,
    measured_output,
    rows_of,
    tiled_rows,
    training_draws,
)
from jobs.compare_evaluation import evaluate, results_as_json
from jobs.fields import example_fields
from jobs.measuring import batch_tokens
from jobs.settings import task_settings
from jobs.training_work import (
    Workshop,
    begin,
    open_optimiser,
    open_workshop,
    trained_lengths,
    training,
    write_model,
)

VERSION = 1


def measure_partition(payload: dict[str, Any]) -> dict[str, Any]:
    """Write how many tokens each example of a partition costs in training."""
    shop = open_workshop(payload)
    part = Partition(**payload["partition"])
    examples = read_examples(shop.run, part, [*KEY, "split"])
    lengths = trained_lengths(shop, part, examples["split"])
    table = examples.select(KEY).with_columns(pl.Series("num_tokens", lengths, pl.Int64))
    measured_output(shop.run, part).write(
        lambda path: write_table(table, path), payload["fingerprint"], rows=table.height
    )
    return {"rows": table.height}


def train_arm(payload: dict[str, Any]) -> dict[str, Any]:
    """Train one set with one seed, from where an earlier attempt stopped, and measure the model.

    A run that diverges is a result, not a failure: it is written down as such.
    """
    started = time.monotonic()
    run = _prepare(payload)
    value: dict[str, Any] = {
        "schema_version": 1,
        "seed": run.files.seed,
        "steps": run.schedule.total_steps,
        "batch_tokens": run.fitting.batch_tokens,
        "passes_together": run.fitting.together,
        "parameters": sum(p.numel() for p in run.optimiser.model.parameters()),
        "epochs": round(run.fitting.together * run.schedule.progress(run.schedule.total_steps), 6),
        "diverged": None,
        "tokens": None,
        "points": [],
    }
    try:
        points = train(run.optimiser, run.shop.task, run.data, run.schedule, run.files)
    except DivergedError as error:
        value["diverged"] = error.what
    else:
        value["tokens"] = points[-1]["tokens"]
        value["points"] = _measure(run.shop, run.files, points)
    seconds = round(time.monotonic() - started, 3)
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    result_output(run.shop.run, payload["key"]).write(
        lambda path: path.write_text(text, encoding="utf-8"), run.files.fingerprint, seconds=seconds
    )
    if not run.shop.settings.compare.keep_models:
        remove_folder(run.files.root)
    return {"steps": value["steps"], "seconds": seconds}


@dataclass(frozen=True, slots=True)
class _Run:
    """One training run, ready to begin or to go on."""

    shop: Workshop
    fitting: Fit
    schedule: Schedule
    optimiser: Optimiser
    data: Data
    files: Files


def _prepare(payload: dict[str, Any]) -> _Run:
    """Everything that training takes, from what a task carries."""
    shop, seed = open_workshop(payload), int(payload["seed"])
    budget, draws = Budget(**payload["budget"]), training_draws(shop.settings, seed)
    rows = rows_of(shop.run, payload["set"])
    start = training(shop.settings).batch_tokens
    fitting = fit([each.lengths for each in rows], draws, budget, start)
    rows = tiled_rows(rows, fitting.together)
    lengths = [each.lengths for each in rows]
    shop = _with_batch(shop, fitting.batch_tokens)
    points = shop.settings.compare.points
    schedule = _schedule(lengths, draws, budget, fitting.batch_tokens, points)
    root = result_output(shop.run, payload["key"]).path.parent / "checkpoints"
    begin(root / f"seed-{seed}", payload["fingerprint"])
    optimiser = open_optimiser(shop, draws, schedule.total_steps)
    files = Files(
        root=root,
        seed=seed,
        fingerprint=payload["fingerprint"],
        write_model=lambda target: write_model(optimiser.model, shop.tokenizer, target),
    )
    data = Data(
        lengths=lengths,
        encoded=lambda parts: _encode(shop, rows, parts),
        held_out=None,
        write_log=lambda epoch, part, values: None,
        weights=_weights(rows) if payload["weighted"] else None,
    )
    return _Run(shop, fitting, schedule, optimiser, data, files)


def _measure(shop: Workshop, files: Files, points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The numbers at every checkpoint."""
    tokens = {point["step"]: point["tokens"] for point in points}
    kind = task_settings(shop.settings)
    found: list[dict[str, Any]] = []
    for checkpoint in list_checkpoints(files.root):
        loaded = load_model(shop.settings.model, kind, checkpoint=checkpoint.path)
        budget = batch_tokens(shop.settings.score, loaded.device.type)
        measured = evaluate(shop, loaded.model, budget)
        found.append(
            {
                "step": checkpoint.step,
                "tokens": tokens[checkpoint.step],
                "measured": results_as_json(measured),
            }
        )
    return found


def _schedule(
    lengths: Sequence[Lengths], draws: int, budget: Budget, size: int, points: int
) -> Schedule:
    """Exactly the budget's steps, through the data as often as it takes."""
    rows = sum(int((each > 0).sum()) for each in lengths)
    if not rows:
        raise InputError("an arm has nothing to train on", fix="check what its plan keeps")
    schedule = plan_epochs(
        lengths,
        seed=draws,
        batch_tokens=size,
        epochs=budget.steps,  # an epoch has one step at least
        save_every_epochs=budget.steps,
        max_steps=budget.steps,
    )
    saves = {round(budget.steps * point / points) for point in range(1, points + 1)}
    return Schedule(schedule.epoch_steps, schedule.epoch_batches, frozenset(saves - {0}))


def _with_batch(shop: Workshop, size: int) -> Workshop:
    chosen = replace(training(shop.settings), batch_tokens=size)
    settings = replace(shop.settings, checkpoints=Checkpoints(train=chosen))
    return replace(shop, settings=settings)


def _encode(shop: Workshop, rows: Sequence[Rows], parts: Sequence[int]) -> Encoded:
    """The rows that a set uses in some partitions, one after the other."""
    found: list[Encoded] = []
    for index in parts:
        positions = rows[index].positions
        if len(positions):
            found.append(_taken(shop, shop.partitions[index], positions))
    return join(found)


def _taken(shop: Workshop, part: Partition, positions: npt.NDArray[np.int64]) -> Encoded:
    return shop.task.encode(example_fields(shop.settings, shop.run, part)[positions])


def _weights(rows: Sequence[Rows]) -> Any:
    def weights(parts: tuple[int, ...]) -> npt.NDArray[np.float32]:
        return np.concatenate([rows[part].weights for part in parts])

    return weights
