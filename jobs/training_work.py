"""What a worker does for `curate train`: lengths of one partition, or one whole training run."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import nn

from curate.data.example import HELD_OUT, KEY, TRAIN
from curate.data.files import discard, read_json, remove_folder, replace, write_json
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.data.tables import meet, read_examples, read_table, write_table
from curate.errors import InputError
from curate.models.adapters import has_adapter, save_adapter
from curate.models.checkpoints import facts_of, list_checkpoints
from curate.models.epochs import Lengths, Schedule, plan_epochs, random_permutation, random_seed
from curate.models.load import (
    build_model,
    load_model,
    max_positions,
    model_folder,
    pick_device,
)
from curate.models.optimiser import Optimiser
from curate.models.own import is_own
from curate.models.saved import read_config
from curate.models.settings import Train
from curate.models.tasks import Encoded, Task, build_task
from curate.models.training import train
from curate.models.training_data import Data, Files, join
from curate.models.training_log import log_table
from jobs.fields import example_fields
from jobs.settings import Settings, parse_settings, task_settings
from jobs.tokenizer import run_tokenizer

HELD_OUT_EXAMPLES = 512
"""Most held-out examples that the learning curve is evaluated on."""

_HELD_OUT_PARTITIONS = 16


@dataclass(frozen=True, slots=True)
class Workshop:
    """What every task of the stage needs, made once per process."""

    settings: Settings
    run: RunFolder
    task: Task
    tokenizer: Any | None
    partitions: list[Partition]


def measure_lengths(payload: dict[str, Any]) -> dict[str, Any]:
    """Write how many tokens each example of a partition costs; 0 where it is not trained on."""
    shop = open_workshop(payload)
    part = Partition(**payload["partition"])
    examples = read_examples(shop.run, part, [*KEY, "split"])
    lengths = trained_lengths(shop, part, examples["split"])
    table = examples.select(KEY).with_columns(pl.Series("num_tokens", lengths, pl.Int64))
    output = lengths_output(shop.run, part)
    output.write(lambda path: write_table(table, path), payload["fingerprint"], rows=table.height)
    return {"rows": table.height}


def train_seed(payload: dict[str, Any]) -> dict[str, Any]:
    """Train one model to the end, from where an earlier attempt stopped.

    Raises:
        InputError: there is nothing to train on.
        CurateError: the loss is no longer finite.
        OutputError: the disk refuses a write.
    """
    shop = open_workshop(payload)
    seed, mark = int(payload["seed"]), str(payload["fingerprint"])
    trained = read_lengths(shop)
    draws = random_seed(shop.settings.seed, "train", seed)
    schedule = plan_schedule(shop, trained, draws)
    if schedule.total_steps == 0:
        raise InputError(
            "there is nothing to train on: no training row has a token that counts",
            fix="check index.held_out and the columns of the sources",
        )
    folder = shop.run.checkpoints / f"seed-{seed}"
    begin(folder, mark)
    optimiser = open_optimiser(shop, draws, schedule.total_steps)
    files = Files(
        root=shop.run.checkpoints,
        seed=seed,
        fingerprint=mark,
        write_model=lambda target: write_model(optimiser.model, shop.tokenizer, target),
    )
    data = Data(
        lengths=trained,
        encoded=lambda parts: encode_parts(shop, parts),
        held_out=held_out_examples(shop),
        write_log=lambda epoch, part, values: _write_log(shop, folder, epoch, part, values),
    )
    points = train(optimiser, shop.task, data, schedule, files)
    last = points[-1]
    facts = {key: last[key] for key in ("step", "epoch", "tokens", "loss", "held_out_loss")}
    saved = [facts_of(c) for c in list_checkpoints(shop.run.checkpoints) if c.seed == seed]
    done: dict[str, Any] = {"schema_version": 1, "seed": seed, **facts, "checkpoints": saved}
    done_output(shop.run, seed).write(_json_writer(done), mark, **facts)
    remove_folder(files.state.parent)
    return facts


def open_workshop(payload: dict[str, Any]) -> Workshop:
    """Settings, task and tokenizer of a task, from the cache where it is the same run."""
    torch.set_num_threads(int(payload["settings"]["cluster"]["threads"]))
    return _workshop(json.dumps(payload["settings"], sort_keys=True), str(payload["identity"]))


@lru_cache(maxsize=1)
def _workshop(settings_json: str, identity: str) -> Workshop:
    """`identity` is that of the tokenizer and the index, which stand in files."""
    return make_workshop(parse_settings(json.loads(settings_json)))


def make_workshop(settings: Settings) -> Workshop:
    """Load the tokenizer and build the task."""
    run = RunFolder(Path(settings.run))
    tokenizer = run_tokenizer(settings)
    limit = _max_positions(settings)
    task = build_task(task_settings(settings), tokenizer, max_positions=limit)
    return Workshop(settings, run, task, tokenizer, run.partitions())


def lengths_output(run: RunFolder, part: Partition) -> Output:
    return Output(run.checkpoints / "lengths" / f"{part.name}.parquet")


def done_output(run: RunFolder, seed: int) -> Output:
    return Output(run.checkpoints / f"seed-{seed}" / "done.json")


def trained_lengths(shop: Workshop, part: Partition, split: pl.Series) -> Lengths:
    """Tokens that each example of a partition costs in a batch; 0 where it is not trained on."""
    is_train = (split == TRAIN).to_numpy()
    if not is_train.any():
        return np.zeros(len(is_train), dtype=np.int32)
    encoded = encode_partition(shop, part)
    counts = is_train & (encoded.num_scored > 0)
    return np.where(counts, encoded.lengths, 0).astype(np.int32)


def read_lengths(shop: Workshop) -> list[Lengths]:
    """What `measure_lengths` wrote, of all partitions."""
    return [
        read_table(lengths_output(shop.run, part).path, columns=["num_tokens"])["num_tokens"]
        .to_numpy()
        .astype(np.int32)
        for part in shop.partitions
    ]


def plan_schedule(shop: Workshop, trained: Sequence[Lengths], draws: int) -> Schedule:
    train = training(shop.settings)
    return plan_epochs(
        trained,
        seed=draws,
        batch_tokens=train.batch_tokens,
        epochs=train.epochs,
        save_every_epochs=train.save_every_epochs,
        max_steps=train.max_steps,
    )


def training(settings: Settings) -> Train:
    """`checkpoints.train`, where the stage has something to do."""
    assert settings.checkpoints.train is not None
    return settings.checkpoints.train


def encode_partition(shop: Workshop, part: Partition) -> Encoded:
    """The examples of a partition, held out or not, as numbers."""
    # The keys go along so that a message can name the row.
    return shop.task.encode(example_fields(shop.settings, shop.run, part))


def encode_parts(shop: Workshop, parts: Sequence[int]) -> Encoded:
    """The examples of some partitions, one after the other."""
    return join([encode_partition(shop, shop.partitions[part]) for part in parts])


def open_optimiser(shop: Workshop, draws: int, total_steps: int) -> Optimiser:
    """A fresh model, from scratch or loaded, ready to train."""
    settings, task = shop.settings, task_settings(shop.settings)
    model_seed = random_seed(draws, "weights") % 2**63
    if settings.model.config is not None:
        features = _num_features(shop)
        model = build_model(settings.model, task, shop.tokenizer, model_seed, num_features=features)
    else:
        model = load_model(settings.model, task, head_seed=model_seed, dtype="float32").model
    return Optimiser(
        model,
        training(settings),
        seed=draws,
        total_steps=total_steps,
        device=pick_device(settings.model.device),
        dtype=settings.model.dtype,
    )


def begin(folder: Path, mark: str) -> None:
    """Make the folder of a training run ready; what other settings left in it goes first."""
    identity = folder / "training.json"
    saved = read_json(identity)
    if saved is not None and saved.get("fingerprint") == mark:
        _sweep(folder)
        return
    discard(identity)  # first: half a removal must not look like a run of ours
    remove_folder(folder)
    if folder.exists():
        shutil.rmtree(folder)  # fails where the first did
    write_json(identity, {"schema_version": 1, "fingerprint": mark})


def _sweep(folder: Path) -> None:
    """Remove what a killed process was about to write."""
    for path in sorted(folder.rglob(".*.tmp")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _num_features(shop: Workshop) -> int | None:
    marks = (shop.run.examples(part).mark() or {} for part in shop.partitions)
    return next((mark["num_features"] for mark in marks if mark.get("num_features")), None)


def _max_positions(settings: Settings) -> int | None:
    """Longest input of a model that exists; one from scratch is checked when it is built."""
    if settings.model.name is None:
        return None
    from transformers import AutoConfig

    folder = model_folder(settings.model)
    if is_own(read_config(folder)):
        return None
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    return max_positions(cast(nn.Module, SimpleNamespace(config=config)))


def held_out_examples(shop: Workshop) -> Encoded | None:
    """Held-out examples for the learning curve: from a few partitions, chosen by the run's seed."""
    order = random_permutation(
        len(shop.partitions), random_seed(shop.settings.seed, "train", "held-out")
    )
    found = list[tuple[Encoded, npt.NDArray[np.int64]]]()
    wanted = HELD_OUT_EXAMPLES
    for index in order[:_HELD_OUT_PARTITIONS]:
        part = shop.partitions[index]
        is_held_out = read_examples(shop.run, part, ["split"])["split"] == HELD_OUT
        rows = is_held_out.arg_true().to_numpy()[:wanted].astype(np.int64)
        if len(rows):
            found.append((encode_partition(shop, part), rows))
            wanted -= len(rows)
        if not wanted:
            break
    if not found:
        return None
    for encoded, rows in found:  # what is not chosen does not count
        chosen = np.zeros(len(encoded), dtype=bool)
        chosen[rows] = True
        encoded.num_scored[~chosen] = 0
    return join([encoded for encoded, _ in found])


def write_model(model: nn.Module, tokenizer: Any | None, folder: Path) -> None:
    """Save a model, or the adapter in it, and its tokenizer, so that it loads like any other."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # bars belong to the command line
    try:
        if has_adapter(model):
            save_adapter(model, folder)
        else:
            model.save_pretrained(str(folder))  # pyright: ignore[reportCallIssue]
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def _write_log(
    shop: Workshop,
    folder: Path,
    epoch: int,
    part: int,
    values: npt.NDArray[np.float32] | None,
) -> None:
    partition = shop.partitions[part]
    keys = read_examples(shop.run, partition, list(KEY))
    table = log_table(keys, values)
    meet(keys, table)
    path = folder / "log" / f"epoch-{epoch:03d}" / f"{partition.name}.parquet"
    replace(path, lambda target: write_table(table, target))


def _json_writer(value: dict[str, Any]):
    text = json.dumps(value, indent=1) + "\n"
    return lambda path: path.write_text(text, encoding="utf-8")
