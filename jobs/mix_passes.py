"""Mixers that train before they know: their passes in phases, and what comes of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from curate.config import resolve
from curate.plan.mixture import DomainSize, Phase
from jobs.cluster import Pool
from jobs.own_passes import DrivenPhase, drive
from jobs.own_passes import Phase as Work
from jobs.run import Listener, Outcome, Task, raise_failures, run_tasks
from jobs.settings import Settings

PASSES: dict[str, str] = {
    "doremi": "jobs.doremi:passes",
    "doge": "jobs.doge:passes",
    "dga": "jobs.dga:passes",
    "scalebio": "jobs.scalebio:passes",
    "regmix": "jobs.regmix:passes",
    "dmo": "jobs.dmo:passes",
    "loss_reweighting": "jobs.loss_reweighting:passes",
}
"""Mixer -> `module:function` that says its passes: `(settings, mixer) -> MixPasses`."""


class Found(NamedTuple):
    """What the passes have found."""

    phases: tuple[Phase, ...]
    """Shares of tokens."""
    why: dict[str, str]
    """Domain -> what decided its weight, in a few words with numbers."""
    notes: tuple[str, ...] = ()
    trajectories: Mapping[str, Path] = {}
    """Run -> what it showed on its way; together they become the mixture's `trajectory.parquet`."""
    tables: Mapping[str, Path] = {}
    """Name in the mixture's folder -> another file to copy there."""


@dataclass(frozen=True, slots=True)
class MixPasses:
    """What a mixer does before its mixture is known."""

    phases: tuple[Work | DrivenPhase, ...]
    """One after the other. Fingerprints follow from settings and index alone, so that all are
    known before anything has run."""
    finish: Callable[[Mapping[str, DomainSize]], Found]
    """Reads what the phases have written, given the sizes of the domains."""
    inputs: tuple[str, ...] = ()
    """Digests of what is read besides, such as files of the user."""
    tolerated: frozenset[str] = field(default_factory=frozenset[str])
    """Phases of which single tasks may fail; `finish` says what is missing."""

    @property
    def tasks(self) -> list[Task]:
        """Of all phases."""
        return [task for phase in self.phases for task in phase.tasks]

    @property
    def fingerprints(self) -> list[str]:
        """Of all that the mixture depends on."""
        return [*(task.fingerprint for task in self.tasks), *self.inputs]


def mix_passes(settings: Settings, name: str, mixer: Any) -> MixPasses:
    """The passes of a mixer in `PASSES`; writes nothing.

    Raises:
        ConfigError: what it needs is not in the settings.
        InputError: what it stands on has not been made yet.
    """
    from jobs.proxy_ranks import proxy_phase

    passes = cast(Callable[[Settings, Any], MixPasses], resolve(PASSES, name, what="mixer"))
    found = passes(settings, mixer)
    phases = [
        each if isinstance(each, DrivenPhase) else proxy_phase(*each) for each in found.phases
    ]
    return replace(found, phases=tuple(phases))


def run_mix_passes(passes: MixPasses, *, pool: Pool, listener: Listener) -> dict[str, Outcome]:
    """Run what is due, phase by phase.

    Raises:
        CurateError: a task failed in a phase that cannot do without.
    """
    found: dict[str, Outcome] = {}
    for phase in passes.phases:
        if isinstance(phase, DrivenPhase):
            outcome = drive(phase, pool=pool, listener=listener)
        else:
            outcome = run_tasks(phase.name, phase.tasks, phase.work, pool=pool, listener=listener)
        found[phase.name] = outcome
        if phase.name not in passes.tolerated:
            raise_failures(phase.name, outcome)
    return found
