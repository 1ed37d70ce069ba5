"""GIO: which examples, added to a selection, make it look most like the target.

Greedily lowers an estimate of KL(p_X || p_W) between target X (n points) and selection W (m points)
in d dimensions. With rho_k(i) the distance of x_i to its k-th neighbour in X without itself, and
nu_l(i) that to its l-th neighbour in W:

    KL_knn = (d/n) sum_i [ln nu_l(i) - ln rho_k(i)] + ln(k m / (l (n - 1)))
    KL_avg = mean over l = 1..m of KL_knn, which is
             mean_w phi(w) - (d/n) sum_i ln rho_k(i) + ln(k m / (n - 1)) - ln(m!)/m
             with phi(w) = (d/n) sum_i ln ||x_i - w||

The pool is quantised by k-means; the centroids are the candidates, and each that is chosen stands
for the examples of its cluster.

Source: Everaert and Potts, "GIO: Gradient Information Optimization for Training Dataset Selection",
ICLR 2024, arXiv:2306.11670.

Departures: the authors' code minimises KL_avg, to which each point adds the same whatever is
selected already: it fills one mode of the target before it touches another. `knn` with l = 1 is the
default here; its gain is submodular, so that a lazy greedy search over the candidates is exact and
no gradient is needed. `estimator: avg` and `optimizer: gradient` are there for comparison. The
start is a given source, or one point of the pool, or several; noise far from the target, the
authors' default, makes the first additions arbitrary. The target is quantised only above 10,000
points. Vectors are projected to 32 dimensions first, since d multiplies every logarithm. Of a
cluster not all examples are taken where it would have more than 5 times its share of the target.
Cost: one pass of the pool through PCA, k-means (25 steps over 256 rows a centroid) and a search for
the nearest target point; then n (target) x C (candidates) distances, and about n for each candidate
looked at again.
Shapes: N examples of a partition.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from curate.config import STRICT
from curate.errors import ConfigError
from curate.plan.settings import Keep
from scorers.gio_gradient import Descent


@dataclass(frozen=True, slots=True, kw_only=True)
class GIO:
    """The order in which GIO takes examples, and what it took them for."""

    __pydantic_config__: ClassVar = STRICT

    vectors: str | None = None
    """Name of the representation, under `embed`; needed where there are several."""
    dims: int | None = 32
    """Principal components of target and pool that are kept; null for the vectors as they are."""
    mode: Literal["centroids", "points"] = "centroids"
    """Candidates: centroids of the pool, each with all examples of its cluster, or the examples."""
    clusters: int = 1500
    """Centroids of the pool; fewer where it has less than 10 examples for each."""
    max_target: int = 10_000
    """Target points above which `clusters` centroids take their place."""
    estimator: Literal["knn", "avg"] = "knn"
    """`knn` covers the target; `avg` is the authors' and fills one mode first."""
    k: int = 5
    """Neighbour on the target's side; changes the reported divergence only, never the choice."""
    own_k: int = 1
    """The l-th neighbour on the selection's side, of `knn`; 1 is searched lazily."""
    optimizer: Literal["exact", "gradient"] = "exact"
    """`gradient` is the published search."""
    descent: Descent = field(default_factory=Descent)
    """Of `gradient`."""
    start: Literal["point", "random", "uniform"] = "point"
    """What is selected at first, without `start_source`: one random example of the pool, which is
    not chosen by that; `start_size` of them, which are; or as many even draws from the box that
    holds target and pool."""
    start_source: str | None = None
    """A source that is selected already: its examples come first and are no candidates."""
    start_size: int = 20
    """Points of `random` and `uniform`."""
    patience: int = 1
    """Additions in a row that do not lower the divergence before the search ends."""
    max_steps: int | None = None
    """Most additions."""
    budget: Keep | None = None
    """{examples: N}, {tokens: N}, {share: S} or {token_share: S} of the training rows, S at most 1:
    no more are chosen."""
    max_share: float | None = 5.0
    """A cluster gives at most so many times its share of the target, and no weight is larger; null
    for all of it, as the authors do."""
    copies: Literal["discard", "keep"] = "discard"
    """Of `points`: whether the distance of an example to its own copy in the target counts."""
    seed: int = 0
    """Of k-means and start, beside the run's."""

    columns: ClassVar[Mapping[str, str]] = {
        "gio": "place in the order of choice, 0 and up, low is first; null is not chosen",
        "gio_step": "addition with which it was chosen, from 1; 0 is the start",
        "gio_kl": "divergence from the target after that addition, nats; falls",
        "gio_weight": "weight that gives its cluster the target's share, 0 to max_share",
        "gio_cluster": "number of its cluster",
        "gio_distance": "distance to the nearest target point, 0 and up",
    }

    def __post_init__(self) -> None:
        for name in ("dims", "clusters", "max_target", "k", "own_k", "start_size", "patience",
                     "max_steps"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"gio: {name} is {value}", fix=f"set gio.{name} to 1 or more")
        if self.max_share is not None and self.max_share < 1:
            raise ConfigError(
                f"gio: max_share is {self.max_share}, below 1", fix="set it to 5, or to null"
            )
        for name in ("share", "token_share"):
            share = None if self.budget is None else getattr(self.budget, name)
            if share is not None and not 0 < share <= 1:
                raise ConfigError(
                    f"gio: budget.{name} is {share}, and an example is chosen once at most",
                    fix="set it above 0 and to 1 at most, or name a number of examples or tokens",
                )
        if self.own_k > 1 and (self.estimator == "avg" or self.optimizer == "gradient"):
            raise ConfigError(
                "gio: own_k belongs to estimator knn and optimizer exact", fix="remove own_k"
            )
        if self.own_k > 1 and self.start == "point" and self.start_source is None:
            raise ConfigError(
                f"gio: the {self.own_k}th neighbour in a selection of one point was asked for",
                fix="set start: random, or own_k: 1",
            )
        if self.descent.iterations < 1 or self.descent.lr <= 0:
            raise ConfigError("gio: descent needs iterations and an lr above 0", fix="remove them")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(name.removeprefix("gio_") for name in self.columns)

    def score(self, quantities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: quantities[name.removeprefix("gio_")] for name in self.columns}
