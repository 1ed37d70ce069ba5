"""What speaks against scores of the models that were trained: too few steps, nothing learned."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curate.data.layout import RunFolder
from curate.data.tables import read_table
from curate.errors import counted

FEWEST_STEPS = 100
"""Below so many optimiser steps a model's losses are mostly those of its first weights."""


def training_notes(run: RunFolder, marks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One sentence for each kind of doubt.

    Args:
        run: the run folder.
        marks: name of each finished training run (`seed-0`) -> its mark.
    """
    notes: list[str] = []
    short = {name: int(mark["step"]) for name, mark in marks.items()}
    short = {name: steps for name, steps in short.items() if steps < FEWEST_STEPS}
    if short:
        steps = counted(min(short.values()), "step")
        notes.append(
            f"{', '.join(short)}: trained for {steps} only; below about {FEWEST_STEPS} the scores"
            " say little of the data (raise checkpoints.train.epochs or max_steps, or lower"
            " batch_tokens)"
        )
    for name in marks:
        first, last = _ends(run.checkpoints / name / "curve.parquet")
        if first is not None and last is not None and last >= first:
            notes.append(
                f"{name}: the held-out loss did not fall, {first:.3f} at its first checkpoint and"
                f" {last:.3f} at its last (try another checkpoints.train.lr, or more epochs)"
            )
    return notes


def _ends(curve: Path) -> tuple[float | None, float | None]:
    """The first and the last held-out loss of a curve with several; else nothing."""
    if not curve.exists():
        return None, None
    losses: list[float] = (
        read_table(curve, ["held_out_loss"])["held_out_loss"].drop_nulls().to_list()
    )
    return (losses[0], losses[-1]) if len(losses) > 1 else (None, None)
