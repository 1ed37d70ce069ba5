"""Whether models run on other machines than this one, whose GPUs cannot be asked from here."""

from dataclasses import dataclass


@dataclass(slots=True)
class _Elsewhere:
    is_so: bool = False
    has_gpus: bool = False


_models = _Elsewhere()


def run_elsewhere(*, has_gpus: bool) -> None:
    """From now on this process hands the work on models to others.

    Args:
        has_gpus: each of them has one, so that `auto` means it.
    """
    _models.is_so, _models.has_gpus = True, has_gpus


def run_here() -> None:
    """As it is at the start: models run in this process, or beside it."""
    _models.is_so = _models.has_gpus = False


def are_elsewhere() -> bool:
    """Whether the work on models is handed on, so that devices are not looked for here."""
    return _models.is_so


def have_gpus() -> bool:
    """Whether those who do the work have GPUs."""
    return _models.has_gpus
