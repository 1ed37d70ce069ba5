"""Scorers that measure by passes of their own, beside the one that all others share."""

import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from curate.config import resolve
from curate.data.layout import RunFolder
from curate.errors import OutputError, TryAgainError
from jobs.cluster import Pool
from jobs.live import live
from jobs.run import Listener, Outcome, Receipt, Task, begin, run_tasks, telling
from jobs.run_failures import SetAside, forget_failure, keep_failure
from jobs.settings import Settings
from jobs.watching import watching

if TYPE_CHECKING:
    # It imports torch, and phases are read by stages that do without.
    from scorers.protocol import Scorer

OWN: dict[str, str] = {
    "aum_threshold": "jobs.aum_threshold:passes",
    "label_issues": "jobs.label_issues:passes",
    "dvgs": "jobs.dvgs:passes",
    "vog": "jobs.vog:passes",
    "pvi": "jobs.pvi:passes",
    "self_influence": "jobs.self_influence:passes",
    "influence": "jobs.influence:passes",
    "duplicates": "jobs.duplicates:passes",
    "dsir": "jobs.dsir:passes",
    "bm25": "jobs.bm25:passes",
    "density_ratio": "jobs.density_ratio:passes",
    "rds": "jobs.rds:passes",
    "gio": "jobs.gio:passes",
    "spread": "jobs.spread:passes",
    "leakage": "jobs.leakage:passes",
}
"""Scorer -> `module:function` that says its passes: `(settings, scorer) -> OwnPasses`."""

WITHOUT_MODEL = frozenset(
    {"label_issues", "duplicates", "dsir", "bm25", "density_ratio", "gio", "rds", "leakage"}
)
"""Those of them that read texts, vectors, labels or scores, and no scoring model: the rest may need
what a reference model says of all."""
READS_EVALUATION = frozenset({"leakage"})
"""Those of them that look for the evaluation sets."""
READS_LABELS = frozenset({"aum_threshold", "label_issues"})
"""Those of them that judge labels, and are not defined without."""
TRAINS_ON_TARGET = frozenset({"dvgs"})
"""Those of them whose model is trained on the target."""
INDEXES_TARGET = frozenset({"influence"})
"""Those that look at the target with the run's own models."""
CORE_ONLY = frozenset({"spread"})
"""Those that show a model a few examples only, in a run of their own."""


class Phase(NamedTuple):
    """Tasks that may run side by side."""

    name: str
    tasks: list[Task]
    work: Callable[[dict[str, Any]], Receipt]


class DrivenPhase(NamedTuple):
    """Tasks that hand out tasks of their own, such as whole runs: the driver does them, one by
    one, with the pool."""

    name: str
    tasks: list[Task]
    drive: Callable[[dict[str, Any], Pool, Listener], Receipt]
    """Writes the task's output, like `Phase.work`."""


@dataclass(frozen=True, slots=True)
class OwnPasses:
    """What a scorer does before its columns can be computed."""

    phases: tuple[Phase | DrivenPhase, ...]
    """One after the other. Fingerprints follow from settings and index alone, not from outputs of
    earlier phases, so that all are known before anything has run."""
    tables: tuple[tuple[str, int], ...]
    """Folder under `quantities/`, and the seed it belongs to: each holds a table for every
    partition, with what the scorer's `needs` name, null where an example has no value."""

    @property
    def tasks(self) -> list[Task]:
        """Of all phases."""
        return [task for phase in self.phases for task in phase.tasks]


def own_passes(settings: Settings, name: str, scorer: "Scorer") -> OwnPasses:
    """The passes of a scorer in `OWN`; writes nothing.

    Raises:
        ConfigError: what it needs is not in the settings.
        InputError: what it stands on has not been made yet.
    """
    passes = cast("Callable[[Settings, Scorer], OwnPasses]", resolve(OWN, name, what="scorer"))
    return passes(settings, scorer)


def run_phases(
    passes: Mapping[str, OwnPasses], *, pool: Pool, listener: Listener
) -> dict[str, Outcome]:
    """Run what is due, scorer by scorer; where a phase has failed, its later ones do not start.

    Returns:
        Phase -> its outcome, failures included.
    """
    found: dict[str, Outcome] = {}
    for own in passes.values():
        for phase in own.phases:
            if isinstance(phase, DrivenPhase):
                outcome = drive(phase, pool=pool, listener=listener)
            else:
                outcome = run_tasks(
                    phase.name, phase.tasks, phase.work, pool=pool, listener=listener
                )
            found[phase.name] = outcome
            if outcome.failures:
                break
    return found


def steps_due(name: str, passes: OwnPasses) -> tuple[list[Task], str]:
    """Tasks of a scorer that have something to do, and what they are, to follow their number."""
    found: list[Task] = []
    phases: list[str] = []
    for phase in passes.phases:
        due = [task for task in phase.tasks if not task.is_done()]
        if due:
            phases.append(phase.name.removeprefix(name).removeprefix(":").strip())
        found += due
    words = "task of its own is" if len(found) == 1 else "tasks of its own are"
    return found, f"{words} due for {name}: {', '.join(phases)}"


def tables_left(
    run: RunFolder, passes: Mapping[str, OwnPasses], outcomes: Mapping[str, Outcome]
) -> set[Path]:
    """Tables of the scorers of which a phase failed: what stands there may be of older settings.

    Args:
        run: whose partitions.
        passes: scorer -> its passes.
        outcomes: from `run_phases`.
    """
    failed = {name for name, outcome in outcomes.items() if outcome.failures}
    slugs = [
        slug
        for own in passes.values()
        if any(phase.name in failed for phase in own.phases)
        for slug, _ in own.tables
    ]
    return {run.quantities(part, slug).path for part in run.partitions() for slug in slugs}


def drive(phase: DrivenPhase, *, pool: Pool, listener: Listener) -> Outcome:
    """What `run_tasks` does, in the driver; a failed task does not stop the others.

    Raises:
        OutputError: a task could not write.
        TryAgainError: the cluster went away.
    """
    started = time.monotonic()
    outcome, due, noted = begin(phase.name, phase.tasks)
    total = len(due) + len(outcome.skipped)
    root = outcome.place.root if outcome.place is not None else None
    skipped, workers = len(outcome.skipped), max(1, pool.window // 2)
    with ExitStack() as stack:
        tracker = stack.enter_context(
            live(root if due else None, phase.name, total=total, skipped=skipped, workers=workers)
        )
        tell = telling(tracker, listener)
        stack.enter_context(watching([(task.name, task.payload) for task in due], tell))
        for task in due:
            begun = time.monotonic()
            tracker.started(task.name, "driver")
            try:
                phase.drive(task.payload, pool, listener)
            except (OutputError, TryAgainError):
                raise
            except Exception as error:
                outcome.failures[task.name] = error
                tracker.failed(task.name, "driver", error)
                if root is not None:
                    trace = "".join(traceback.format_exception(error))
                    gone = SetAside(phase.name, task.name, task.payload, task.output.path, error,
                                    trace, "driver", 1)  # fmt: skip
                    keep_failure(root, gone)
                continue
            if root is not None and task.name in noted:
                forget_failure(root, phase.name, task.name)
            outcome.done.append(task.name)
            tracker.finished(task.name, "driver", time.monotonic() - begun)
            tell(task.name)
    outcome.seconds = time.monotonic() - started
    return outcome
