"""A sign of life: loops say here that they have moved on, so that a hang is told from long work."""

_moves = 0


def beat() -> None:
    """Something has moved: a batch, a step, a file. Costs nothing; call it from any loop."""
    global _moves
    # Two threads may count as one: what matters is that the number changes.
    _moves += 1


def beats() -> int:
    """How often something has moved in this process."""
    return _moves
