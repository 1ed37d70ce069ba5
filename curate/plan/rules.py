"""A finished plan as rules: for each group the cuts that decide what happens to a row.

Shapes: N training rows of a partition, G groups, P phases.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from curate.errors import CurateError
from curate.plan.expression import Values
from curate.plan.groups import NO_CANDIDATE, PLACE, Batch, Group, Grouping, Groups
from curate.plan.positions import Bits, gumbel, ordered_bits
from curate.plan.scoring import Moments, Scoring
from curate.plan.select import is_before
from curate.plan.settings import Plan
from curate.plan.weights import relative_weights

REASONS = (
    "kept",
    "held_out",
    "dropped",
    "no_share",
    "unscored",
    "dropped_extreme",
    "score",
    "draw",
)
"""Why a row is in the plan or not, a closed list:

kept             it is in
held_out         it belongs to the evaluation
dropped          the condition `drop` holds for it
no_share         the mixture gives its domain nothing
unscored         it has no score, or no vector where the draw needs one
dropped_extreme  it is at the end that `drop_first` leaves out
score            others of its group came first by score
draw             others of its group were drawn
"""

_CODES = {reason: code for code, reason in enumerate(REASONS)}


@dataclass(frozen=True, slots=True)
class Window:
    """How often rows are used by the end of a phase."""

    full: int
    """Times that every row is used."""
    low: int
    """Rows from this position on ..."""
    high: int
    """... and in front of this one are used once more."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What happens in one group, and to how many rows."""

    group: Group
    drop: int
    """Rows in front of this position, by score, are dropped."""
    windows: tuple[Window, ...]
    """(P,) one for each phase."""
    share: float
    """Share of all rows or tokens that the group was to get; 0 is `no_share`."""
    asked: int
    """Rows or tokens that it gets, copies counted, once others' surplus is shared out."""
    rows: int
    """Training rows."""
    tokens: int
    eligible_rows: int
    """Those with a score that were not dropped."""
    eligible_tokens: int
    kept_rows: int
    kept_copies: int
    kept_tokens: int
    """Copies counted."""


@dataclass(frozen=True, slots=True)
class Weighing:
    """How a value becomes a weight."""

    scoring: Scoring
    mean: float
    """Mean of the values over the kept copies."""
    clipped_mean: float
    """Mean of the clipped weights, which is set to 1."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """A plan: applied to a row, it says keep, copies, weight and reason."""

    settings: Plan
    seed: int
    label: str
    """Names the random draws: plans of different labels draw independently."""
    grouping: Grouping
    drop: Scoring | None
    """The condition under which rows are left out first."""
    scoring: Scoring | None
    moments: Moments | None
    """(G,) of the scores that take part in a draw."""
    rules: tuple[Rule, ...]
    weighing: Weighing | None
    unit: Literal["rows", "tokens"]
    asked: int
    """Rows or tokens that were asked for, copies counted."""
    phases: tuple[float, ...]
    """(P,) share of the token budget in each phase."""
    domains: dict[str, tuple[int, int]]
    """Domain -> training rows and tokens that there are, without what was dropped."""
    weights: dict[str, float] | None
    """Domain -> share of the tokens that the mixture asks for."""
    effective_size: float
    """Kish's, of weight times copies."""

    @property
    def kept_tokens(self) -> int:
        """Tokens of the plan, copies counted."""
        return sum(rule.kept_tokens for rule in self.rules)

    @property
    def kept_copies(self) -> int:
        return sum(rule.kept_copies for rule in self.rules)

    @property
    def kept_rows(self) -> int:
        return sum(rule.kept_rows for rule in self.rules)

    @property
    def placed(self) -> int:
        """Rows or tokens that found a place under the limits; below `asked` is a shortfall."""
        return sum(rule.asked for rule in self.rules)


@dataclass(frozen=True, slots=True)
class Order:
    """Positions of rows in their groups."""

    settings: Plan
    label: str
    scoring: Scoring | None

    def scores(self, batch: Batch) -> Values | None:
        """(N,) NaN where unscored; None where the plan goes without a score."""
        return None if self.scoring is None else self.scoring.values(batch)

    def by_score(self, scores: Values | None, hashes: Bits) -> Bits:
        """(N,) keys in order of score, the wanted end first; all alike without a score."""
        if scores is None:
            return np.zeros(len(hashes), np.uint64)
        values = np.nan_to_num(scores, nan=0.0)
        return ordered_bits(-values if self.settings.order == "hardest" else values)

    def places(self, batch: Batch) -> Values | None:
        """(N,) places in a draw for diversity, NaN without a vector; None in other draws."""
        return batch.column(PLACE) if self.settings.is_diverse else None

    def by_place(self, scores: Values | None, places: Values, hashes: Bits) -> Bits:
        """(N,) keys in the order of their places, and behind them those without one by score."""
        behind = self.by_score(scores, hashes) >> np.uint64(1) | np.uint64(1 << 63)
        placed = np.maximum(np.nan_to_num(places), 0).astype(np.uint64)
        return np.where(places >= 0, placed, behind)

    def by_draw(self, scores: Values, hashes: Bits, z: Values) -> Bits:
        """(N,) keys in the order in which rows are drawn."""
        wanted = {"hardest": z, "easiest": -z, "middle": -np.abs(z)}[self.settings.order]
        wanted = np.nan_to_num(wanted, nan=0.0)
        return ordered_bits(-(wanted / self.settings.temperature + gumbel(hashes)))

    @property
    def is_drawn(self) -> bool:
        """Whether the choice falls by a draw that the score only tilts."""
        return self.settings.draw == "sample" and self.scoring is not None

    @property
    def is_centred(self) -> bool:
        """Whether the rows wanted lie around the centre of the order."""
        settings = self.settings
        return settings.order == "middle" and self.scoring is not None and not self.is_drawn


@dataclass(frozen=True, slots=True)
class Decision:
    """What a plan says of the training rows of a partition."""

    copies: NDArray[np.int64]
    """(N,)"""
    by_phase: NDArray[np.int64]
    """(N, P)"""
    reason: NDArray[np.int8]
    """(N,) index into `REASONS`."""


class _Reached(NamedTuple):
    """How far a plan comes with rows that it does not drop."""

    group: NDArray[np.int64]
    """(N,) index into the rules."""
    copies: NDArray[np.int64]
    """(N, P) by the end of each phase."""
    scored: NDArray[np.bool_]
    """(N,) whether they have all that the order needs."""
    dropped: NDArray[np.bool_]
    """(N,) whether they are at the end that `drop_first` leaves out."""
    drawn: NDArray[np.bool_] | bool
    """(N,) whether a draw, and not the score, decides on them."""


def decide(batch: Batch, plan: Thresholds) -> Decision:
    """What happens to each training row."""
    if plan.drop is None:
        return _decide(batch, plan)
    rest = ~plan.drop.holds(batch)
    inner = _decide(batch.take(rest), plan)
    found = Decision(
        np.zeros(len(rest), np.int64),
        np.zeros((len(rest), len(plan.phases)), np.int64),
        np.full(len(rest), _CODES["dropped"], np.int8),
    )
    found.copies[rest], found.by_phase[rest] = inner.copies, inner.by_phase
    found.reason[rest] = inner.reason
    return found


def copies_of(batch: Batch, plan: Thresholds) -> NDArray[np.int64]:
    """(N,) how often each training row is used: of a decision, what most ask for."""
    if plan.drop is None:
        return _reach(batch, plan).copies[:, -1]
    rest = ~plan.drop.holds(batch)
    found = np.zeros(len(rest), np.int64)
    found[rest] = _reach(batch.take(rest), plan).copies[:, -1]
    return found


def _decide(batch: Batch, plan: Thresholds) -> Decision:
    group, copies, scored, dropped, drawn = _reach(batch, plan)
    no_share = np.array([rule.share <= 0 for rule in plan.rules], np.bool_)[group]
    reason = np.where(drawn, np.int8(_CODES["draw"]), np.int8(_CODES["score"]))
    # From the weakest to the strongest.
    for name, holds in (("dropped_extreme", dropped), ("unscored", ~scored),
                        ("no_share", no_share), ("kept", copies[:, -1] > 0)):  # fmt: skip
        reason = np.where(holds, np.int8(_CODES[name]), reason)
    return Decision(copies[:, -1], np.diff(copies, axis=1, prepend=0), reason)


def _reach(batch: Batch, plan: Thresholds) -> _Reached:
    groups = Groups(plan.grouping, [rule.group for rule in plan.rules])
    group = groups.of(batch)
    if len(groups) > len(plan.rules):
        raise CurateError(
            f"the plan does not know the group {groups.groups[-1]}",
            fix="run `curate plan` again: the data have changed since",
        )
    order = Order(plan.settings, plan.label, plan.scoring)
    hashes = batch.hashes(plan.label)
    scores = order.scores(batch)
    key = order.by_score(scores, hashes)
    scored = np.ones(len(group), np.bool_) if scores is None else ~np.isnan(scores)
    dropped = is_before(key, hashes, [rule.drop for rule in plan.rules], group)
    if scores is not None and plan.moments is not None:
        key = order.by_draw(scores, hashes, plan.moments.of(scores, group))
    places = order.places(batch)
    if places is not None:
        scored &= ~np.isnan(places)
        key = order.by_place(scores, places, hashes)
    eligible = scored & ~dropped
    copies = np.zeros((len(group), len(plan.phases)), np.int64)
    for phase in range(len(plan.phases)):
        windows = [rule.windows[phase] for rule in plan.rules]
        copies[:, phase] = eligible * copies_by_windows(windows, group, key, hashes)
    drawn: NDArray[np.bool_] | bool = scores is None or order.is_drawn
    if places is not None and scores is not None:
        drawn = places != NO_CANDIDATE
    return _Reached(group, copies, scored, dropped, drawn)


def copies_by_windows(
    windows: Sequence[Window], group: NDArray[np.int64], key: Bits, tie: Bits
) -> NDArray[np.int64]:
    """(N,) times that each row is used."""
    full = np.array([window.full for window in windows], np.int64)
    high = is_before(key, tie, [window.high for window in windows], group)
    low = is_before(key, tie, [window.low for window in windows], group)
    return full[group] + (high & ~low)


def weights_of(batch: Batch, copies: NDArray[np.int64], plan: Thresholds) -> Values:
    """(N,) loss weights: mean 1 over kept copies, 0 for rows that are not kept.

    Args:
        batch: (N,) training rows.
        copies: (N,) how often each is used.
        plan: the plan.
    """
    if plan.weighing is None or plan.settings.weights is None:
        return (copies > 0).astype(np.float64)
    values = plan.weighing.scoring.values(batch)
    clip = plan.settings.weights.clip
    weight = relative_weights(values, mean=plan.weighing.mean, clip=clip)
    return np.where(copies > 0, weight / plan.weighing.clipped_mean, 0.0)
