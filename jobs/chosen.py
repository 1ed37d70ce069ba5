"""Which scorers a run has, and of which kind each is: what it needs decides."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from curate.errors import ConfigError
from curate.models.quantities import LOG, QUANTITIES, is_measured
from jobs.own_passes import OWN, WITHOUT_MODEL
from scorers.catalog import EXTERNAL, SCORERS, build_scorer
from scorers.external import External, tables
from scorers.protocol import Scorer

Kind = Literal["pass", "log", "own", "plain", "external"]
"""The shared pass of each checkpoint; the training log; own passes; no model; from outside."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """One scorer of a run, and the folder of its table."""

    name: str
    """As in the settings; of an external table, its name there."""
    options: dict[str, Any]
    scorer: Scorer | None
    """None for an external table."""
    table: External | None = None

    @property
    def folder(self) -> str:
        """Under `scores/`: the name, of a user's own class the class' name."""
        return self.name.rpartition(":")[2]

    @property
    def kind(self) -> Kind:
        if self.scorer is None:
            return "external"
        if self.name in OWN:
            return "own"
        if not self.needs.isdisjoint(LOG):
            return "log"
        return "pass" if any(map(is_measured, self.needs)) else "plain"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.scorer is None else self.scorer.needs

    @property
    def needs_model(self) -> bool:
        """Whether the run's scoring model, or one that is made for it, looks at the examples."""
        return self.kind in ("pass", "log", "own") and self.name not in WITHOUT_MODEL

    @property
    def wants_log(self) -> bool:
        """Whether its history is the training log, where the run has one."""
        return self.kind == "log" and getattr(self.scorer, "history", "log") == "log"


def chosen_scorers(named: Mapping[str, Mapping[str, Any]]) -> list[Chosen]:
    """The scorers of `score.named`, in its order, their options checked.

    Raises:
        ConfigError: there is none, a name or an option is unknown, a scorer needs a quantity that
            does not exist, or two would write to the same folder.
    """
    found: list[Chosen] = []
    for name, options in named.items():
        if name == EXTERNAL:
            found += [
                Chosen(table, dict(options), None, entry)
                for table, entry in tables(dict(options)).items()
            ]
            continue
        entry = Chosen(name, dict(options), build_scorer(name, options))
        _check_needs(entry)
        found.append(entry)
    folders = [entry.folder for entry in found]
    for entry in found:
        if folders.count(entry.folder) > 1 or (entry.table and entry.name in SCORERS):
            raise ConfigError(
                f"two scores would be called {entry.folder}",
                fix="give the external table another name",
            )
    if not found:
        raise ConfigError("score.scorers is empty", fix="name one, such as el2n")
    return found


def needed(chosen: Sequence[Chosen]) -> frozenset[str]:
    """Quantities that a model's pass must measure for these scorers."""
    return frozenset(
        name
        for entry in chosen
        if entry.kind in ("pass", "log")
        for name in entry.needs
        if is_measured(name)
    )


def _check_needs(entry: Chosen) -> None:
    if entry.kind == "own":
        return
    for need in sorted(entry.needs):
        if need not in QUANTITIES and not is_measured(need):
            raise ConfigError(
                f"scorer {entry.name} needs {need}, which nothing measures",
                fix=f"use quantities among {', '.join(QUANTITIES)}",
            )
    if entry.kind == "log" and not entry.needs <= LOG.keys():
        other = min(entry.needs - LOG.keys())
        raise ConfigError(
            f"scorer {entry.name} needs {other} beside the training log",
            fix="make two scorers of it, one for the log and one for a pass",
        )
