"""Which pass of a run serves which scorers: what `curate methods --plan` tells."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from curate.errors import InputError, counted
from curate.models.quantities import FORWARD, gradient_names
from jobs.chosen import Chosen, chosen_scorers, needed
from jobs.fields import reference_of
from jobs.measurers import measurers
from jobs.own_passes import own_passes
from jobs.settings import Settings

Kind = Literal["reference", "forward", "backward", "log", "own", "table", "outside"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """One pass over the examples, and the scores that come from it."""

    kind: Kind
    """reference (a model that others are compared with), forward, backward (with the forward pass
    it needs), log (of training), own (of one scorer alone), table (no model), outside."""
    models: tuple[str, ...]
    """Checkpoints that make it; where they have not been trained yet, their seeds."""
    scorers: tuple[str, ...]
    """In the order of the settings."""
    measures: tuple[str, ...]
    """Quantities, or the steps of a scorer's own passes."""


def passes_of(settings: Settings) -> list[Serving]:
    """The passes that the chosen scorers need, every one named once; nothing is run or written.

    Raises:
        ConfigError: no scorer is chosen, or a scorer or an option is wrong.
    """
    chosen = chosen_scorers(settings.score.named)
    return [
        *_reference(settings, chosen),
        *_shared(settings, chosen),
        *_log(settings, chosen),
        *_own(settings, chosen),
        *_plain(chosen),
    ]


def _reference(settings: Settings, chosen: Sequence[Chosen]) -> Iterator[Serving]:
    served = tuple(e.folder for e in chosen if e.kind in ("pass", "log", "own"))
    reference = reference_of(settings) if served else None
    if reference is not None:
        yield Serving(
            kind="reference",
            models=(str(reference.folder),),
            scorers=served,
            measures=("log-probabilities of both answers, once for all checkpoints",),
        )


def _shared(settings: Settings, chosen: Sequence[Chosen]) -> Iterator[Serving]:
    """The pass of every checkpoint that all its scorers share."""
    sharing = [e for e in chosen if e.kind in ("pass", "log") and not _reads_log(e, settings)]
    if not sharing:
        return
    gradients = gradient_names(needed(sharing))
    asked = {name for entry in sharing for name in entry.needs}
    history = ("loss", "correct", "margin") if any(e.kind == "log" for e in sharing) else ()
    forward = tuple(name for name in FORWARD if name in asked or name in history)
    yield Serving(
        kind="backward" if gradients else "forward",
        models=_checkpoints(settings),
        scorers=tuple(entry.folder for entry in sharing),
        measures=(*forward, *(name for name in gradients if name not in forward)),
    )


def _log(settings: Settings, chosen: Sequence[Chosen]) -> Iterator[Serving]:
    reads = [entry for entry in chosen if _reads_log(entry, settings)]
    if reads and settings.checkpoints.train is not None:
        yield Serving(
            kind="log",
            models=tuple(f"training of seed {seed}" for seed in settings.checkpoints.train.seeds),
            scorers=tuple(entry.folder for entry in reads),
            measures=_union(reads),
        )


def _own(settings: Settings, chosen: Sequence[Chosen]) -> Iterator[Serving]:
    for entry in chosen:
        if entry.kind != "own" or entry.scorer is None:
            continue
        steps: tuple[str, ...]
        try:
            passes = own_passes(settings, entry.name, entry.scorer)
            steps = tuple(
                f"{p.name} ({counted(len(p.tasks), 'task')})" for p in passes.phases if p.tasks
            )
            seeds = sorted({seed for _, seed in passes.tables})
        except InputError as error:
            steps, seeds = (f"known later: {error.what}",), []
        yield Serving(
            kind="own",
            models=tuple(f"seed {seed}" for seed in seeds) if len(seeds) > 1 else (),
            scorers=(entry.folder,),
            measures=steps,
        )


def _plain(chosen: Sequence[Chosen]) -> Iterator[Serving]:
    tables = [entry for entry in chosen if entry.kind == "plain"]
    if tables:
        names = tuple(entry.folder for entry in tables)
        yield Serving(kind="table", models=(), scorers=names, measures=_union(tables))
    outside = [entry for entry in chosen if entry.table is not None]
    if outside:
        yield Serving(
            kind="outside",
            models=(),
            scorers=tuple(entry.folder for entry in outside),
            measures=tuple(entry.table.path for entry in outside if entry.table is not None),
        )


def _reads_log(entry: Chosen, settings: Settings) -> bool:
    """Whether a scorer's history is the log of this run's own training."""
    return entry.wants_log and settings.checkpoints.train is not None


def _checkpoints(settings: Settings) -> tuple[str, ...]:
    try:
        return tuple(measurer.name for measurer in measurers(settings))
    except InputError:
        train = settings.checkpoints.train
        if train is None:
            raise
        return tuple(f"seed-{seed}, to be trained" for seed in train.seeds)


def _union(entries: Iterable[Chosen]) -> tuple[str, ...]:
    return tuple(sorted({name for entry in entries for name in entry.needs}))
