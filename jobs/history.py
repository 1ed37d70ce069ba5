"""What a training run showed of each example, epoch by epoch, for the scorers of the log kind.

Shapes: N examples of a partition, E times that the examples were shown.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from curate.data.files import digest_file, fingerprint
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.data.tables import meet, read_table
from curate.errors import InputError

_SOURCES = {"loss_by_epoch": "loss", "correct_by_epoch": "correct", "margin_by_epoch": "margin"}


def log_tables(run: RunFolder, part: Partition, seed: int) -> list[Path]:
    """The training log of a partition, a table for each epoch of the run with this seed."""
    folder = run.checkpoints / f"seed-{seed}" / "log"
    return [path / f"{part.name}.parquet" for path in sorted(folder.glob("epoch-*"))]


def log_digest(run: RunFolder, part: Partition, seed: int) -> str | None:
    """Digest of a partition's log; None where the run has not been trained to its end.

    Raises:
        InputError: a table of the log is missing.
    """
    if Output(run.checkpoints / f"seed-{seed}" / "done.json").mark() is None:
        return None
    paths = log_tables(run, part, seed)
    for path in paths:
        if not path.exists():
            raise InputError(
                f"{path}: the training log lacks this table",
                fix=f"remove {path.parent.parent.parent} and run `curate train {run.root}` again",
            )
    return fingerprint(log=[digest_file(path) for path in paths])


def read_log(
    run: RunFolder, part: Partition, keys: pl.DataFrame, seed: int
) -> dict[str, np.ndarray]:
    """(E, N) of each log quantity, NaN where an example was not trained on in an epoch.

    What the training forward showed, just before the update: `online` recording.

    Args:
        run: whose checkpoints were trained in it.
        part: one partition.
        keys: its examples, for the check that the tables meet.
        seed: of the training run.
    """
    frames = [read_table(path) for path in log_tables(run, part, seed)]
    for frame in frames:
        meet(keys, frame)
    return stacked(frames, keys.height)


def stacked(frames: Sequence[pl.DataFrame], num_examples: int) -> dict[str, np.ndarray]:
    """(E, N) float64 of each log quantity, from one table of an epoch or a checkpoint each."""
    return {
        name: np.stack(
            [frame[column].cast(pl.Float64).fill_null(np.nan).to_numpy() for frame in frames]
            or [np.full(num_examples, np.nan)]
        )
        for name, column in _SOURCES.items()
    }
