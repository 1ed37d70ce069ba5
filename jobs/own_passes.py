"""Scorers that measure by passes of their own, beside the one that all others share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from curate.config import resolve
from jobs.cluster import Pool
from jobs.run import Listener, Outcome, Receipt, Task, run_tasks
from jobs.settings import Settings
from scorers.protocol import Scorer

OWN: dict[str, str] = {
    "aum_threshold": "jobs.aum_threshold:passes",
    "label_issues": "jobs.label_issues:passes",
    "dvgs": "jobs.dvgs:passes",
    "vog": "jobs.vog:passes",
    "pvi": "jobs.pvi:passes",
}
"""Scorer -> `module:function` that says its passes: `(settings, scorer) -> OwnPasses`."""


class Phase(NamedTuple):
    """Tasks that may run side by side."""

    name: str
    tasks: list[Task]
    work: Callable[[dict[str, Any]], Receipt]


@dataclass(frozen=True, slots=True)
class OwnPasses:
    """What a scorer does before its columns can be computed."""

    phases: tuple[Phase, ...]
    """One after the other. Fingerprints follow from settings and index alone, not from outputs of
    earlier phases, so that all are known before anything has run."""
    tables: tuple[tuple[str, int], ...]
    """Folder under `quantities/`, and the seed it belongs to: each holds a table for every
    partition, with what the scorer's `needs` name, null where an example has no value."""

    @property
    def tasks(self) -> list[Task]:
        """Of all phases."""
        return [task for phase in self.phases for task in phase.tasks]


def own_passes(settings: Settings, name: str, scorer: Scorer) -> OwnPasses:
    """The passes of a scorer in `OWN`; writes nothing.

    Raises:
        ConfigError: what it needs is not in the settings.
        InputError: what it stands on has not been made yet.
    """
    passes = cast(Callable[[Settings, Scorer], OwnPasses], resolve(OWN, name, what="scorer"))
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
            outcome = run_tasks(phase.name, phase.tasks, phase.work, pool=pool, listener=listener)
            found[phase.name] = outcome
            if outcome.failures:
                break
    return found
