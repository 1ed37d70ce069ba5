"""DSIR: how much likelier the n-grams of an example are under the target than under the pool.

    log w(x) = sum over buckets j of z_j(x) log(p_j / q_j)                        (Section 3.1)
    z_j(x)   = n-grams of x, single words and pairs, that a hash puts into bucket j of B
    q_j      = (c_j + a) / (sum c + a B)             the pool's bag of n-grams, Laplace-smoothed
    p_j      = (t_j + m u_j) / (sum t + m)           the target's, u_j = q_j or 1/B, m = a B or auto
    key(x)   = log w(x) + g(x),   g ~ Gumbel(0, 1)   the k largest keys are k draws without
                                                     replacement with probability prop. to w

Source: Xie, Santurkar, Ma and Liang, "Data Selection for Language Models via Importance
Resampling", NeurIPS 2023, arXiv:2302.03169.

Departures: the paper divides counts by their sum, and the authors' code adds 1e-8 to each share
inside the logarithm, which costs an example about ten nats for every n-gram that a small target
happens to lack; here both models are smoothed, the target's towards the pool (`prior: uniform` is
plain Laplace) by as many counts as make its own likeliest: those of m for which the target's counts
t have the largest probability if p were drawn from a Dirichlet distribution of mean u and weight m.
The hash is xxh3 in place of SHA-256, words are those of Unicode, and g(x) comes
from a hash of the run's seed and the example's key, not from a stream of draws.
Cost: two readings of the texts, no model; B counts for each partition.
Shapes: N examples, M n-grams, B buckets.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from curate.config import STRICT
from curate.errors import ConfigError

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_POOL_SMOOTHING = 0.3
_STRONGEST = 1e8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Models(NamedTuple):
    """What the two bags of n-grams say of each bucket."""

    log_ratios: Floats
    """(B,) log p / q; finite."""
    strength: float
    """The header's m."""


def compare(
    target: Counts,
    pool: Counts,
    *,
    smoothing: float | Literal["auto"] = "auto",
    prior: Literal["pool", "uniform"] = "pool",
) -> Models:
    """Log ratio of the target's probability of each bucket and the pool's.

    Args:
        target: (B,) counts of its n-grams, not all 0.
        pool: (B,) counts.
        smoothing: the header's a, above 0; auto smoothes the pool by 0.3.
        prior: towards what the target's model is drawn.
    """
    own = _POOL_SMOOTHING if smoothing == "auto" else smoothing
    pooled = (pool + own) / (pool.sum() + own * len(pool))
    mean = pooled if prior == "pool" else np.full(len(pool), 1 / len(pool))
    strength = likeliest_strength(target, mean) if smoothing == "auto" else own * len(pool)
    aimed = (target + strength * mean) / (target.sum() + strength)
    return Models(np.log(aimed) - np.log(pooled), strength)


def likeliest_strength(counts: Counts, mean: Floats) -> float:
    """Weight m of a Dirichlet distribution of the given mean under which counts are likeliest.

        sum_j [ln G(t_j + m u_j) - ln G(m u_j)] + ln G(m) - ln G(m + sum t),   G the gamma function

    Args:
        counts: (B,) t, not all 0.
        mean: (B,) u, above 0, summing to 1.

    Returns:
        From 1 to 10^8, which counts as like the mean reach.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import gammaln

    there = counts > 0
    own, share, total = counts[there], mean[there], counts.sum()

    def loss(log_weight: float) -> float:
        weight = np.exp(log_weight)
        each = gammaln(own + weight * share) - gammaln(weight * share)
        return -float(each.sum() + gammaln(weight) - gammaln(weight + total))

    # A grid first: nothing promises that there is but one maximum.
    grid = np.linspace(0, np.log(_STRONGEST), 60)
    best = int(np.argmin([loss(value) for value in grid]))
    low, high = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
    found: Any = minimize_scalar(loss, bounds=(low, high), method="bounded")
    return float(np.exp(found.x))


def log_weights(texts: Counts, buckets: Counts, ratios: Floats, *, num_texts: int) -> Floats:
    """(N,) log importance weights; 0 for a text without n-grams.

    Args:
        texts: (M,) in [0, N), the text of each n-gram.
        buckets: (M,) in [0, B).
        ratios: (B,) of `compare`.
        num_texts: N.
    """
    found = np.bincount(texts, weights=ratios[buckets], minlength=num_texts)
    return found.astype(np.float64)  # of no n-grams at all it is integers


def gumbel(rows: Counts, *, stream: int) -> Floats:
    """(N,) standard Gumbel draws, each from the stream and a row number alone.

    Args:
        rows: (N,) numbers of rows in their file.
        stream: 64 bits that stand for seed and file.
    """
    mixed = np.uint64(stream) + (rows.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    # The middle of one of 2^52 stretches: neither 0 nor 1, whose logarithms would not be finite.
    uniform = ((mixed >> np.uint64(12)).astype(np.float64) + 0.5) / 2**52
    return -np.log(-np.log(uniform))


@dataclass(frozen=True, slots=True, kw_only=True)
class DSIR:
    """Importance weights of the pool's examples for `target`, from hashed n-grams."""

    __pydantic_config__: ClassVar = STRICT

    buckets: int = 10_000
    """Into which n-grams are hashed, the paper's m."""
    ngrams: tuple[int, int] = (1, 2)
    """Shortest and longest run of words or characters."""
    words: Literal["words", "characters"] = "words"
    """What a run consists of; characters are for languages without spaces."""
    smoothing: float | Literal["auto"] = "auto"
    """Counts added to each bucket of both models, on average; auto: as many to the target's as its
    counts make likeliest, and 0.3 to the pool's."""
    prior: Literal["pool", "uniform"] = "pool"
    """How those of the target are spread: as the pool is, or evenly. With an even spread a small
    target makes all that is rare in the pool look wanted."""

    needs: ClassVar[frozenset[str]] = frozenset(
        {"dsir_log_weight", "dsir_key", "dsir_per_ngram", "dsir_num_ngrams"}
    )
    columns: ClassVar[Mapping[str, str]] = {
        "dsir": "log importance weight, nats, any number; high is likelier in the target; grows"
        " with the length",
        "dsir_key": "that plus a Gumbel draw: the largest keys are a draw without replacement in"
        " proportion to the weights",
        "dsir_per_ngram": "log weight per n-gram, nats; free of the length; high is likelier in the"
        " target",
        "dsir_num_ngrams": "n-grams that were counted",
    }

    def __post_init__(self) -> None:
        if not 1 <= self.buckets < 2**31:
            raise ConfigError(f"buckets is {self.buckets}", fix="set it to 10_000")
        if not 1 <= self.ngrams[0] <= self.ngrams[1] <= 20:
            raise ConfigError(f"ngrams is {list(self.ngrams)}", fix="write [1, 2]")
        if self.smoothing != "auto" and not 0 < self.smoothing < float("inf"):
            raise ConfigError(
                f"smoothing is {self.smoothing}", fix="set it above 0, such as 0.3, or to auto"
            )

    def score(self, quantities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        others = ("dsir_key", "dsir_per_ngram", "dsir_num_ngrams")
        return {
            "dsir": quantities["dsir_log_weight"],
            **{name: quantities[name] for name in others},
        }
