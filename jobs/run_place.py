"""Where a stage runs: the folder it keeps notes in, and what of it is wanted."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The stage whose tasks run now; the phases of a stage share it."""

    root: Path
    """The run folder."""
    stage: str
    """Name of the stage."""
    command: str
    """What runs it again: `curate score RUN`."""
    stall_seconds: float = 0.0
    """A worker on which nothing has moved for so long is restarted; 0: never."""
    only: Mapping[str, frozenset[str]] | None = None
    """Phase -> names of the tasks that are wanted of it, where not all are; a phase that is not
    here is wanted whole."""


_PLACE: ContextVar[Place | None] = ContextVar("place", default=None)


@contextmanager
def at_work(place: Place) -> Generator[None]:
    """Inside, every `jobs.run.run_tasks` belongs to this stage, however deep it is called."""
    before = _PLACE.set(place)
    try:
        yield
    finally:
        _PLACE.reset(before)


def current_place() -> Place | None:
    """The stage that runs now; None outside of `jobs.all_stages.run_stages`, and on workers."""
    return _PLACE.get()
