"""What a worker does for `curate evaluate-attribution`: one model on one subset, and its losses.

    run/attribution/lengths/part-….parquet           what each example costs in training
    run/attribution/queries.parquet                  the target examples that are measured
    run/attribution/trained/<subset>-<model>/losses.parquet    their losses

Subsets are drawn by (run seed, attribution.seed, number) from the training examples in the index'
order, weights and shuffles by the model's number too.

Shapes: N training examples of the run, Q queries.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from curate.data.example import KEY
from curate.data.files import remove_folder
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.data.tables import read_examples, read_table, write_table
from curate.errors import DivergedError, InputError
from curate.models.checkpoints import list_checkpoints
from curate.models.epochs import Lengths, plan_epochs, random_permutation, random_seed
from curate.models.load import load_model
from curate.models.quantities import measure
from curate.models.settings import Checkpoints, Train
from curate.models.training import train
from curate.models.training_data import Data, Files
from jobs.fields import example_fields
from jobs.measuring import batch_tokens
from jobs.settings import Settings, task_settings
from jobs.target import target_folder, target_settings
from jobs.training_work import (
    Workshop,
    begin,
    encode_parts,
    open_optimiser,
    open_workshop,
    trained_lengths,
    training,
    write_model,
)

FOLDER = "attribution"


def training_settings(settings: Settings) -> Settings:
    """The settings with `attribution.train` in the place where training looks."""
    chosen = settings.attribution.train or settings.checkpoints.train or Train()
    return replace(settings, checkpoints=Checkpoints(train=chosen))


def subset_lengths_output(run: RunFolder, part: Partition) -> Output:
    return Output(run.root / FOLDER / "lengths" / f"{part.name}.parquet")


def queries_output(run: RunFolder) -> Output:
    return Output(run.root / FOLDER / "queries.parquet")


def losses_output(run: RunFolder, subset: int, model: int) -> Output:
    """What came of one training."""
    name = f"subset-{subset:04d}-model-{model}"
    return Output(run.root / FOLDER / "trained" / name / "losses.parquet")


def subset_lengths_work(payload: dict[str, Any]) -> dict[str, Any]:
    """Write how many tokens each example of a partition costs in training; 0: no part of it."""
    shop = open_workshop(payload)
    part = Partition(**payload["partition"])
    examples = read_examples(shop.run, part, [*KEY, "split"])
    lengths = trained_lengths(shop, part, examples["split"])
    table = examples.select(KEY).with_columns(pl.Series("num_tokens", lengths, pl.Int64))
    subset_lengths_output(shop.run, part).write(
        lambda path: write_table(table, path), payload["fingerprint"], rows=table.height
    )
    return {"rows": table.height}


def pool_lengths(run: RunFolder) -> list[Lengths]:
    """What `subset_lengths_work` wrote, of all partitions."""
    return [
        read_table(subset_lengths_output(run, part).path, ["num_tokens"])["num_tokens"]
        .to_numpy()
        .astype(np.int32)
        for part in run.partitions()
    ]


def subset_members(
    settings: Settings, lengths: Sequence[Lengths], subset: int
) -> list[npt.NDArray[np.bool_]]:
    """Of each partition, which rows are in a subset.

    Args:
        settings: of the run.
        lengths: of all partitions; rows of length 0 are in no subset.
        subset: its number.

    Raises:
        InputError: there are too few training examples for one to be in and one out.
    """
    pool = np.flatnonzero(np.concatenate([each > 0 for each in lengths] or [np.zeros(0, bool)]))
    size = round(settings.attribution.share * len(pool))
    if not 0 < size < len(pool):
        raise InputError(
            f"{settings.attribution.share:g} of {len(pool)} training examples is no subset",
            fix="add training examples, or set attribution.share to 0.5",
        )
    draws = random_seed(settings.seed, "attribution subset", settings.attribution.seed, subset)
    chosen = np.zeros(sum(map(len, lengths)), dtype=np.bool_)
    chosen[pool[random_permutation(len(pool), draws)[:size]]] = True
    return np.split(chosen, np.cumsum([len(each) for each in lengths])[:-1])


def train_subset(payload: dict[str, Any]) -> dict[str, Any]:
    """Train one model on one subset, from where an earlier attempt stopped, and measure it.

    One that diverges is a result, not a failure: its losses are null.
    """
    started = time.monotonic()
    shop = open_workshop(payload)
    subset, model = int(payload["subset"]), int(payload["model"])
    output = losses_output(shop.run, subset, model)
    mark = str(payload["fingerprint"])
    diverged: str | None = None
    steps = 0
    try:
        files, steps = _trained(shop, subset, model, mark, output)
    except DivergedError as error:
        diverged = error.what
        table = _queries(shop).with_columns(loss=pl.lit(None, pl.Float64))
    else:
        table = _measured(shop, files)
    seconds = round(time.monotonic() - started, 3)
    output.write(lambda path: write_table(table, path), mark, rows=table.height, steps=steps,
                 seconds=seconds, diverged=diverged)  # fmt: skip
    remove_folder(_checkpoints(output))
    return {"steps": steps, "seconds": seconds}


def _trained(
    shop: Workshop, subset: int, model: int, mark: str, output: Output
) -> tuple[Files, int]:
    """Train to the end; where the checkpoint lies, and the steps."""
    settings = shop.settings
    draws = random_seed(settings.seed, "attribution", settings.attribution.seed, subset, model)
    whole = pool_lengths(shop.run)
    members = subset_members(settings, whole, subset)
    lengths = [np.where(own, each, 0) for own, each in zip(members, whole, strict=True)]
    how = training(settings)
    schedule = plan_epochs(
        lengths, seed=draws, batch_tokens=how.batch_tokens, epochs=how.epochs,
        save_every_epochs=how.epochs, max_steps=how.max_steps,
    )  # fmt: skip
    root = _checkpoints(output)
    begin(root / f"seed-{model}", mark)
    optimiser = open_optimiser(shop, draws, schedule.total_steps)
    files = Files(
        root=root,
        seed=model,
        fingerprint=mark,
        write_model=lambda target: write_model(optimiser.model, shop.tokenizer, target),
    )
    data = Data(
        lengths=lengths,
        encoded=lambda parts: encode_parts(shop, parts),
        held_out=None,
        write_log=lambda epoch, part, values: None,
    )
    train(optimiser, shop.task, data, schedule, files)
    return files, schedule.total_steps


def _measured(shop: Workshop, files: Files) -> pl.DataFrame:
    """The queries with their losses, nats: the mean of an example's counted positions."""
    settings = shop.settings
    last = list_checkpoints(files.root)[-1]
    loaded = load_model(settings.model, task_settings(settings), checkpoint=last.path)
    loaded.model.eval()
    target, folder = target_settings(settings), target_folder(shop.run)
    queries = _queries(shop)
    frames: list[pl.DataFrame] = []
    for part in folder.partitions():
        own = queries.filter(pl.col("partition") == part.name)
        if not own.height:
            continue
        encoded = shop.task.encode(example_fields(target, folder, part))
        chosen = np.zeros(len(encoded), dtype=np.bool_)
        chosen[own["position"].to_numpy()] = True
        encoded.num_scored[~chosen] = 0
        with torch.no_grad():
            found, _ = measure(
                loaded.model,
                shop.task,
                encoded,
                batch_tokens=batch_tokens(settings.score, loaded.device.type),
                device=loaded.device,
            )
        losses = found["loss"].double().numpy()[own["position"].to_numpy()]
        values = [value if math.isfinite(value) else None for value in losses.tolist()]
        frames.append(own.with_columns(loss=pl.Series(values, dtype=pl.Float64)))
    return pl.concat(frames)


def _queries(shop: Workshop) -> pl.DataFrame:
    """partition, position, key of each."""
    return read_table(queries_output(shop.run).path)


def _checkpoints(output: Output) -> Path:
    return output.path.parent / "checkpoints"


def lengths_payload(common: dict[str, Any], part: Partition, mark: str) -> dict[str, Any]:
    """Of `subset_lengths_work`."""
    return common | {"partition": asdict(part), "fingerprint": mark}
