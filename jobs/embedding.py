"""`curate embed`: a vector of every example, for each representation of the settings.

run/target/                        the target, indexed like a run of its own
run/vectors/<name>/part-….npy      (N, d) vectors of a partition, NaN where there is none
run/vectors/<name>/part-….parquet  key, and how much was read, of each of its rows
run/target/vectors/<name>/…        the same of the target
"""

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from curate.config import plain
from curate.data.files import fingerprint
from curate.data.layout import RunFolder
from curate.data.manifest import record_stage
from curate.data.partitions import Partition, remove_strays
from curate.errors import InputError
from curate.vectors.settings import Embed
from jobs.cluster import Pool
from jobs.embedding_work import embed_work
from jobs.lengths import content_of, content_settings
from jobs.representations import missing_vectors, names_wanted, representations, wants_target
from jobs.run import Listener, StageState, Task, ignore, raise_failures, require, run_tasks
from jobs.settings import Settings, task_settings
from jobs.target import target_folder, target_output, target_settings, target_task, target_work

log = logging.getLogger(__name__)

VERSION = 1
"""Raised when the same data and settings would give other vectors."""


def embed_run(settings: Settings, *, pool: Pool, listener: Listener = ignore) -> dict[str, Any]:
    """Index the target and make the vectors of all examples and target examples.

    Returns:
        `representations`: name -> `kind`, `dim`, `rows`, `without` (a vector), `cut`; `target`
        (rows, None where there is none); how many partitions were `done` now or `skipped`.

    Raises:
        InputError: the index, the target, a model or a column is missing.
        ConfigError: a representation does not fit the examples.
        CurateError: partitions failed; the others are finished first.
    """
    started = time.monotonic()
    run = RunFolder(Path(settings.run))
    require(run.partitions(), stage="the index", command=f"curate index {run.root}")
    rows, target = None, list[Task]()
    if wants_target(settings):
        target = [target_task(settings)]
        raise_failures("target", run_tasks("target", target, target_work, pool=pool))
        rows = (target_output(run).mark() or {}).get("rows")
    tasks = {name: embed_tasks(settings, name) for name in names_wanted(settings)}
    every = [task for found in tasks.values() for task in found]
    outputs = [task.output for task in (*target, *every)]
    outcome = run_tasks("embed", every, embed_work, pool=pool, listener=listener)
    _remove_strays(run)
    summary: dict[str, Any] = {
        "representations": {
            name: _summary(representations(settings)[name], found) for name, found in tasks.items()
        },
        "target": rows,
        "done": len(outcome.done),
        "skipped": len(outcome.skipped),
        "seconds": round(time.monotonic() - started, 3),
    }
    facts = {"representations": summary["representations"], "target": rows}
    record_stage(
        run, "embed", outputs=outputs, seconds=summary["seconds"], facts={"summary": facts}
    )
    raise_failures("embed", outcome)
    for name in tasks:
        _check_widths(run, settings, name)
    for name, entry in summary["representations"].items():
        if entry["without"]:
            log.warning("%s: %d of %d examples have no vector: nothing to read, or numbers that"
                        " are not finite", name, entry["without"], entry["rows"])  # fmt: skip
    return summary


def plan_embed(settings: Settings) -> StageState:
    """What `embed_run` would do; writes nothing."""
    run = RunFolder(Path(settings.run))
    parts = run.partitions()
    if not parts:
        return StageState("embed", 0, 0, ("the index has not been made yet",))
    names = names_wanted(settings)
    try:
        waits = wants_target(settings) and not target_task(settings).is_done()
        tasks = [
            task
            for name in names
            for task in embed_tasks(settings, name, is_target_known=not waits)
        ]
    except InputError as error:
        return StageState("embed", len(parts) * len(names), 0, (error.what,))
    due = [task for task in tasks if not task.is_done()]
    new = sum(task.output.mark() is None for task in due)
    counts = {
        "partitions have no vectors yet": new,
        "partitions have changed data or settings": len(due) - new,
        "target is to be indexed and embedded": int(waits),
    }
    why = tuple(f"{count} {what}" for what, count in counts.items() if count)
    total = len(tasks) + int(waits)
    return StageState("embed", total, len(tasks) - len(due), why)


def vectors_digest(settings: Settings, name: str, run: RunFolder) -> str:
    """Of everything that the vectors of a run, or of the target's folder, depend on.

    Args:
        settings: of the run.
        name: of the representation.
        run: the run folder, or `target_folder` of it.

    Raises:
        InputError: the index, of the target too, has not been made, or the model is missing.
    """
    if not run.partitions():
        raise missing_vectors(run, name)
    is_target = run.root == RunFolder(Path(settings.run)).target
    own = target_settings(settings) if is_target else settings
    common = _facts(settings, name)
    return fingerprint(vectors=[_stamp(own, run, part, name, common) for part in run.partitions()])


def embed_tasks(settings: Settings, name: str, *, is_target_known: bool = True) -> list[Task]:
    """One task for each partition, of the target too.

    Args:
        settings: of the run.
        name: of the representation.
        is_target_known: whether the target has been indexed as it is now.
    """
    run = RunFolder(Path(settings.run))
    common = _facts(settings, name)
    worlds = [(settings, run, "")]
    if wants_target(settings) and is_target_known:
        worlds.append((target_settings(settings), target_folder(run), "target: "))
    found: list[Task] = []
    for own, folder, label in worlds:
        values = plain(own)
        for part in folder.partitions():
            stamp = _stamp(own, folder, part, name, common)
            payload = {
                "settings": values,
                "embed": plain(representations(settings)[name]),
                "partition": asdict(part),
                "name": name,
                "digest": common,
                "fingerprint": stamp,
            }
            found.append(
                Task(f"{name}, {label}{part.name}", payload, folder.vectors(part, name), stamp)
            )
    return found


def _facts(settings: Settings, name: str) -> str:
    """Of representation and software: what is the same for all partitions."""
    embed = representations(settings)[name]
    more: dict[str, Any] = {"threads": settings.cluster.threads}
    if embed.kind == "model":
        from curate.models.load import pick_device
        from jobs.embedding_work import encoder_digest

        more |= {
            "model": encoder_digest(settings, embed),
            "dtype": settings.model.dtype,
            "device": pick_device(settings.model.device).type,
        }
    if settings.task and embed.kind in ("model", "values"):
        more["task"] = plain(task_settings(settings))
    own = {key: value for key, value in plain(embed).items() if key not in ("model", "revision")}
    return fingerprint(stage="vectors", version=VERSION, embed=own, **more)


def _stamp(own: Settings, run: RunFolder, part: Partition, name: str, common: str) -> str:
    source = own.sources[part.source]
    # The content's digest knows nothing of a column of vectors.
    column = part.stamp if own.embed and own.embed[name].kind == "column" else None
    return fingerprint(
        common=common,
        source=content_settings(source),
        examples=content_of(run, part),
        column=column,
    )


def _summary(embed: Embed, tasks: list[Task]) -> dict[str, Any]:
    marks = [mark for task in tasks if (mark := task.output.mark())]
    return {
        "kind": embed.kind,
        "dim": marks[0]["dim"] if marks else None,
        **{key: sum(mark[key] for mark in marks) for key in ("rows", "without", "cut")},
    }


def _check_widths(run: RunFolder, settings: Settings, name: str) -> None:
    """Refuse vectors that cannot be compared: their files have different widths.

    Raises:
        InputError: names two files.
    """
    folders = [(run, "")]
    if wants_target(settings):
        folders.append((target_folder(run), "target: "))
    widths = dict[int, str]()
    for folder, label in folders:
        for part in folder.partitions():
            dim = (folder.vectors(part, name).mark() or {}).get("dim")
            widths.setdefault(int(dim or 0), f"{label}{part.source}/{part.file}")
    if len(widths) > 1:
        said = " and ".join(f"{dim} numbers in {where}" for dim, where in list(widths.items())[:2])
        raise InputError(
            f"embed.{name}: vectors have {said}", fix="give all files vectors of one width"
        )


def _remove_strays(run: RunFolder) -> None:
    for folder in (run, target_folder(run)):
        names = {part.name for part in folder.partitions()}
        for place in (folder.root / "vectors").glob("*"):
            remove_strays(place, names)
