"""Which scores of a run are those of its present settings; the others were left by earlier ones."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from curate.data.layout import RunFolder
from jobs.chosen import Chosen, chosen_scorers
from jobs.influence_work import matrix_output, targets_output
from jobs.lengths import tokenizer_for
from jobs.measurers import measurers
from jobs.measuring import measuring_tasks
from jobs.own_passes import OwnPasses, own_passes
from jobs.run import Task
from jobs.score_columns import column_tasks
from jobs.settings import Settings
from scorers.influence import Influence


@dataclass(frozen=True, slots=True)
class Finished:
    """What the present settings have made."""

    scorers: frozenset[str]
    """Folders under `scores/` whose tables are whole and of these settings."""
    matrices: tuple[Path, ...]
    """The same of folders of `influence` with `matrix`."""

    @classmethod
    def of(cls, settings: Settings) -> "Finished":
        """Compare marks with settings; writes nothing.

        Raises:
            ConfigError: a scorer, an option or the model does not fit.
            InputError: what the scores stand on has not been made yet.
        """
        if not settings.score.scorers:
            return cls(frozenset(), ())
        run = RunFolder(Path(settings.run))
        chosen = chosen_scorers(settings.score.named)
        own = {
            entry.folder: own_passes(settings, entry.name, entry.scorer)
            for entry in chosen
            if entry.kind == "own" and entry.scorer is not None
        }
        matrices = [_matrix(run, entry, own) for entry in chosen if entry.name == "influence"]
        return cls(
            frozenset(_whole_tables(settings, run, chosen, own)),
            tuple(folder for folder in matrices if folder is not None),
        )


def _whole_tables(
    settings: Settings, run: RunFolder, chosen: list[Chosen], own: dict[str, OwnPasses]
) -> list[str]:
    """Scorers whose columns are done, and what these are made of too: the fingerprint of a column
    follows from the quantities that lie there, even where these are old."""
    trains = settings.checkpoints.train is not None
    shared = {
        entry.folder
        for entry in chosen
        if entry.kind == "pass" or (entry.kind == "log" and not (entry.wants_log and trains))
    }
    used = measurers(settings) if shared else []
    before: dict[str, list[Task]] = {name: passes.tasks for name, passes in own.items()}
    before |= dict.fromkeys(shared, measuring_tasks(settings, used) if used else [])
    counts_tokens = any("num_tokens" in entry.needs for entry in chosen)
    lengths = tokenizer_for(settings)[1] if counts_tokens else ""
    columns = column_tasks(settings, chosen, used, own=own, lengths=lengths)
    found: list[str] = []
    for entry in chosen:
        tables = [task for task in columns if task.payload["folder"] == entry.folder]
        tasks = [*tables, *before.get(entry.folder, [])]
        if len(tables) == len(run.partitions()) and all(task.is_done() for task in tasks):
            found.append(entry.folder)
    return found


def _matrix(run: RunFolder, entry: Chosen, own: dict[str, OwnPasses]) -> Path | None:
    """The folder of its matrix, where these settings ask for one and it is whole."""
    options = cast(Influence, entry.scorer)
    if not options.matrix:
        return None
    columns = targets_output(run, options).path
    paths = {columns, *(matrix_output(run, options, part).path for part in run.partitions())}
    tasks = [task for task in own[entry.folder].tasks if task.output.path in paths]
    whole = len(tasks) == len(paths) and all(task.is_done() for task in tasks)
    return columns.parent if whole else None
