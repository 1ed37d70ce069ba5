"""Doubts about the scoring models are said where they were trained."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from curate.data.files import write_json
from curate.data.layout import RunFolder
from jobs.train_notes import comparison_notes, kept_training_notes, training_notes


def curve(run: RunFolder, seed: str, held_out: list[float | None]) -> None:
    path = run.checkpoints / seed / "curve.parquet"
    path.parent.mkdir(parents=True)
    pl.DataFrame({"held_out_loss": held_out}, schema={"held_out_loss": pl.Float64}).write_parquet(
        path
    )


@pytest.mark.parametrize(
    ("step", "held_out", "told"),
    [
        (100, [None, 5.0, None, 4.0], []),
        (99, [5.0, 4.0], ["seed-0: trained for 99 steps only"]),
        (1, [5.0], ["seed-0: trained for 1 step only"]),
        (500, [4.0, 3.0, 4.0], ["seed-0: the held-out loss did not fall, 4.000 at its first"]),
        (500, [4.0, None], []),
        (500, [None, None], []),
        (7, [4.0, 4.5], ["seed-0: trained for 7 steps", "seed-0: the held-out loss did not fall"]),
    ],
)
def test_few_steps_and_a_loss_that_did_not_fall_are_noted(
    tmp_path: Path, step: int, held_out: list[float | None], told: list[str]
):
    run = RunFolder(tmp_path)
    curve(run, "seed-0", held_out)
    notes = training_notes(run, {"seed-0": {"step": step}})
    assert len(notes) == len(told)
    assert all(note.startswith(start) for note, start in zip(notes, told, strict=True))


def test_seeds_with_too_few_steps_share_a_note(tmp_path: Path):
    marks: dict[str, Any] = {"seed-0": {"step": 3}, "seed-1": {"step": 4}, "seed-2": {"step": 200}}
    (note,) = training_notes(RunFolder(tmp_path), marks)
    assert note.startswith("seed-0, seed-1: trained for 3 steps only")


def test_the_notes_are_found_again_in_the_run_folder_in_order_of_seed(tmp_path: Path):
    run = RunFolder(tmp_path)
    assert kept_training_notes(run) == []
    for seed, step in ((10, 6), (2, 7), (3, 500)):
        write_json(run.checkpoints / f"seed-{seed}" / "done.json", {"step": step})
    (run.checkpoints / "seed-4").mkdir()  # still being trained
    (note,) = kept_training_notes(run)
    assert note.startswith("seed-2, seed-10: trained for 6 steps only")


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        ({"plan": 100.0, "random": 100.0}, None),
        ({"plan": 6.0, "random": 7.0}, "every arm: trained for 6 steps only; below about 100"),
        ({"plan": 99.0, "random": 400.0}, "plan: trained for 99 steps only"),
        ({"plan": None, "random": 5.0}, "random: trained for 5 steps only"),
        ({}, None),
    ],
)
def test_arms_of_a_comparison_with_few_steps_are_noted(
    steps: dict[str, float | None], told: str | None
):
    notes = comparison_notes(steps)
    assert len(notes) == (told is not None)
    assert all(note.startswith(told or "") for note in notes)
