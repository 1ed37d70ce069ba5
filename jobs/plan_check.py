"""The plan's expressions and the score of a curriculum, checked before anything expensive: a typo
must not cost a training."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from curate.data.layout import RunFolder
from curate.errors import CurateError, InputError
from curate.plan.plan import columns_read
from jobs.plan_tables import score_columns
from jobs.settings import Settings
from jobs.write_curriculum import curriculum_column

if TYPE_CHECKING:
    from jobs.chosen import Chosen


def check_plan(settings: Settings) -> None:
    """Refuse a plan whose drop, score or weights read columns that nothing makes, and a curriculum
    whose score does.

    Raises:
        ConfigError: a column is unknown; names the nearest one.
        InputError: there are no scores, and no scorer is chosen.
    """
    rules = settings.plan
    curriculum = settings.shards.curriculum
    if (rules.drop, rules.score, rules.weights, curriculum) == (None, None, None, None):
        return
    run = RunFolder(Path(settings.run).expanduser())
    with suppress(CurateError):  # what is there may be enough, and asks no scorer for its columns
        _refuse(settings, score_columns(run))
        return
    from jobs.chosen import chosen_scorers

    named = settings.score.named
    read = f"{rules.drop or ''} {rules.score or ''}"
    if rules.weights is not None:
        read += f" {rules.weights.score}"
    if curriculum is not None:
        read += f" {curriculum.score}"
    chosen = chosen_scorers(named) if named else []
    coming = {entry.folder: coming_columns(entry, read) for entry in chosen}
    if settings.task.get("window"):  # the task says what share of a document was scored
        shared = [entry.folder for entry in chosen if entry.kind == "pass"]
        coming |= {folder: (*coming[folder], "scored_share") for folder in shared}
    try:
        there = score_columns(run)
    except InputError:  # a damaged table of a scorer that runs again is made anew
        if not coming:
            raise
        there = {}
    _refuse(settings, {**there, **coming})


def _refuse(settings: Settings, columns: Mapping[str, Sequence[str]]) -> None:
    columns_read(settings.plan, columns)
    if settings.shards.curriculum is not None:
        curriculum_column(settings.shards.curriculum, columns)


def coming_columns(entry: "Chosen", read: str) -> tuple[str, ...]:
    """All columns that a scorer can have, whatever the task and the number of seeds.

    Where only the model knows them all, those that the expressions in `read` name are believed.
    """
    if entry.table is not None:
        return entry.table.measurements()
    assert entry.scorer is not None
    names = tuple(entry.scorer.columns)
    prefix = getattr(entry.scorer, "prefix", None)
    if prefix is not None:
        names = tuple(dict.fromkeys([*names, *re.findall(rf"\b{prefix}\w+", read)]))
    if entry.kind == "plain":
        return names
    return (*names, *(f"{name}_std" for name in names), "num_scored")
