"""What a worker does for `self_influence`: values of a partition, the lengths' line, the table."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from curate.config import parse
from curate.data.example import KEY, TRAIN
from curate.data.files import read_json
from curate.data.layout import RunFolder
from curate.data.partitions import Partition, remove_strays
from curate.data.tables import meet, read_examples, read_table, write_table
from curate.errors import InputError
from curate.models.gradients.groups import Squared
from curate.models.quantities import measure
from curate.models.tasks import Encoded
from jobs.ekfac_work import Shop, load_curvature
from jobs.fields import example_fields
from jobs.measuring import as_columns, batch_tokens, counts_of, measurer_of, ready, tokens_of
from jobs.run import Receipt
from jobs.self_influence import line_output, slug_of
from jobs.settings import parse_settings
from jobs.target import write_facts
from scorers.self_influence import Line, Moments, SelfInfluence, fitted

log = logging.getLogger(__name__)


def raw_work(payload: dict[str, Any]) -> Receipt:
    """Value, mean loss and counted positions of one partition with one checkpoint."""
    settings = parse_settings(payload["settings"])
    run, part = RunFolder(Path(settings.run)), Partition(**payload["partition"])
    keys = read_examples(run, part, KEY)
    measured = _fisher if parse(SelfInfluence, payload["scorer"]).metric == "ekfac" else _squares
    encoded, columns, more = measured(payload, run, part)
    table = keys.hstack(as_columns(columns))
    facts = {**counts_of(encoded, table), **more}
    run.quantities(part, payload["raw"]).write(
        lambda path: write_table(table, path), payload["fingerprint"], rows=table.height, **facts
    )
    return {"rows": table.height, **tokens_of(encoded), **facts}


def line_work(payload: dict[str, Any]) -> Receipt:
    """The least-squares line over the training rows of the whole pool."""
    settings = parse_settings(payload["settings"])
    run = RunFolder(Path(settings.run))
    moments = Moments()
    for part in run.partitions():
        split = read_examples(run, part, [*KEY, "split"])
        frame = _values(run, part, payload)
        meet(split, frame)
        frame = frame.filter(split["split"] == TRAIN)
        moments = moments.plus(frame["value"].to_numpy(), frame["num_positions"].to_numpy())
    line = fitted(moments)
    facts = {"examples": moments.num, **line._asdict()}
    line_output(run, payload["seed"]).write(
        lambda path: write_facts(path, {"schema_version": 1, **facts}),
        payload["fingerprint"],
        **facts,
    )
    names = {part.name for part in run.partitions()}
    for slug in payload["raw"]:
        remove_strays(run.root / "quantities" / slug, names)
    log.info("self_influence grows with length to the power %.2f", line.slope)
    return facts


def table_work(payload: dict[str, Any]) -> Receipt:
    """The table of one partition that the columns are made of."""
    settings = parse_settings(payload["settings"])
    run, part = RunFolder(Path(settings.run)), Partition(**payload["partition"])
    output = line_output(run, payload["seed"])
    saved = read_json(output.path)
    if saved is None:
        raise InputError(f"{output.path} is missing", fix="run the same command again")
    line = Line(saved["intercept"], saved["slope"])
    frame = _values(run, part, payload)
    values, lengths = frame["value"].to_numpy(), frame["num_positions"].to_numpy()
    residuals = line.residuals(values, np.nan_to_num(lengths, nan=1.0))
    table = frame.with_columns(pl.Series("residual", residuals)).select(
        *KEY, "value", "residual", "mean_loss", *(c for c in ("num_scored",) if c in frame.columns)
    )
    table = table.with_columns(pl.exclude(*KEY).cast(pl.Float32).fill_nan(None))
    run.quantities(part, slug_of(payload["seed"])).write(
        lambda path: write_table(table, path), payload["fingerprint"], rows=table.height
    )
    return {"rows": table.height}


Measured = tuple[Encoded, dict[str, torch.Tensor], dict[str, int]]


def _squares(payload: dict[str, Any], run: RunFolder, part: Partition) -> Measured:
    """Squared gradient lengths of the summed losses."""
    settings = parse_settings(payload["settings"])
    options = parse(SelfInfluence, payload["scorer"])
    task, loaded = ready(settings, measurer_of(payload["measurer"]))
    encoded = task.encode(example_fields(settings, run, part))
    name = Squared(options.parameters).name
    found, passed = measure(
        loaded.model,
        task,
        encoded,
        batch_tokens=batch_tokens(settings.score, loaded.device.type),
        device=loaded.device,
        wanted={name, "num_positions"},
    )
    columns = {
        "value": found[name],
        "loss": found["loss"],
        "num_positions": found["num_positions"],
        "num_scored": found["num_scored"],
    }
    return encoded, columns, {"halved": passed.halved} if passed.halved else {}


def _fisher(payload: dict[str, Any], run: RunFolder, part: Partition) -> Measured:
    """g^T H^-1 g, group of layers by group of layers."""
    encoded: Encoded | None = None
    scored = np.empty(0, dtype=np.int64)
    total = losses = counts = torch.empty(0)
    halved = 0
    for group in range(parse(SelfInfluence, payload["scorer"]).groups):
        shop = Shop(payload, group=group)
        if encoded is None:
            encoded = shop.task.encode(example_fields(shop.settings, run, part))
            scored = np.flatnonzero(encoded.num_scored > 0)
            total = torch.zeros(len(scored), dtype=torch.float64)
        curvatures = load_curvature(Path(payload["folder"]), group)
        total = total + shop.engine.self_influence(encoded, scored, curvatures)
        losses, counts = shop.engine.seen
        halved += shop.engine.halved
    assert encoded is not None
    place = torch.from_numpy(scored)

    def spread(values: torch.Tensor) -> torch.Tensor:
        found = torch.full((len(encoded),), torch.nan, dtype=torch.float32)
        found[place] = values.float()
        return found

    columns = {
        "value": spread(total),
        "loss": spread(losses / counts),
        "num_positions": spread(counts),
        "num_scored": spread(torch.from_numpy(encoded.num_scored[scored])),
    }
    return encoded, columns, {"halved": halved} if halved else {}


def _values(run: RunFolder, part: Partition, payload: dict[str, Any]) -> pl.DataFrame:
    """Key, value over all checkpoints of a seed, mean loss, counted positions; NaN for null."""
    options = parse(SelfInfluence, payload["scorer"])
    rates: Sequence[float] = payload["rates"]
    frames = [read_table(run.quantities(part, slug).path) for slug in payload["raw"]]
    for frame in frames[1:]:
        meet(frames[0], frame)
    lengths = _numbers(frames[0], "num_positions")
    total = np.zeros(len(lengths))
    for rate, frame in zip(rates, frames, strict=True):
        total += rate * _numbers(frame, "value")
    if options.metric == "identity" and options.reduction == "mean":
        total = total / np.square(lengths)
    loss = np.mean([_numbers(frame, "loss") for frame in frames], axis=0)
    found = frames[0].select(*KEY, "num_scored")
    return found.with_columns(
        pl.Series("value", total),
        pl.Series("mean_loss", loss),
        pl.Series("num_positions", lengths),
    )


def _numbers(frame: pl.DataFrame, name: str) -> np.ndarray:
    return frame[name].cast(pl.Float64).fill_null(float("nan")).to_numpy()
