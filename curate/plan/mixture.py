"""A mixture: the share of the token budget that each domain gets, in one or more phases."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from curate.data.files import misshapen, read_document, write_json
from curate.errors import InputError


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of training with one mixture."""

    share: float
    """Share of the token budget, in (0, 1]; the shares of all phases sum to 1."""
    weights: dict[str, float]
    """Domain -> share of the phase's tokens; sums to 1."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """What a mixer decides and the plan realises."""

    mixer: str
    phases: tuple[Phase, ...]
    why: dict[str, str]
    """Domain -> one sentence on how its weight came about."""
    notes: tuple[str, ...] = ()
    """What a reader must know besides: a budget that cannot be reached, too many epochs."""

    def mean(self) -> dict[str, float]:
        """Domain -> share of the whole budget."""
        return {
            domain: sum(phase.share * phase.weights[domain] for phase in self.phases)
            for domain in self.phases[0].weights
        }


@dataclass(frozen=True, slots=True)
class DomainSize:
    """What there is of a domain: training rows of the index, held-out rows left out."""

    num_examples: int
    num_tokens: int
    """Examples, where the task has no tokens."""


def save_mixture(path: Path, mixture: Mixture, sizes: dict[str, DomainSize]) -> None:
    """Write `mixture.json`."""
    write_json(path, mixture_values(mixture, sizes))


def mixture_values(mixture: Mixture, sizes: dict[str, DomainSize]) -> dict[str, Any]:
    """What `mixture.json` holds."""
    value: dict[str, Any] = {"schema_version": 1, "unit": "tokens", **asdict(mixture)}
    value["sizes"] = {domain: asdict(size) for domain, size in sizes.items()}
    value["mean"] = mixture.mean()
    return value


def load_mixture(path: Path) -> Mixture:
    """Read what `save_mixture` wrote.

    Raises:
        InputError: there is none, or it is damaged.
    """
    value = read_document(path, mixer=str, phases=list, why=dict)
    if value is None:
        raise InputError(f"there is no mixture at {path}", fix="run `curate mix` first")
    try:
        phases = tuple(Phase(**phase) for phase in value["phases"])
    except TypeError as error:
        raise misshapen(path, "its phases are not phases") from error
    return Mixture(value["mixer"], phases, value["why"], tuple(value.get("notes", ())))
