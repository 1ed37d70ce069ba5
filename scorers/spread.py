"""Spread: an expensive score measured on a core set and given to all by what examples look like.

    s_j = sum_r kappa_jr s_r / sum_r kappa_jr,   kappa_jr = exp(cos(h_j, h_r) / tau)

over the K examples r of the core set that lie nearest to j; or a linear map from the vector h_j to
the score, where that does better in cross-validation. Examples of the core set keep what was
measured.

Source: the three stages core set, scores, nearest neighbour are those of CW-ERM: Jafari, Zhang,
Zhang and Liu, "The Power of Few: Accelerating and Enhancing Data Reweighting with Coreset
Selection", 2024, arXiv:2403.12166, where K = 1, the score is a learned weight, and the core set
lies at the median distance from the mean of each class.

Departures: any scorer; several neighbours; the linear map; a gate, since nothing else tells a
spread score from noise: 5-fold cross-validation in the core set, and a refusal below
`min_rank_correlation` or what chance gives. The core set is drawn evenly over clusters and lengths,
as that at the median distance has no outliers and no wrong labels in it; strata by loss would cost
a pass over all examples.
Cost: the scorer's own on the core set, and one search of the core set for every example.
Shapes: N examples.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from curate.config import STRICT
from curate.errors import ConfigError
from scorers.catalog import build_scorer
from scorers.protocol import Scorer

MEASURED = "spread_measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A score measured on a core set and spread to all other examples."""

    __pydantic_config__: ClassVar = STRICT

    scorer: str | dict[str, dict[str, Any]] = "grand"
    """What is measured: a name, or a name with its options: `{grand: {parameters: head}}`."""
    core: int | float = 0.01
    """The core set: a share of all examples, or how many."""
    choose: Literal["stratified", "uniform", "median"] = "stratified"
    """stratified: evenly over clusters and quintiles of length; uniform; median: those at the
    median distance from the mean of their class or cluster, as published, without outliers."""
    clusters: int | None = None
    """Of `stratified` and, where there are no labels, `median`: how many; by default one for
    every 20 examples of the core set, at most 256."""
    neighbours: int = 8
    """K: how many examples of the core set a score is made of."""
    temperature: float = 0.05
    """tau: by how much a nearer neighbour counts more; the smaller, the more."""
    method: Literal["auto", "neighbours", "ridge"] = "auto"
    """neighbours, ridge (a linear map from the vector), or what does better in the core set."""
    vectors: str | None = None
    """The representation, of those under `embed`; by default the only one."""
    min_rank_correlation: float = 0.2
    """Refuse to spread a score whose rank correlation in cross-validation is below this."""
    force: bool = False
    """Spread it all the same."""
    seed: int = 0
    """Of the core set, beside the run's seed."""

    def __post_init__(self) -> None:
        if isinstance(self.scorer, dict) and len(self.scorer) != 1:
            raise ConfigError(
                f"spread.scorer names {len(self.scorer)} scorers, not one",
                fix="write one name, with its options: {grand: {parameters: head}}",
            )
        if self.name in ("spread", "external"):
            raise ConfigError(
                f"spread.scorer is {self.name}, which measures nothing itself",
                fix="name a scorer that needs a model, such as grand",
            )
        if self.core <= 0 or (self.core > 1 and self.core != int(self.core)):
            raise ConfigError(
                f"spread.core is {self.core:g}",
                fix="set it to a share such as 0.01, or to a number of examples such as 2000",
            )
        for option in ("neighbours", "temperature", "clusters"):
            value = getattr(self, option)
            if value is not None and value <= 0:
                raise ConfigError(
                    f"spread.{option} is {value}, not above 0", fix=f"raise spread.{option}"
                )
        if not -1 <= self.min_rank_correlation <= 1:
            raise ConfigError(
                f"spread.min_rank_correlation is {self.min_rank_correlation}, outside [-1, 1]",
                fix="set it to 0.2, or set force: true",
            )

    @property
    def name(self) -> str:
        """Of the scorer that measures."""
        return self.scorer if isinstance(self.scorer, str) else next(iter(self.scorer))

    @property
    def options(self) -> dict[str, Any]:
        """Of the scorer that measures."""
        return {} if isinstance(self.scorer, str) else dict(self.scorer[self.name])

    @property
    def inner(self) -> Scorer:
        """The scorer that measures.

        Raises:
            ConfigError: there is none of that name, or an option is wrong.
        """
        return build_scorer(self.name, self.options)

    @property
    def columns(self) -> Mapping[str, str]:
        """Those of the scorer that measures, and one more."""
        return {**self.inner.columns, MEASURED: "1 in the core set, 0 where spread from it"}

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(self.columns)

    def size(self, num: int) -> int:
        """Examples in the core set.

        Args:
            num: how many examples can be in it.
        """
        if self.core > 1 or isinstance(self.core, int):
            return int(self.core)
        return round(self.core * num)

    def score(self, quantities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: quantities[name] for name in self.columns}
