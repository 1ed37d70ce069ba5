"""What the closed mixers share: sizes in one unit, shares of tokens, epochs."""

from collections.abc import Mapping
from typing import Literal

from curate.plan.mixture import DomainSize, Mixture, Phase

Unit = Literal["tokens", "examples"]
"""What a mixer counts. A mixture always says shares of the token budget, so what was found in
examples is multiplied by the mean length of each domain's examples."""


_SHOWN_PHASES = 3
"""Of more, a reason says the mean and the two ends."""


def amounts(sizes: Mapping[str, DomainSize], unit: Unit) -> dict[str, float]:
    """Domain -> how much there is of it, in the unit."""
    if unit == "tokens":
        return {domain: float(size.num_tokens) for domain, size in sizes.items()}
    return {domain: float(size.num_examples) for domain, size in sizes.items()}


def token_shares(
    parts: Mapping[str, float], sizes: Mapping[str, DomainSize], unit: Unit
) -> dict[str, float]:
    """Domain -> share of the tokens, summing to 1, from parts counted in the unit.

    Args:
        parts: domain -> part of all that is drawn, in any scale.
        sizes: gives the mean length that turns examples into tokens.
        unit: what `parts` count.
    """
    tokens = {
        domain: part * (1.0 if unit == "tokens" else mean_tokens(sizes[domain]))
        for domain, part in parts.items()
    }
    total = sum(tokens.values())
    return {domain: value / total for domain, value in tokens.items()}


def mean_tokens(size: DomainSize) -> float:
    """Tokens of a domain's average example."""
    return size.num_tokens / size.num_examples


def epochs(phase: Phase, sizes: Mapping[str, DomainSize], budget_tokens: float) -> dict[str, float]:
    """Domain -> how often a phase goes through it."""
    tokens = phase.share * budget_tokens
    return {
        domain: weight * tokens / sizes[domain].num_tokens
        for domain, weight in phase.weights.items()
    }


def reasons(
    phases: tuple[Phase, ...],
    sizes: Mapping[str, DomainSize],
    budget_tokens: float,
    rules: Mapping[str, str],
) -> dict[str, str]:
    """Domain -> one sentence with its numbers, of each phase where they are few.

    Args:
        phases: the mixture.
        sizes: what there is of each domain.
        budget_tokens: tokens that training will see.
        rules: domain -> what decided its weight, such as "temperature 5".
    """
    pool = sum(size.num_tokens for size in sizes.values())
    passes = [epochs(phase, sizes, budget_tokens) for phase in phases]
    found: dict[str, str] = {}
    for domain, size in sizes.items():
        share = " then ".join(f"{100 * phase.weights[domain]:.3g} %" for phase in phases)
        times = " then ".join(f"{each[domain]:.3g}" for each in passes)
        if len(phases) > _SHOWN_PHASES:
            mean = sum(phase.share * phase.weights[domain] for phase in phases)
            ends = [100 * phases[place].weights[domain] for place in (0, -1)]
            share = f"on average {100 * mean:.3g} % (first {ends[0]:.3g} %, last {ends[1]:.3g} %)"
            times = f"{sum(each[domain] for each in passes):.3g}"
        found[domain] = (
            f"{size.num_tokens:,} tokens, {100 * size.num_tokens / pool:.3g} % of the pool: "
            f"{rules[domain]} gives {share} of the budget, {times} epochs"
        )
    return found


def one_phase(
    mixer: str,
    weights: dict[str, float],
    sizes: Mapping[str, DomainSize],
    budget_tokens: float,
    rules: Mapping[str, str],
    notes: tuple[str, ...] = (),
) -> Mixture:
    """A mixture that stays the same throughout."""
    phases = (Phase(1.0, weights),)
    return Mixture(mixer, phases, reasons(phases, sizes, budget_tokens, rules), notes)
