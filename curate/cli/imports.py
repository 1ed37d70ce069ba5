"""Whose `jobs`, `scorers` and `mixers` are imported: the names are not ours alone."""

from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import curate

OURS = ("jobs", "scorers", "mixers")
_DISTRIBUTION = "curate-data"


def foreign_packages() -> dict[str, str]:
    """Name of ours -> where another package of that name is imported from; empty when all is well.

    Only looks for them: a foreign package is not run.
    """
    home = Path(curate.__file__).parent.parent
    found: dict[str, str] = {}
    for name in OURS:
        spec = find_spec(name)
        places = list(spec.submodule_search_locations or []) if spec else []
        if not places or Path(places[0]).resolve() != (home / name).resolve():
            found[name] = places[0] if places else (spec.origin if spec else None) or "nowhere"
    return found


def rivals() -> dict[str, list[str]]:
    """Name of ours -> other installed distributions that bring a package of that name."""
    installed = packages_distributions()
    others = {name: sorted(set(installed.get(name, [])) - {_DISTRIBUTION}) for name in OURS}
    return {name: names for name, names in others.items() if names}
