"""What the scorers need of the settings, checked before anything expensive."""

from collections.abc import Callable
from typing import cast

from curate.config import resolve
from jobs.chosen import chosen_scorers
from jobs.settings import Settings
from scorers.protocol import Scorer

CHECKS: dict[str, str] = {
    "aum_threshold": "jobs.aum_threshold:check",
    "label_issues": "jobs.label_issues:check",
    "dvgs": "jobs.dvgs:check",
    "vog": "jobs.vog:check",
    "pvi": "jobs.pvi:check",
    "self_influence": "jobs.self_influence:check",
    "influence": "jobs.influence:check",
    "duplicates": "jobs.duplicates:check",
    "gio": "jobs.gio:check",
    "spread": "jobs.spread:check",
    "dsir": "jobs.dsir:check",
    "bm25": "jobs.bm25:check",
    "density_ratio": "jobs.density_ratio:check",
    "rds": "jobs.rds:check",
    "leakage": "jobs.leakage:check",
}
"""Scorer with passes of its own -> `module:function` of `(settings, scorer)` that refuses settings
under which these cannot run; it needs no index and writes nothing."""


def check_scores(settings: Settings) -> None:
    """Refuse scorers, options and settings that cannot give scores.

    Raises:
        ConfigError: a name or an option is unknown, or what a scorer needs is not in the settings.
        InputError: a file that a scorer reads is missing.
    """
    for entry in chosen_scorers(settings.score.named):
        if entry.scorer is not None and entry.name in CHECKS:
            check = resolve(CHECKS, entry.name, what="scorer")
            cast(Callable[[Settings, Scorer], None], check)(settings, entry.scorer)
