"""Holm's correction: many comparisons, one chance in twenty of any false one."""

from collections.abc import Sequence


def holm(p_values: Sequence[float], weights: Sequence[float] | None = None) -> list[float]:
    """Adjusted p values: those at or below 0.05 hold together, with at most 5 % risk of any error.

    In ascending order of p/w, p is multiplied by the weight of all hypotheses still standing over
    its own; then each is raised to the largest before it. No assumption on how the tests depend
    on each other, which they do here: all arms are compared with the same random.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal
    of Statistics 6, 1979 (section 4 for the weights).

    Args:
        p_values: each in [0, 1].
        weights: positive; a hypothesis of twice the weight gets twice the share of the 5 %.
            Equal by default.

    Returns:
        Adjusted values in [0, 1], in the order given.
    """
    shares = [1.0] * len(p_values) if weights is None else list(weights)
    order = sorted(range(len(p_values)), key=lambda index: p_values[index] / shares[index])
    adjusted = [0.0] * len(p_values)
    standing, largest = sum(shares), 0.0
    for index in order:
        largest = max(largest, min(1.0, p_values[index] * standing / shares[index]))
        adjusted[index] = largest
        standing -= shares[index]
    return adjusted
