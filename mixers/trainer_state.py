"""Notes in a trainer's state: they lie in trainer_state.json of every checkpoint.

That file is written as one with the rest of the checkpoint, and read before training begins.
"""

from typing import Any, cast

from transformers import TrainerState


def note(state: TrainerState, name: str, value: dict[str, Any]) -> None:
    """Keep JSON values under a name, for the next checkpoint."""
    notes = _notes(state)
    if notes is not None:
        notes[name] = value


def noted(state: TrainerState, name: str) -> dict[str, Any] | None:
    """What a checkpoint held under the name; None where there is nothing."""
    notes = _notes(state)
    value = None if notes is None else notes.get(name)
    return cast(dict[str, Any], value) if isinstance(value, dict) else None


def _notes(state: TrainerState) -> dict[str, Any] | None:
    # Declared as a list of callbacks; once the state is made it is a dict of what they keep.
    found: Any = state.stateful_callbacks
    return cast(dict[str, Any], found) if isinstance(found, dict) else None
