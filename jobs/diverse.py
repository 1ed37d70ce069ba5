"""Orders for the plan's draws `k_centre` and `facility_location`, made before its cuts.

    run/diverse/candidates.safetensors    rows of each group that the draw chooses among, in order
    run/diverse/chosen-….safetensors      of some groups: who was chosen, and in which place
    run/diverse/part-….npy                (N,) place of each row of a partition, or why it has none

Memory: 48 bytes a candidate, and for one group at a time twice its vectors.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from safetensors.numpy import load_file, save_file

from curate.config import plain
from curate.data.example import TRAIN
from curate.data.files import fingerprint
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.plan.batches import Tables
from curate.plan.candidates import Candidates
from curate.plan.groups import NO_CANDIDATE, NOT_REACHED, PLACE, Cells, batch_of
from curate.plan.mixture import Mixture
from curate.plan.plan import find_candidates
from curate.vectors.diverse import Budget, Chosen, farthest_first, most_covering
from curate.vectors.store import Vectors
from jobs.cluster import Pool
from jobs.plan_tables import NO_VECTOR, open_tables, places_output
from jobs.representations import open_vectors, representation
from jobs.run import Listener, Receipt, Task, raise_failures, run_tasks
from jobs.settings import Settings, parse_settings

log = logging.getLogger(__name__)

VERSION = 1
"""Raised when the same vectors and settings would give another order."""

_TASK_ROWS = 20_000
"""Small groups share a task up to so many candidates."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Diverse:
    """What the orders of a run are made from."""

    settings: Settings
    lengths: str
    mixture: Mixture | None
    fingerprint: str

    @property
    def run(self) -> RunFolder:
        return RunFolder(Path(self.settings.run))


def diverse_fingerprint(settings: Settings, made_from: Sequence[object]) -> str:
    """Of everything the orders depend on.

    Args:
        settings: of the run.
        made_from: what the plan is made from besides: tables, mixture, seed.
    """
    rules = settings.plan
    deciding = replace(rules, weights=None, min_effective_share=0.0, force=False)
    return fingerprint(
        stage="diverse",
        version=VERSION,
        plan=plain(deciding),
        threads=settings.cluster.threads,
        made_from=list(made_from),
    )


def vector_digests(settings: Settings) -> dict[str, str]:
    """Partition -> digest of the vectors that the draw looks at.

    Raises:
        InputError: they have not been made.
        ConfigError: there is no such representation.
    """
    run = RunFolder(Path(settings.run))
    name = representation(settings, settings.plan.vectors)
    open_vectors(run, name)
    marks = {part.name: run.vectors(part, name).mark() for part in run.partitions()}
    return {part: mark["digest"] for part, mark in marks.items() if mark}


def is_made(work: Diverse) -> bool:
    """Whether every partition has its places."""
    parts = work.run.partitions()
    return all(places_output(work.run, part).is_done(work.fingerprint) for part in parts)


def diverse_run(work: Diverse, *, pool: Pool, listener: Listener) -> None:
    """Make the orders; what is there already stays.

    Raises:
        CurateError: a group failed; the others are finished first.
    """
    if is_made(work):
        return
    if not _candidates_output(work.run).is_done(work.fingerprint):
        _write_candidates(work)
    tasks = _tasks(work)
    outcome = run_tasks("diversity", tasks, choose_work, pool=pool, listener=listener)
    raise_failures("diversity", outcome)
    _write_places(work, tasks)


def choose_work(payload: dict[str, Any]) -> Receipt:
    """The order of some groups."""
    settings = parse_settings(payload["settings"])
    run = RunFolder(Path(settings.run))
    rules = settings.plan
    vectors = open_vectors(run, representation(settings, rules.vectors))
    found = load_file(_candidates_output(run).path)
    rows: list[Ints] = []
    places: list[Ints] = []
    for group in range(*payload["groups"]):
        mine = slice(int(found["starts"][group]), int(found["starts"][group + 1]))
        need = int(found["needs"][group])
        positions = found["positions"][mine]
        if not len(positions) or not need:
            continue
        budget = Budget.rows(len(positions), need)
        if payload["unit"] == "tokens":
            budget = Budget(found["tokens"][mine], need)
        chosen = _chosen(settings, vectors.take(positions), budget)
        rows.append(positions[chosen.order])
        places.append(np.arange(len(chosen.order)))
    arrays = {
        "rows": np.concatenate([np.zeros(0, np.int64), *rows]),
        "places": np.concatenate([np.zeros(0, np.int64), *places]),
    }
    output = _chosen_output(run, payload["groups"][0])
    output.write(
        lambda path: save_file(arrays, path), payload["fingerprint"], rows=len(arrays["rows"])
    )
    return {"rows": len(arrays["rows"])}


def _chosen(settings: Settings, rows: npt.NDArray[np.float32], budget: Budget) -> Chosen:
    if settings.plan.draw == "k_centre":
        return farthest_first(rows, budget)
    return most_covering(rows, budget, threads=settings.cluster.threads, seed=settings.seed)


def _write_candidates(work: Diverse) -> None:
    """Who takes part, group by group, in order of score."""
    settings, run = work.settings, work.run
    vectors = open_vectors(run, representation(settings, settings.plan.vectors))
    tables = _with_vectors(open_tables(run, work.lengths), vectors)
    candidates = find_candidates(tables, settings.plan, seed=settings.seed, mixture=work.mixture)
    arrays = _gathered(candidates, tables, settings)
    arrays["needs"] = np.array(candidates.needs, np.int64)
    _candidates_output(run).write(
        lambda path: save_file(arrays, path),
        work.fingerprint,
        rows=len(arrays["positions"]),
        unit=candidates.unit,
    )


def _gathered(candidates: Candidates, tables: Tables, settings: Settings) -> dict[str, Ints]:
    """Positions and tokens of all candidates, by group and place in its order of score."""
    cells = Cells(settings.plan.within == "label")
    groups: list[Ints] = []
    positions: list[Ints] = []
    tokens: list[Ints] = []
    keys: list[npt.NDArray[np.uint64]] = []
    ties: list[npt.NDArray[np.uint64]] = []
    start = 0
    for frame in tables.frames(_columns(settings, tables)):
        batch = batch_of(frame, cells, seed=settings.seed)
        block = candidates.of(batch)
        there = block.group >= 0
        training = np.flatnonzero((frame["split"] == TRAIN).to_numpy())
        positions.append(start + training[there])
        groups.append(block.group[there])
        tokens.append(block.tokens[there])
        keys.append(block.key[there])
        ties.append(block.tie[there])
        start += frame.height
    group = np.concatenate(groups)
    order = np.lexsort((np.concatenate(ties), np.concatenate(keys), group))
    starts = np.searchsorted(group[order], np.arange(len(candidates.needs) + 1))
    return {
        "positions": np.concatenate(positions)[order],
        "tokens": np.concatenate(tokens)[order].astype(np.int64),
        "starts": starts.astype(np.int64),
    }


def _columns(settings: Settings, tables: Tables) -> list[str]:
    from curate.plan.plan import columns_read

    return list(columns_read(settings.plan, tables.scorers))


def _with_vectors(tables: Tables, vectors: Vectors) -> Tables:
    """The same tables; the column `PLACE` is 0 where a row has a vector."""
    known: dict[int, pl.Series] = {}

    def frames(columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        others = [name for name in columns if name != PLACE]
        for index, frame in enumerate(tables.frames(others)):
            if index not in known:
                missing = np.isnan(vectors.part(index)).any(axis=1)
                zeros = np.where(missing, np.nan, 0).astype(np.float32)
                known[index] = pl.Series(PLACE, zeros).fill_nan(None)
            yield frame.hstack([known[index]])

    return Tables(tables.scorers, frames, tables.folder)


def _tasks(work: Diverse) -> list[Task]:
    """Runs of groups, each of about as many candidates."""
    run = work.run
    found = load_file(_candidates_output(run).path)
    mark = _candidates_output(run).mark() or {}
    starts = found["starts"].tolist()
    values = plain(work.settings)
    tasks: list[Task] = []
    first, last = 0, len(starts) - 1
    while first < last:
        end = first + 1
        while end < last and starts[end + 1] - starts[first] <= _TASK_ROWS:
            end += 1
        stamp = fingerprint(stage="chosen", orders=work.fingerprint, groups=[first, end])
        payload = {
            "settings": values,
            "groups": [first, end],
            "unit": mark["unit"],
            "fingerprint": stamp,
        }
        name = f"groups {first} to {end - 1}" if end > first + 1 else f"group {first}"
        tasks.append(Task(name, payload, _chosen_output(run, first), stamp))
        first = end
    return tasks


def _write_places(work: Diverse, tasks: Sequence[Task]) -> None:
    """From the orders of groups to the places of each partition's rows."""
    run = work.run
    vectors = open_vectors(run, representation(work.settings, work.settings.plan.vectors))
    candidates = np.sort(load_file(_candidates_output(run).path)["positions"])
    chosen = [load_file(task.output.path) for task in tasks]
    rows = np.concatenate([np.zeros(0, np.int64), *(each["rows"] for each in chosen)])
    places = np.concatenate([np.zeros(0, np.int64), *(each["places"] for each in chosen)])
    order = np.argsort(rows)
    rows, places = rows[order], places[order]
    for index, part in enumerate(run.partitions()):
        first, end = (int(vectors.starts[index + step]) for step in (0, 1))
        own = np.full(end - first, NO_CANDIDATE, np.int32)
        own[_between(candidates, first, end) - first] = NOT_REACHED
        mine = slice(*np.searchsorted(rows, [first, end]).tolist())
        own[rows[mine] - first] = places[mine]
        own[np.isnan(vectors.part(index)).any(axis=1)] = NO_VECTOR
        _write_part(work, part, own)
    _remove_others(run, {task.output.path.name for task in tasks})


def _between(values: Ints, first: int, end: int) -> Ints:
    """Those of some sorted values that lie in [first, end)."""
    return values[slice(*np.searchsorted(values, [first, end]).tolist())]


def _write_part(work: Diverse, part: Partition, places: npt.NDArray[np.int32]) -> None:
    def save(path: Path) -> None:
        with path.open("wb") as file:  # a name without .npy would get one
            np.save(file, places, allow_pickle=False)

    places_output(work.run, part).write(save, work.fingerprint, rows=len(places))


def _remove_others(run: RunFolder, names: set[str]) -> None:
    """Orders of groups that a plan before had."""
    for path in (run.root / "diverse").glob("chosen-*.safetensors"):
        if path.name not in names:
            Output(path).remove()


def _candidates_output(run: RunFolder) -> Output:
    return Output(run.root / "diverse" / "candidates.safetensors")


def _chosen_output(run: RunFolder, first_group: int) -> Output:
    return Output(run.root / "diverse" / f"chosen-{first_group:06d}.safetensors")
