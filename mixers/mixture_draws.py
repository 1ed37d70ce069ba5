"""Mixtures to try: Dirichlet draws around the natural mixture, from corners to its neighbourhood.

    p ~ Dirichlet(strength * a),  a_i = n_i^(1/2) / sum_j n_j^(1/2),  p_i <= cap_i

Source: Liu et al., "RegMix: Data Mixture as Regression for Language Model Pre-training", ICLR 2025,
arXiv:2407.01492, and the code of its authors: 15 strengths between 0.1 and 5, evenly spaced in
their logarithm; caps of 15 times the natural share; shares in steps of 0.0002.

Departures: rounded shares add up to 1, by giving the largest remainders a step more. Natural and
uniform mixtures are wanted beside the draws and are put in front of them (`swarm`). Draws are taken
as they come, so that those of a smaller swarm are the first of a larger one.
Cost: none.
Shapes: m domains, n mixtures.
"""

import numpy as np

from curate.errors import ConfigError
from mixers.laws import Floats

TEMPER = 0.5
STRENGTHS = (0.1, 5.0, 15)
"""Smallest, largest, how many."""
USAGE = 15.0
"""Most that a domain gets, in natural shares."""
STEP = 2e-4
"""Smallest share, and the unit of all."""
_TIMES = 100
"""Draws for each mixture that is wanted, after which no more are tried."""
_ENOUGH = 10_000
"""Draws of which one must be below the caps."""
_NUMBERS = 1 << 14
"""Shares drawn at a time."""


def swarm(tokens: Floats, num: int, *, caps: Floats | None = None, seed: int = 0) -> Floats:
    """(num, m) mixtures for proxies: the natural one, the uniform one, and draws.

    Args:
        tokens: (m,) what there is of each domain, above 0.
        num: mixtures, two or more.
        caps: (m,) largest shares of the draws; 15 times the natural ones unless given.
        seed: of the draws.

    Raises:
        ConfigError: there are not so many different mixtures.
    """
    natural = tokens / tokens.sum()
    fixed = np.stack([natural, np.full_like(natural, 1 / len(natural))])
    return np.concatenate([fixed, drawn(tokens, num - 2, caps=caps, seed=seed)])


def drawn(tokens: Floats, num: int, *, caps: Floats | None = None, seed: int = 0) -> Floats:
    """(num, m) different mixtures, in steps of 0.0002.

    Args:
        tokens: (m,) what there is of each domain, above 0.
        num: mixtures.
        caps: (m,) largest shares; 15 times the natural ones, at most 1, unless given.
        seed: of the draws.

    Raises:
        ConfigError: a hundred times as many draws did not hold so many that are different and
            below the caps, or ten thousand held none.
    """
    generator = np.random.default_rng(seed)
    high = np.minimum(USAGE * tokens / tokens.sum(), 1) if caps is None else caps
    # Of a size that `num` has no part in: how many are wanted must not change the first ones.
    size = max(1, _NUMBERS // len(tokens))
    found: dict[bytes, Floats] = {}
    for tried in range(0, _TIMES * num, size):
        if len(found) >= num or (tried >= _ENOUGH and not found):
            break
        raw = scattered(tokens, size, generator)
        for row in _steps(raw[(raw <= high).all(1)]):
            found.setdefault(row.tobytes(), row)
    if len(found) < num:
        raise ConfigError(
            f"only {len(found)} different mixtures of these domains were found, not {num}",
            fix="ask for fewer runs (mix.runs), or join domains, the smallest first",
        )
    return np.array(list(found.values())[:num]).reshape(num, len(tokens)) * STEP


def scattered(tokens: Floats, num: int, generator: np.random.Generator) -> Floats:
    """(num, m) draws without caps or rounding, each of a strength of its own."""
    centre = tokens**TEMPER / (tokens**TEMPER).sum()
    low, high, steps = STRENGTHS
    strengths = generator.choice(np.geomspace(low, high, steps), num)
    # A Dirichlet draw is one of gammas, scaled; their logarithms do not vanish for small shapes:
    # Gamma(a) = Gamma(a + 1) U^(1/a).
    shapes = strengths[:, None] * centre
    logs = np.log(generator.gamma(shapes + 1)) + np.log(generator.random(shapes.shape)) / shapes
    draws = np.exp(logs - logs.max(1, keepdims=True))
    return draws / draws.sum(1, keepdims=True)


def _steps(draws: Floats) -> Floats:
    """(n, m) whole numbers of steps, each row adding up to 1 / STEP."""
    units = round(1 / STEP)
    kept = np.where(draws < STEP, 0.0, draws)
    exact = kept / kept.sum(1, keepdims=True) * units
    found = np.floor(exact)
    missing = units - found.sum(1)  # (n,) steps that rounding down has left
    order = np.argsort(np.argsort(found - exact, axis=1, kind="stable"), axis=1)
    return found + (order < missing[:, None])
