"""What a worker does for `pvi`: lengths and folds, one training, one model over one partition.

Shapes: N examples of a partition.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from curate.data.example import KEY, TRAIN
from curate.data.files import read_json, remove_folder
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.data.tables import meet, read_examples, read_table, write_table
from curate.errors import InputError
from curate.models.checkpoints import Checkpoint, facts_of, list_checkpoints
from curate.models.epochs import Lengths, random_seed
from curate.models.quantities import measure
from curate.models.training import train
from curate.models.training_data import Data, Files
from curate.models.without_input import WithoutInput
from jobs.fields import example_fields
from jobs.measurers import Measurer
from jobs.measuring import batch_tokens, ready
from jobs.training_work import (
    Workshop,
    begin,
    encode_parts,
    held_out_examples,
    open_optimiser,
    open_workshop,
    plan_schedule,
    write_model,
)

log = logging.getLogger(__name__)

NAME = "pvi"
NULL = "null"
"""The model that is trained without the input."""


def lengths_output(run: RunFolder, part: Partition) -> Output:
    return Output(run.root / NAME / "lengths" / f"{part.name}.parquet")


def done_output(run: RunFolder, model: str, seed: int) -> Output:
    return Output(run.root / NAME / model / f"seed-{seed}" / "done.json")


def measured_output(run: RunFolder, model: str, seed: int, part: Partition) -> Output:
    return Output(run.root / NAME / "measured" / f"{model}-seed-{seed}" / f"{part.name}.parquet")


def table_name(seed: int) -> str:
    """Folder under `quantities/`."""
    return f"{NAME}-seed-{seed}"


def lengths_work(payload: dict[str, Any]) -> dict[str, Any]:
    """Write what each example of a partition costs in training, 0 where it is held out, with and
    without its input; and its fold."""
    shop = open_workshop(payload)
    part = Partition(**payload["partition"])
    examples = read_examples(shop.run, part, [*KEY, "content", "split"])
    fields = example_fields(shop.settings, shop.run, part)
    is_train = (examples["split"] == TRAIN).to_numpy()
    columns: dict[str, pl.Series] = {}
    for name, own in (("num_tokens", shop), ("null_tokens", _without_input(shop))):
        encoded = own.task.encode(fields)
        lengths = np.where(is_train & (encoded.num_scored > 0), encoded.lengths, 0)
        columns[name] = pl.Series(name, lengths, pl.Int64)
    num_folds = int(payload["options"]["folds"])
    # By content: a repeated example must not stand in its own judge's training set.
    folds = [
        random_seed(shop.settings.seed, NAME, content) % num_folds
        for content in examples["content"].to_list()
    ]
    table = examples.select(KEY).with_columns(*columns.values(), pl.Series("fold", folds, pl.Int8))
    lengths_output(shop.run, part).write(
        lambda path: write_table(table, path), payload["fingerprint"], rows=table.height
    )
    return {"rows": table.height}


def train_work(payload: dict[str, Any]) -> dict[str, Any]:
    """Train one model to the end, from where an earlier attempt stopped, and choose its state.

    Raises:
        InputError: there is nothing to train on.
        CurateError: the loss is no longer finite.
    """
    shop = open_workshop(payload)
    model, seed, mark = str(payload["model"]), int(payload["seed"]), str(payload["fingerprint"])
    lengths = _trained_lengths(shop, model)
    if model == NULL:
        shop = _without_input(shop)
    draws = random_seed(shop.settings.seed, NAME, model, seed)
    schedule = plan_schedule(shop, lengths, draws)
    if schedule.total_steps == 0:
        raise InputError(
            f"pvi has nothing to train {model} on: no training row outside of its fold counts",
            fix="give it more data, or check index.held_out and the columns of the sources",
        )
    root = shop.run.root / NAME / model
    begin(root / f"seed-{seed}", mark)
    optimiser = open_optimiser(shop, draws, schedule.total_steps)
    files = Files(
        root=root,
        seed=seed,
        fingerprint=mark,
        write_model=lambda target: write_model(optimiser.model, shop.tokenizer, target),
    )
    data = Data(
        lengths=lengths,
        encoded=lambda parts: encode_parts(shop, parts),
        held_out=held_out_examples(shop),
        write_log=lambda _epoch, _part, _values: None,
    )
    points = train(optimiser, shop.task, data, schedule, files)
    saved = [entry for entry in list_checkpoints(root) if entry.seed == seed]
    chosen, facts = _choose(saved, points, best=payload["options"]["stop"] == "best")
    _say(model, seed, facts)
    done = {"schema_version": 1, **facts, "checkpoint": facts_of(chosen)}
    done_output(shop.run, model, seed).write(_json_writer(done), mark, **facts)
    for entry in saved:  # the others have nothing to say
        if entry.name != chosen.name:
            remove_folder(entry.path)
    remove_folder(files.state.parent)
    return facts


def measure_work(payload: dict[str, Any]) -> dict[str, Any]:
    """Surprise at each answer of a partition, of the examples that the model judges."""
    shop = open_workshop(payload)
    part = Partition(**payload["partition"])
    model, seed = str(payload["model"]), int(payload["seed"])
    measurer = _measurer(shop.run, model, seed)
    task, loaded = ready(shop.settings, measurer)
    if model == NULL:
        task = WithoutInput(task, loaded.tokenizer)
    table = read_table(lengths_output(shop.run, part).path)
    folds = table["fold"].to_numpy()
    own = np.arange(len(folds)) if model == NULL else np.flatnonzero(folds == fold_of(model))
    bits, counts = np.full(len(folds), np.nan), np.full(len(folds), np.nan)
    if len(own):
        encoded = task.encode(example_fields(shop.settings, shop.run, part)[own])
        found, _ = measure(
            loaded.model,
            task,
            encoded,
            batch_tokens=batch_tokens(shop.settings.score, loaded.device.type),
            device=loaded.device,
        )
        bits[own] = found["loss"].double().numpy() / math.log(2)
        counts[own] = found["num_scored"].double().numpy()
    columns = [pl.Series("bits", bits), pl.Series("num_scored", counts).cast(pl.Float32)]
    written = (
        table.select(KEY)
        .with_columns(columns)
        .with_columns(
            pl.when(pl.col("bits", "num_scored").is_finite()).then(pl.col("bits", "num_scored"))
        )
    )
    measured_output(shop.run, model, seed, part).write(
        lambda path: write_table(written, path), payload["fingerprint"], rows=written.height
    )
    return {"rows": written.height}


def join_work(payload: dict[str, Any]) -> dict[str, Any]:
    """Both surprises of each example of a partition, whichever model judged it."""
    shop = open_workshop(payload)
    part = Partition(**payload["partition"])
    seed = int(payload["seed"])
    keys = read_examples(shop.run, part, KEY)
    frames: dict[str, pl.DataFrame] = {}
    for model in payload["models"]:
        frames[model] = read_table(measured_output(shop.run, model, seed, part).path)
        meet(keys, frames[model])
    folds = [frame for model, frame in frames.items() if model != NULL]
    table = keys.with_columns(
        pl.DataFrame(
            {
                "given_bits": _first([frame["bits"] for frame in folds]),
                "null_bits": frames[NULL]["bits"],
                "num_scored": _first([frame["num_scored"] for frame in folds]),
            }
        )
    )
    shop.run.quantities(part, table_name(seed)).write(
        lambda path: write_table(table, path), payload["fingerprint"], rows=table.height
    )
    return {"rows": table.height}


def fold_of(model: str) -> int:
    """The number of the fold that a model did not see."""
    return int(model.removeprefix("fold-"))


def _without_input(shop: Workshop) -> Workshop:
    return replace(shop, task=WithoutInput(shop.task, shop.tokenizer))


def _trained_lengths(shop: Workshop, model: str) -> list[Lengths]:
    """What each example of every partition costs this model; 0 where it is not trained on."""
    found: list[Lengths] = []
    for part in shop.partitions:
        table = read_table(lengths_output(shop.run, part).path)
        if model == NULL:
            lengths = table["null_tokens"].to_numpy()
        else:
            is_own = table["fold"].to_numpy() == fold_of(model)
            lengths = np.where(is_own, 0, table["num_tokens"].to_numpy())
        found.append(lengths.astype(np.int32))
    return found


def _choose(
    saved: Sequence[Checkpoint], points: Sequence[dict[str, Any]], *, best: bool
) -> tuple[Checkpoint, dict[str, Any]]:
    """The state that judges, and how it compares with the last one."""
    losses: dict[int, float | None] = {p["step"]: p["held_out_loss"] for p in points}
    known = [entry for entry in saved if losses.get(entry.step) is not None]
    last = saved[-1]
    chosen = min(known, key=lambda entry: losses[entry.step] or 0.0) if best and known else last
    return chosen, {
        "step": chosen.step,
        "epoch": chosen.epoch,
        "last_epoch": last.epoch,
        "held_out_loss": losses.get(chosen.step),
        "last_held_out_loss": losses.get(last.step),
    }


def _say(model: str, seed: int, facts: dict[str, Any]) -> None:
    if facts["held_out_loss"] is None:
        log.warning("pvi, %s of seed %d: nothing is held out, so that over-training is not seen and"
                    " the last state judges", model, seed)  # fmt: skip
    elif facts["epoch"] < facts["last_epoch"]:
        log.info("pvi, %s of seed %d: held-out loss %.4f was best after epoch %g of %g; that state"
                 " judges", model, seed, facts["held_out_loss"], facts["epoch"],
                 facts["last_epoch"])  # fmt: skip


def _measurer(run: RunFolder, model: str, seed: int) -> Measurer:
    done = read_json(done_output(run, model, seed).path)
    assert done is not None  # its phase came first
    checkpoint = done["checkpoint"]
    folder = run.root / NAME / model / Path(checkpoint["name"])
    return Measurer(f"{NAME}-{model}-seed-{seed}", folder, seed, checkpoint["digest"])


def _first(columns: Sequence[pl.Series]) -> pl.Series:
    """Row by row the value of the column that has one."""
    frame = pl.DataFrame({str(place): column for place, column in enumerate(columns)})
    return frame.select(pl.coalesce(pl.all())).to_series()


def _json_writer(value: dict[str, Any]):
    text = json.dumps(value, indent=1) + "\n"
    return lambda path: path.write_text(text, encoding="utf-8")
