"""`curate score`: measure every example with every checkpoint, then turn quantities into scores.

What costs a model's pass lies in `quantities/<checkpoint>/` and serves every scorer; a scorer that
is added later, and needs the same quantities, costs no second pass.
"""

import logging
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from curate.data.layout import RunFolder
from curate.data.manifest import load_manifest, record_stage
from curate.data.partitions import Output, remove_strays
from curate.errors import InputError
from jobs.chosen import Chosen, chosen_scorers
from jobs.cluster import Pool
from jobs.fields import reference_of
from jobs.lengths import (
    length_tasks,
    lengths_run,
    lengths_work,
    plan_lengths,
    tokenizer_for,
)
from jobs.measurers import measurers
from jobs.measuring import measure_work, measuring_tasks
from jobs.own_passes import CORE_ONLY, OwnPasses, own_passes, run_phases, steps_due, tables_left
from jobs.references import reference_tasks, references_run
from jobs.run import (
    Listener,
    Outcome,
    StageState,
    Task,
    ignore,
    raise_all,
    require,
    run_tasks,
)
from jobs.score_columns import column_tasks, column_work
from jobs.score_estimate import estimate
from jobs.score_summary import counts_of_passes, describe_scores, sayings
from jobs.settings import Settings, task_settings
from jobs.store import at_hand

__all__ = [
    "lengths_run",
    "measure_score",
    "plan_lengths",
    "plan_score",
    "score_run",
    "tokenizer_for",
]

log = logging.getLogger(__name__)


def score_run(
    settings: Settings,
    *,
    pool: Pool,
    listener: Listener = ignore,
    reuse: Sequence[Path] = (),
) -> dict[str, Any]:
    """Score every example; what is measured already is skipped.

    Args:
        settings: of the run.
        pool: where the tasks run.
        listener: told after each task.
        reuse: other run folders; a partition that one of them has measured with the same model,
            settings and content is taken from there.

    Returns:
        `scorers` (per column mean, sd, min, max and how many examples have none), `checkpoints`,
        `rows`, how many passes over a partition were `done`, `skipped` or `reused`, `halved`
        batches, `unscored` and `truncated` examples of the first checkpoint, `seconds`; `says`,
        a sentence from each scorer that has something to say of its passes.

    Raises:
        InputError: the index, a model, a checkpoint or a score table is missing.
        ConfigError: a scorer, an option or the model does not fit.
        CurateError: partitions failed; the others are finished first.
    """
    started = time.monotonic()
    run = RunFolder(Path(settings.run))
    partitions = run.partitions()
    require(partitions, stage="the index", command=f"curate index {run.root}")
    chosen = chosen_scorers(settings.score.named)
    _check_tables(chosen, settings)
    used = measurers(settings) if _needs_pass(chosen, settings) else []
    if _needs_model(chosen):
        references_run(settings, pool=pool, listener=listener)
    passes = measuring_tasks(settings, used) if used else []
    early = [entry for entry in chosen if not _reads_scores(entry)]
    late = [entry for entry in chosen if _reads_scores(entry)]
    own = _own(settings, early)
    reused = _reuse(passes, reuse)
    measured = run_tasks("score", passes, measure_work, pool=pool, listener=listener)
    phases = run_phases(own, pool=pool, listener=listener)
    lengths, counted = "", Outcome()
    if any("num_tokens" in entry.needs for entry in chosen):
        lengths = tokenizer_for(settings)[1]
        counting = length_tasks(settings, lengths)
        counted = run_tasks("lengths", counting, lengths_work, pool=pool, listener=listener)
    stale = _left(passes, measured) | tables_left(run, own, phases)
    columns = column_tasks(settings, early, used, own=own, lengths=lengths, stale=stale)
    scored = run_tasks("columns", columns, column_work, pool=pool, listener=listener)
    if late and not any(o.failures for o in (measured, counted, scored, *phases.values())):
        own |= _own(settings, late)
        last = {entry.folder: own[entry.folder] for entry in late}
        phases |= run_phases(last, pool=pool, listener=listener)
        stale |= tables_left(run, own, phases)
        more = column_tasks(settings, late, used, own=own, lengths=lengths, stale=stale)
        rest = run_tasks("columns", more, column_work, pool=pool, listener=listener)
        columns += more
        scored.done += rest.done
        scored.failures |= rest.failures
    reference = reference_of(settings) if _needs_model(chosen) else None
    slugs = [measurer.slug for measurer in (*used, *([reference] if reference else []))]
    _remove_strays(run, chosen, slugs + _slugs(own))
    summary: dict[str, Any] = {
        "rows": sum((run.examples(part).mark() or {}).get("rows", 0) for part in partitions),
        "scorers": describe_scores(run, chosen, columns),
        "checkpoints": [measurer.name for measurer in used],
        "done": len(measured.done) + sum(len(outcome.done) for outcome in phases.values()),
        "skipped": len(measured.skipped)
        - reused
        + sum(len(outcome.skipped) for outcome in phases.values()),
        "reused": reused,
        **counts_of_passes(run, used, passes),
        **sayings(_tasks(own)),
        "seconds": round(time.monotonic() - started, 3),
    }
    if lengths == "characters":
        summary["tokens"] = "characters, as no tokenizer is set"
    if summary["done"] or scored.done or reused or "score" not in load_manifest(run)["stages"]:
        outputs = [task.output for task in (*passes, *_tasks(own), *columns)]
        facts = {"summary": {k: v for k, v in summary.items() if k not in ("done", "skipped")}}
        facts["checkpoints"] = {measurer.name: measurer.digest for measurer in used}
        record_stage(run, "score", outputs=outputs, seconds=summary["seconds"], facts=facts)
    raise_all({"score": measured, **phases, "lengths": counted, "columns": scored})
    return summary


def plan_score(settings: Settings) -> StageState:
    """What `score_run` would do; writes nothing."""
    run = RunFolder(Path(settings.run))
    partitions = run.partitions()
    chosen = chosen_scorers(settings.score.named)
    if not partitions:
        return StageState("score", 0, 0, ("the index has not been made yet",))
    try:
        used = measurers(settings) if _needs_pass(chosen, settings) else []
        passes = measuring_tasks(settings, used) if used else []
        passes += reference_tasks(settings) if _needs_model(chosen) else []
        own = _own(settings, chosen)
        needs_tokens = any("num_tokens" in entry.needs for entry in chosen)
        lengths = tokenizer_for(settings)[1] if needs_tokens else ""
    except InputError as error:
        return StageState("score", len(partitions), 0, (error.what,))
    due = [task for task in passes if not task.is_done()]
    num_shared, num_new = len(due), sum(task.output.mark() is None for task in due)
    steps = {name: steps_due(name, each) for name, each in own.items()}
    due += [task for tasks, _ in steps.values() for task in tasks]
    passes += _tasks(own)
    columns = column_tasks(settings, chosen, used, own=own, lengths=lengths)
    # Columns whose quantities are due or missing cannot be done, even where an old table stands.
    waiting = {task.output.path.name for task in due}
    pending = [task for task in columns if not task.is_done() or _waits(task, waiting, chosen)]
    expected = len(chosen) * len(partitions)
    total = len(passes) + expected
    done = len(passes) - len(due) + len(columns) - len(pending)
    counts = {
        "passes of a checkpoint over a partition are new": num_new,
        "passes have changed data, model or settings": num_shared - num_new,
        **{what: len(tasks) for tasks, what in steps.values()},
        "score tables are to be computed from what is measured": expected
        - len(columns)
        + len(pending),
    }
    why = tuple(f"{count} {what}" for what, count in counts.items() if count)
    return StageState("score", total, done, why)


def measure_score(settings: Settings) -> dict[str, float]:
    """`seconds` and `size_bytes` of all passes that are due, from a few timed batches."""
    chosen = chosen_scorers(settings.score.named)
    if not _needs_pass(chosen, settings):
        return {"seconds": 0.0, "size_bytes": 0}
    passes = measuring_tasks(settings, measurers(settings))
    return estimate(settings, [task for task in passes if not task.is_done()])


def _needs_model(chosen: Iterable[Chosen]) -> bool:
    """Whether all examples are shown to a model, and to the reference where there is one."""
    return any(entry.needs_model and entry.name not in CORE_ONLY for entry in chosen)


def _needs_pass(chosen: Iterable[Chosen], settings: Settings) -> bool:
    """Whether the checkpoints are shown the examples, for scorers that share the pass."""
    trains = settings.checkpoints.train is not None
    kinds = {entry.kind for entry in chosen if not (entry.wants_log and trains)}
    return not kinds.isdisjoint(("pass", "log"))


def _own(settings: Settings, chosen: Iterable[Chosen]) -> dict[str, OwnPasses]:
    """Scorer -> its own passes."""
    return {
        entry.folder: own_passes(settings, entry.name, entry.scorer)
        for entry in chosen
        if entry.kind == "own" and entry.scorer is not None
    }


def _reads_scores(entry: Chosen) -> bool:
    """Whether its passes read other scores of the run, which must be there first."""
    return bool(getattr(entry.scorer, "reads_scores", False))


def _slugs(own: Mapping[str, OwnPasses]) -> list[str]:
    return [slug for passes in own.values() for slug, _ in passes.tables]


def _tasks(own: Mapping[str, OwnPasses]) -> list[Task]:
    return [task for passes in own.values() for task in passes.tasks]


def _left(passes: Sequence[Task], outcome: Outcome) -> set[Path]:
    """Tables of passes that failed; an older one may still stand there."""
    return {task.output.path for task in passes if outcome.failures and not task.is_done()}


def _waits(task: Task, waiting: set[str], chosen: Iterable[Chosen]) -> bool:
    """Whether a column task needs a pass that is still due."""
    needy = {entry.folder for entry in chosen if entry.kind in ("pass", "own")}
    return task.payload["folder"] in needy and task.output.path.name in waiting


def _check_tables(chosen: Iterable[Chosen], settings: Settings) -> None:
    """Read the heads of external tables and the task before anything is measured."""
    for entry in chosen:
        if entry.table is not None:
            entry.table.key(single_source=len(settings.sources) == 1)
            entry.table.measurements()
        if entry.kind in ("pass", "log"):
            task_settings(settings)


def _reuse(passes: Sequence[Task], runs: Sequence[Path]) -> int:
    """Take finished passes from other runs by their fingerprint; returns how many."""
    runs = [at_hand(root) for root in runs]
    for root in runs:
        if not (root / "manifest.json").is_file():
            raise InputError(f"--reuse {root}: there is no run", fix="name a run folder")
    due = [task for task in passes if not task.is_done()]
    known: dict[str, Output] = {}
    for root in runs if due else ():
        for path in sorted((root / "quantities").glob("*/.done/*.json")):
            output = Output(path.parent.parent / path.name.removesuffix(".json"))
            mark = output.mark()
            if mark is not None and output.is_done(mark["fingerprint"]):
                known[mark["fingerprint"]] = output
    taken = 0
    for task in due:
        found = known.get(task.fingerprint)
        if found is None:
            continue
        mark = found.mark() or {}
        facts = {k: v for k, v in mark.items() if k not in ("fingerprint", "digest", "size_bytes")}
        task.output.write(lambda path, found=found: _link(found.path, path), task.fingerprint,
                          **facts)  # fmt: skip
        taken += 1
    if runs:
        log.info("score: %d passes taken from other runs", taken)
    return taken


def _link(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the disk is another one."""
    try:
        # Safe: no table is ever changed in place, only replaced.
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _remove_strays(run: RunFolder, chosen: Iterable[Chosen], slugs: Iterable[str]) -> None:
    """Tables of partitions that are gone must not be read with the rest."""
    names = {part.name for part in run.partitions()}
    for folder in {entry.folder for entry in chosen}:
        remove_strays(run.root / "scores" / folder, names)
    for slug in set(slugs):
        remove_strays(run.root / "quantities" / slug, names)
