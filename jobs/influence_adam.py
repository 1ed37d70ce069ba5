"""Rows of Adam's updates in place of gradients: the moments of each checkpoint, and their use."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from curate.config import plain
from curate.data.files import digest_file, fingerprint
from curate.models.adam import Moment, Update, diagonal_update, exact_update
from curate.models.adam_moments import moments_file, read_moments
from curate.models.adam_pass import AdamProjector, scaled_sides
from curate.models.gradients import Sides
from curate.models.load import LoadedModel
from jobs.influence_sides import IndexOptions
from jobs.measurers import Measurer

_last: dict[str, "Prepared"] = {}
"""Of the last model: read once per process, not per partition."""


class Prepared(NamedTuple):
    """What a pass projects on, and by way of what."""

    sides: dict[str, Sides]
    adam: AdamProjector | None


def moments_stamps(chosen: Sequence[Measurer], options: IndexOptions) -> dict[str, str]:
    """Checkpoint -> digest of its moments, where they are used.

    Raises:
        InputError: a checkpoint has none.
    """
    if options.adam == "none":
        return {}
    return {each.name: digest_file(moments_file(each.folder)) for each in chosen}


def adam_facts(options: IndexOptions, stamp: str | None) -> dict[str, Any] | None:
    """What a header says of it."""
    if options.adam == "none":
        return None
    return {"form": options.adam, "moments": stamp, "bias_corrected": True}


def prepared(
    loaded: LoadedModel,
    sides: dict[str, Sides],
    options: IndexOptions,
    *,
    folder: Path,
    stamp: str | None,
) -> Prepared:
    """Sides and projector of a pass.

    Args:
        loaded: the model of a checkpoint.
        sides: of the index, on its device.
        options: of the index.
        folder: of the checkpoint.
        stamp: digest of its moments.

    Raises:
        InputError: the moments cannot be read or are of another model.
    """
    if options.adam == "none":
        return Prepared(sides, None)
    key = fingerprint(
        model=loaded.digest, device=str(loaded.device), options=plain(options), moments=stamp
    )
    if key not in _last:
        _last.clear()  # before the next ones are read
        moments = _here(read_moments(moments_file(folder), loaded.model, list(sides)), sides)
        _last[key] = _prepare(moments, sides, options)
    return _last[key]


def _prepare(
    moments: Mapping[str, Moment], sides: dict[str, Sides], options: IndexOptions
) -> Prepared:
    if options.adam == "factored":
        return Prepared(scaled_sides(moments, sides), None)
    make = exact_update if options.adam == "exact" else diagonal_update
    updates: dict[str, Update] = {name: make(moment) for name, moment in moments.items()}
    return Prepared(sides, AdamProjector(updates, sides))


def _here(moments: Mapping[str, Moment], sides: Mapping[str, Sides]) -> dict[str, Moment]:
    """As matrices, beside the sides."""
    found: dict[str, Moment] = {}
    for name, moment in moments.items():
        left = sides[name].left
        first, second = (
            values.reshape(len(left), -1).to(left.device, left.dtype)
            for values in (moment.gradient, moment.square)
        )
        found[name] = moment._replace(gradient=first, square=second)
    return found
