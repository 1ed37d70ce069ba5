"""What a comparison needs, asked before anything is trained; loads neither torch nor tables."""

from curate.errors import ConfigError
from jobs.compare_settings import ArmSettings
from jobs.mix_passes import PASSES
from jobs.settings import Settings


def check_compare(settings: Settings) -> None:
    """Refuse a comparison that has nothing to measure its arms on.

    Raises:
        ConfigError: no example is held out and there is no target, or an arm's mixer trains.
    """
    compare = settings.compare
    for arm in compare.arms:
        if isinstance(arm, ArmSettings) and arm.mix.get("mixer") in PASSES:
            raise ConfigError(
                f"arm {arm.name}: the mixer {arm.mix['mixer']} trains models of its own, which no"
                " arm does",
                fix="run `curate mix` with it in a run of its own, and name that run in the arm,"
                " or give the weights to the mixer fixed",
            )
    if settings.index.held_out > 0 or settings.target is not None or compare.command is not None:
        return
    raise ConfigError(
        "index.held_out is 0 and there is no target: nothing is left to measure the arms on",
        fix="set index.held_out to a share such as 0.05, or set target",
    )
