"""Training domains that stand in the target as a whole: they are told before anything else."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from curate.errors import counted


def swallowed_domains(left_out: Mapping[str, int], domains: Iterable[str]) -> list[str]:
    """Domains of which nothing is left to train on, in order of name.

    Args:
        left_out: domain -> how many of its examples stand in the target too.
        domains: those that have a sequence to train on.
    """
    return sorted(set(left_out) - set(domains))


def swallowed_in(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The same, of the results of runs on the same sequences."""
    return sorted({name for result in results for name in result.get("swallowed", ())})


def swallowed_notes(names: Sequence[str]) -> list[str]:
    """One sentence for them all; none where there is none."""
    if not names:
        return []
    if len(names) == 1:
        return [
            f"the domain {names[0]} stands wholly in the target, so nothing of it is left to train"
            " on and it gets no weight: take it out of the target or the pool"
        ]
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
    return [
        f"{counted(len(names), 'domain')} stand wholly in the target, so nothing of them is left to"
        f" train on and they get no weight: take them out of the target or the pool ({shown})"
    ]


SWALLOWED_WHY = "it stands wholly in the target"
