"""Settings of `curate plan`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from curate.config import STRICT
from curate.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """How much is kept; one of the four is set."""

    __pydantic_config__: ClassVar = STRICT

    share: float | None = None
    """Share of the examples; what a bare number under `plan.keep` means."""
    examples: int | None = None
    """Number of examples, copies counted."""
    tokens: float | None = None
    """Number of tokens, copies counted; the plan stays at or below it."""
    token_share: float | None = None
    """Share of the tokens."""

    def __post_init__(self) -> None:
        given = [
            v for v in (self.share, self.examples, self.tokens, self.token_share) if v is not None
        ]
        if len(given) != 1 or given[0] <= 0:
            raise ConfigError(
                "keep needs one positive share, examples, tokens or token_share",
                fix="write keep: 0.5, or keep: {tokens: 2e9}",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Loss weights of the kept examples, from a score."""

    __pydantic_config__: ClassVar = STRICT

    score: str
    """A column or an expression; its value, where positive, is the weight before clipping."""
    clip: tuple[float, float] = (0.1, 10.0)
    """Smallest and largest weight, relative to the mean, before the mean is set to 1."""

    def __post_init__(self) -> None:
        low, high = self.clip
        if not 0 <= low <= 1 <= high:
            raise ConfigError(
                f"clip is {list(self.clip)}, which does not hold the mean weight, 1",
                fix="set plan.weights.clip to limits such as [0.1, 10]",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which examples stay, how often, and how much each counts."""

    __pydantic_config__: ClassVar = STRICT

    drop: str | None = None
    """Examples for which this holds are left out before anything else, as if they were not there:
    "duplicate_keep == 0", or "loss > 8 or num_chars < 20". A missing value drops nothing."""
    score: str | None = None
    """A score column, or an expression over columns: "0.5*rank(el2n) + 0.5*rank(loss)". Without
    it the choice is random."""
    keep: float | Keep = 1.0
    """Share of the examples, or {examples: N}, {tokens: N}, {token_share: S}."""
    order: Literal["hardest", "easiest", "middle"] = "hardest"
    """Which end of the score is wanted: high, low, or the middle."""
    drop_first: float = 0.0
    """Share of each group, at the wanted end, that is left out first: mislabelled and unlearnable
    examples."""
    draw: Literal["top", "sample", "k_centre", "facility_location"] = "top"
    """Take the first in order; draw without replacement with probability exp(z / temperature), z
    the score standardised within its group; or choose for diversity, by vectors: each next example
    is the one farthest from all before it, or the one that stands for most others."""
    temperature: float = 1.0
    """Of the draw: near 0 it is the top, large it is random."""
    candidates: float = 3.0
    """Of k_centre and facility_location with a score: they choose among the best of each group, so
    many times as much as is kept of it. Without a score they choose among all."""
    vectors: str | None = None
    """Of k_centre and facility_location: the representation, a name under `embed`; by default the
    only one."""
    within: Literal["domain", "label", "source", "all"] = "domain"
    """Groups inside which examples compete."""
    max_repeats: float = 4.0
    """Most copies of an example that a mixture may ask for."""
    weights: Weights | None = None
    """Loss weights; without them every kept example has weight 1."""
    min_effective_share: float = 0.1
    """Plans whose effective sample size falls below this share of the kept rows are refused."""
    force: bool = False
    """Write such a plan all the same."""
    tokenizer: str | None = None
    """Whose tokens are counted: a folder or hub id, the trainer's; by default the scorer's."""

    def __post_init__(self) -> None:
        if not 0 <= self.drop_first < 1:
            raise ConfigError(
                f"drop_first is {self.drop_first}, outside [0, 1)", fix="set a share such as 0.05"
            )
        if isinstance(self.keep, float | int) and not 0 < self.keep <= 1:
            raise ConfigError(
                f"keep is {self.keep}, outside (0, 1]",
                fix="write a share, or {examples: N} or {tokens: N}",
            )
        if self.drop_first and (self.score is None or self.order == "middle"):
            raise ConfigError(
                "drop_first leaves out the hardest or the easiest, but "
                + ("there is no score" if self.score is None else "the order is middle"),
                fix="remove plan.drop_first, or set plan.score and an order with an end",
            )
        if not (self.temperature > 0 and 1 <= self.max_repeats <= 65_535):
            raise ConfigError(
                "temperature must be above 0 and max_repeats from 1 to 65,535",
                fix="remove them to use the defaults",
            )
        if self.candidates < 1:
            raise ConfigError(
                f"candidates is {self.candidates}, fewer than what is kept",
                fix="set plan.candidates to 1 or more, such as 3",
            )
        if self.is_diverse and self.order == "middle":
            raise ConfigError(
                f"draw {self.draw} chooses among the best by score, and the order is middle",
                fix="set plan.order to hardest or easiest",
            )

    @property
    def is_diverse(self) -> bool:
        """Whether the draw looks at how examples differ from each other."""
        return self.draw in ("k_centre", "facility_location")

    @property
    def kept(self) -> Keep:
        """`keep` in its long form."""
        return self.keep if isinstance(self.keep, Keep) else Keep(share=self.keep)
