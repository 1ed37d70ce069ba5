"""The target of the scorer `influence`: indexed, its sub-tasks named, its gradients projected.

run/influence/target.json               says that the target is indexed; its sub-tasks
run/influence/<checkpoint>/target.json  says that its gradients are there, run/target/influence/...

Shapes: m target examples, G sub-tasks.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from curate.config import parse, plain
from curate.data.example import KEY
from curate.data.files import fingerprint
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.data.reading import read_rows
from curate.data.tables import read_examples
from curate.errors import InputError, counted
from jobs.fields import reference_facts
from jobs.influence_build import (
    build_tasks,
    build_work,
    rows_output,
    target_world,
    vectors_output,
)
from jobs.influence_rows import Known, column, known_rows
from jobs.influence_sides import FOLDER, IndexOptions, common_facts, sides_stamps
from jobs.measurers import Measurer
from jobs.measuring import measurer_of
from jobs.references import references_run
from jobs.run import Receipt, Task
from jobs.settings import Settings, parse_settings
from jobs.target import (
    INLINE,
    index_target,
    target_folder,
    target_settings,
    target_stamp,
    write_facts,
)

log = logging.getLogger(__name__)


class Groups(NamedTuple):
    """Which sub-task each target example belongs to."""

    names: list[str]
    """(G,) in the order of the alphabet."""
    of_rows: npt.NDArray[np.int64]
    """(m,)"""
    keys: pl.DataFrame
    """(m,) source, file, row."""


def indexed_output(run: RunFolder) -> Output:
    """Says that the target is indexed."""
    return Output(run.root / FOLDER / "target.json")


def gradients_output(run: RunFolder, slug: str) -> Output:
    """Says that a checkpoint's gradients of the target are there."""
    return Output(run.root / FOLDER / slug / "target.json")


def index_task(settings: Settings, tasks: str | None) -> Task:
    """Index the target.

    Args:
        settings: of the run.
        tasks: column that names sub-tasks, if not the domain.
    """
    stamp = indexed_stamp(settings, tasks)
    payload = {"settings": plain(settings), "tasks": tasks, "fingerprint": stamp}
    return Task("the target", payload, indexed_output(RunFolder(Path(settings.run))), stamp)


def indexed_stamp(settings: Settings, tasks: str | None) -> str:
    """Of everything that target and sub-tasks depend on."""
    return fingerprint(
        stage="influence target",
        index=target_stamp(settings),
        tasks=tasks,
        **reference_facts(settings),
    )


def index_work(payload: dict[str, Any]) -> Receipt:
    """Index the target, and ask the reference model where there is one."""
    settings = parse_settings(payload["settings"])
    own = target_settings(settings)
    index_target(own)
    _check_widths(settings)
    references_run(own, pool=INLINE)
    groups = read_groups(settings, payload["tasks"])
    facts = {"rows": len(groups.of_rows), "tasks": len(groups.names)}
    indexed_output(RunFolder(Path(settings.run))).write(
        lambda path: write_facts(path, facts), payload["fingerprint"], **facts
    )
    return facts


def _check_widths(settings: Settings) -> None:
    """Refuse rows of numbers that are of another length than the pool's.

    Raises:
        InputError: they are.
    """
    run = RunFolder(Path(settings.run))
    own, other = _width(target_folder(run)), _width(run)
    if own != other and None not in (own, other):
        raise InputError(
            f"target: its rows have {own} features, those of the pool have {other}",
            fix="make target.features the same numbers as those of the sources",
        )


def _width(folder: RunFolder) -> int | None:
    """Features of a row, as the index has counted them; None where there are none."""
    marks = (folder.examples(part).mark() or {} for part in folder.partitions())
    return next((mark["num_features"] for mark in marks if mark.get("num_features")), None)


def read_groups(settings: Settings, tasks: str | None) -> Groups:
    """Sub-tasks of the target, which must have been indexed.

    Args:
        settings: of the run.
        tasks: column of the target's files; None for the domain.

    Raises:
        InputError: there is no such column, or a row of it has no name; the target has no rows.
    """
    folder = target_folder(RunFolder(Path(settings.run)))
    keys: list[pl.DataFrame] = []
    names: list[str] = []
    for part in folder.partitions():
        examples = read_examples(folder, part, [*KEY, "domain"])
        keys.append(examples.select(KEY))
        names += examples["domain"].to_list() if tasks is None else _named(
            folder, part, examples, tasks
        )  # fmt: skip
    if not names:
        raise InputError("the target has no rows", fix="check target.path")
    known = sorted(set(names))
    places = {name: place for place, name in enumerate(known)}
    of_rows = np.array([places[name] for name in names], dtype=np.int64)
    return Groups(known, of_rows, pl.concat(keys))


def _named(folder: RunFolder, part: Partition, examples: pl.DataFrame, column: str) -> list[str]:
    rows = examples["row"].to_numpy()
    values = read_rows(folder, part, [column], rows)[column].to_pylist()
    if None in values:
        source, file, row = examples.select(KEY).row(values.index(None))
        raise InputError(
            f"{source}/{file}:{row} has nothing in the column {column!r}, which names its sub-task",
            fix="fill the column, or leave influence.tasks out",
        )
    return [str(value) for value in values]


def gradients_tasks(
    settings: Settings, chosen: Sequence[Measurer], options: IndexOptions, tasks: str | None
) -> list[Task]:
    """The target's part of the index: one task for each checkpoint.

    Args:
        settings: of the run.
        chosen: checkpoints.
        options: of the target's index.
        tasks: as `index_task` has it.
    """
    run = RunFolder(Path(settings.run))
    common = common_facts(settings, chosen, options)
    axes = sides_stamps(settings, chosen, options)
    found: list[Task] = []
    for measurer in chosen:
        stamp = fingerprint(
            stage="influence of the target",
            target=indexed_stamp(settings, tasks),
            index=common,
            axes=axes.get(measurer.name),
            model=measurer.digest,
        )
        payload = {
            "settings": plain(settings),
            "index": plain(options),
            "tasks": tasks,
            "measurer": {**asdict(measurer), "folder": str(measurer.folder)},
            "fingerprint": stamp,
        }
        output = _broken(run, measurer.slug) or gradients_output(run, measurer.slug)
        found.append(Task(f"{measurer.name}, the target", payload, output, stamp))
    return found


def _broken(run: RunFolder, slug: str) -> Output | None:
    """A file of the target's index that is no longer as it was written."""
    folder = target_folder(run)
    for part in folder.partitions():
        for output in (vectors_output(folder, part, slug), rows_output(folder, part, slug)):
            mark = output.mark()
            if mark is None or not output.is_done(mark["fingerprint"]):
                return output
    return None


def gradients_work(payload: dict[str, Any]) -> Receipt:
    """Project the gradients of all target examples with one checkpoint."""
    settings = parse_settings(payload["settings"])
    measurer = measurer_of(payload["measurer"])
    facts = ensure_gradients(settings, measurer, parse(IndexOptions, payload["index"]))
    _check_gradients(read_groups(settings, payload["tasks"]), settings, measurer)
    output = gradients_output(RunFolder(Path(settings.run)), measurer.slug)
    output.write(lambda path: write_facts(path, facts), payload["fingerprint"], **facts)
    return facts


def _check_gradients(groups: Groups, settings: Settings, measurer: Measurer) -> None:
    """Refuse a sub-task none of whose examples has a gradient, before the pool is passed over.

    Raises:
        InputError: there is one.
    """
    known = [found for _, found in target_parts(settings, measurer.slug)]
    usable = np.concatenate([found.usable for found in known])
    held = np.bincount(groups.of_rows[usable], minlength=len(groups.names))
    if held.all():
        return
    place = int(held.argmin())
    positions = np.concatenate([column(one.opened.table, "num_scored") for one in known])
    own = groups.of_rows == place
    what = f"no target example of {groups.names[place]!r} has a gradient"
    if not (positions[own] > 0).any():
        raise InputError(
            f"{what}: nothing in them counts for the loss",
            fix="look at the reasons for which the target's examples were set aside",
        )
    raise InputError(
        f"{what} that is finite, with {measurer.name}",
        fix="look for weights of the model that are NaN or infinite, or for such numbers in the"
        " target, or set model.dtype: float32",
    )


def ensure_gradients(
    settings: Settings, measurer: Measurer, options: IndexOptions
) -> dict[str, Any]:
    """Build what is missing or damaged of the target's index; gives counts of all of it."""
    world = target_world(settings)
    found = {"rows": 0, "unscored": 0, "truncated": 0}
    for task in build_tasks(world, [measurer], options):
        if not task.is_done():
            build_work(task.payload)
    for part in world.folder.partitions():
        mark = vectors_output(world.folder, part, measurer.slug).mark() or {}
        for name in found:
            found[name] += int(mark.get(name, 0))
    return found


def target_parts(settings: Settings, slug: str) -> Iterator[tuple[slice, Known]]:
    """The target's index, and which of the m target examples each partition holds."""
    folder = target_folder(RunFolder(Path(settings.run)))
    start = 0
    for part in folder.partitions():
        found = known_rows(folder, part, slug)
        yield slice(start, start + len(found.usable)), found
        start += len(found.usable)


def sayings_of(facts: dict[str, Any]) -> list[str]:
    """What the user should know of the target's gradients."""
    found: list[str] = []
    if facts["truncated"]:
        cut = counted(facts["truncated"], "target example is", "target examples are")
        found.append(f"{cut} longer than the context and cut: their influence is of what is left")
    if facts["unscored"]:
        lost = counted(facts["unscored"], "target example has", "target examples have")
        found.append(f"{lost} no gradient and no part in the influence")
    return found
