"""What every method measures, needs and costs, read from the methods themselves."""

import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

from curate.config import nearest
from curate.errors import ConfigError
from curate.models.settings import TASKS
from jobs.all_stages import load
from jobs.own_passes import (
    INDEXES_TARGET,
    OWN,
    READS_EVALUATION,
    READS_LABELS,
    TRAINS_ON_TARGET,
    WITHOUT_MODEL,
)
from jobs.representations import READS_TARGET, reads_vectors
from jobs.settings import parse_settings

_KINDS = ("task", "scorer", "mixer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One entry of a catalog."""

    name: str
    kind: str
    """task, scorer or mixer."""
    measures: str
    """First sentence of the method's file."""
    needs: tuple[str, ...]
    """Per-example quantities, of a scorer; of one with passes of its own, what these read."""
    columns: dict[str, str]
    """Column -> unit, range and which end is which, of a scorer."""
    options: dict[str, str]
    """Option -> default."""
    cost: str
    source: str
    """The paper."""
    address: str
    """Where it is written: `module:Class`."""


def all_methods() -> list[Method]:
    """Every method of the catalogs, in their order."""
    from mixers.catalog import MIXERS
    from scorers.catalog import SCORERS

    catalogs = dict(zip(_KINDS, (TASKS, SCORERS, MIXERS), strict=True))
    return [
        _method(name, kind, address)
        for kind, catalog in catalogs.items()
        for name, address in catalog.items()
    ]


def find_method(name: str) -> Method:
    """One method.

    Raises:
        ConfigError: no catalog has it.
    """
    known = {method.name: method for method in all_methods()}
    if name not in known:
        raise ConfigError(
            f"there is no method {name!r}",
            fix=nearest(name, known) or f"use one of {', '.join(known)}",
        )
    return known[name]


def _method(name: str, kind: str, address: str) -> Method:
    method = load(address)
    text = inspect.getdoc(sys.modules[method.__module__]) or ""
    own = inspect.getdoc(method) or ""
    told = _with_defaults(method)
    columns: Any = getattr(told, "columns", {})
    return Method(
        name=name,
        kind=kind,
        measures=_first_sentence(text if kind == "scorer" else own),
        needs=_reads(name) if name in OWN else tuple(sorted(getattr(told, "needs", ()))),
        columns=dict(columns) if isinstance(columns, Mapping) else {},
        options=_options(method),
        cost=_section(text, "Cost"),
        source=_section(text, "Source"),
        address=address,
    )


def _with_defaults(method: Any) -> Any:
    """An instance with its default options, as what it needs may depend on them; else the class."""
    has_all = "required" not in _options(method).values()
    return method() if has_all and hasattr(method, "needs") else method


def _reads(name: str) -> tuple[str, ...]:
    """What the passes of a scorer in `OWN` read with its default options."""
    values = {"run": ".", "sources": {"data": {"path": "."}}, "score": {"scorers": [name]}}
    found = {
        "a model": name not in WITHOUT_MODEL,
        "labels": name in READS_LABELS,
        "a target": name in READS_TARGET | TRAINS_ON_TARGET | INDEXES_TARGET,
        "evaluation sets": name in READS_EVALUATION,
        "vectors": reads_vectors(parse_settings(values)),
    }
    read = tuple(what for what, does in found.items() if does)
    beside = {"a target", "evaluation sets"}
    return read if set(read) - beside else (*read, "the examples themselves")


def _options(method: Any) -> dict[str, str]:
    if not is_dataclass(method):
        return {}
    found: dict[str, str] = {}
    for field in fields(method):
        if field.default is not MISSING:
            found[field.name] = repr(field.default)
        elif field.default_factory is not MISSING:
            found[field.name] = repr(field.default_factory())
        else:
            found[field.name] = "required"
    return found


def _first_sentence(text: str) -> str:
    sentence = " ".join(text.split("\n\n")[0].split())
    return re.sub(r"^[A-Z][\w ]*: ", "", sentence)


def _section(text: str, title: str) -> str:
    """What stands behind `Title:` up to the next title or empty line; "" where there is none."""
    found = re.search(
        rf"^{title}: (.*?)(?=\n\n|\n[A-Z][a-z]+: |\Z)", text, re.MULTILINE | re.DOTALL
    )
    return " ".join(found[1].split()) if found else ""
