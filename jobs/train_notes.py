"""What speaks against scores of the models that were trained: too few steps, nothing learned."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curate.data.files import read_document
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


def kept_training_notes(run: RunFolder) -> list[str]:
    """The same of the models that lie in a run folder, whenever they were trained.

    Raises:
        InputError: what a finished training run says of itself is damaged.
    """
    marks: dict[str, dict[str, Any]] = {}
    for path in sorted(run.checkpoints.glob("seed-*/done.json"), key=_natural):
        mark = read_document(path, step=int)
        if mark is not None:
            marks[path.parent.name] = mark
    return training_notes(run, marks)


def comparison_notes(steps: Mapping[str, float | None]) -> list[str]:
    """A sentence where arms of a comparison were trained too little for a verdict to say much.

    Args:
        steps: arm -> its optimiser steps; None where they are not known.
    """
    known = {arm: number for arm, number in steps.items() if number is not None}
    short = [arm for arm, number in known.items() if number < FEWEST_STEPS]
    if not short:
        return []
    fewest = counted(int(min(known[arm] for arm in short)), "step")
    named = "every arm" if len(short) == len(steps) else ", ".join(short)
    return [
        f"{named}: trained for {fewest} only; below about {FEWEST_STEPS} a model is mostly its"
        " first weights, and a verdict says little of the data (raise compare.steps, or lower"
        " checkpoints.train.batch_tokens)"
    ]


def _natural(path: Path) -> tuple[int, str]:
    """seed-2 before seed-10."""
    number = path.parent.name.partition("-")[2]
    return (int(number) if number.isdigit() else 0, path.parent.name)


def _ends(curve: Path) -> tuple[float | None, float | None]:
    """The first and the last held-out loss of a curve with several; else nothing."""
    if not curve.exists():
        return None, None
    losses: list[float] = (
        read_table(curve, ["held_out_loss"])["held_out_loss"].drop_nulls().to_list()
    )
    return (losses[0], losses[-1]) if len(losses) > 1 else (None, None)
