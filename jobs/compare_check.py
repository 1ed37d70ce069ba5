"""What a comparison needs, asked before anything is trained; loads neither torch nor tables."""

from curate.errors import ConfigError
from jobs.settings import Settings


def check_compare(settings: Settings) -> None:
    """Refuse a comparison that has nothing to measure its arms on.

    Raises:
        ConfigError: no example is held out and there is no target.
    """
    compare = settings.compare
    if settings.index.held_out > 0 or settings.target is not None or compare.command is not None:
        return
    raise ConfigError(
        "index.held_out is 0 and there is no target: nothing is left to measure the arms on",
        fix="set index.held_out to a share such as 0.05, or set target",
    )
