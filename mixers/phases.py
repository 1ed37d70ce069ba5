"""From a mixture, which says shares of tokens, to what a stream draws: probabilities of examples.

    q_d = (p_d / m_d) / sum_j (p_j / m_j)        m_d: mean tokens of the domain's examples

A phase that has a share s of the tokens has a share proportional to s * sum_d p_d / m_d of the
examples, since where domains of long examples are drawn, fewer examples fill the same tokens.

Shapes: none.
"""

import math
from collections.abc import Mapping

from curate.errors import ConfigError
from curate.plan.mixture import DomainSize, Mixture


def example_probabilities(
    weights: Mapping[str, float], sizes: Mapping[str, DomainSize]
) -> dict[str, float]:
    """Domain -> probability of drawing one of its examples, summing to 1.

    Args:
        weights: domain -> share of the tokens.
        sizes: gives the mean length of each domain's examples.

    Raises:
        ConfigError: a domain with a weight has no size.
    """
    parts = {domain: share / _mean_tokens(domain, sizes) for domain, share in weights.items()}
    total = math.fsum(parts.values())
    return {domain: part / total for domain, part in parts.items()}


def phase_probabilities(
    mixture: Mixture, num_examples: int, *, sizes: Mapping[str, DomainSize] | None = None
) -> list[tuple[int, dict[str, float]]]:
    """First position and probabilities of each phase, for a stream of so many examples.

    Args:
        mixture: of a mixer such as `mixers.cooldown`, or read by `curate.plan.mixture`.
        num_examples: that the whole training sees: steps times global batch size.
        sizes: what there is of each domain; None where all examples are of one length, as packed
            windows are, so that shares of tokens and of examples are the same.
    """
    found: list[tuple[int, dict[str, float]]] = []
    parts: list[float] = []
    for phase in mixture.phases:
        if sizes is None:
            per_token, probabilities = 1.0, dict(phase.weights)
        else:
            per_token = math.fsum(
                share / _mean_tokens(domain, sizes) for domain, share in phase.weights.items()
            )
            probabilities = example_probabilities(phase.weights, sizes)
        found.append((0, probabilities))
        parts.append(phase.share * per_token)
    total = math.fsum(parts)
    starts = [
        round(num_examples * math.fsum(parts[:number]) / total) for number in range(len(parts))
    ]
    return [(start, row) for start, (_, row) in zip(starts, found, strict=True)]


def _mean_tokens(domain: str, sizes: Mapping[str, DomainSize]) -> float:
    if domain not in sizes:
        raise ConfigError(
            f"the mixture has the domain {domain}, and sizes have not",
            fix="pass the sizes that the mixture was made from",
        )
    return sizes[domain].num_tokens / sizes[domain].num_examples
