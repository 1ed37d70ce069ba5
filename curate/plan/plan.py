"""The planner: from settings, a mixture and tables to thresholds, and from these to the plan table.

Nothing here grows with the number of rows, but for what `rank` needs: the data are gone through
partition by partition, a few times.

Shapes: G groups, P phases.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from curate.data.example import KEY, TRAIN
from curate.errors import InputError
from curate.plan.batches import Tables
from curate.plan.candidates import Candidates, candidate_passes
from curate.plan.expression import INDEX_COLUMNS, Expression, parse_expression
from curate.plan.groups import PLACE, Batch, Cells, Grouping, Groups, batch_of
from curate.plan.mixture import Mixture
from curate.plan.passes import Survey, weigh_passes, window_passes
from curate.plan.realise import Demand, Supply, demand
from curate.plan.rules import REASONS, Decision, Order, Rule, Thresholds, decide, weights_of
from curate.plan.scoring import Passes, Scoring, scoring_passes, without_dropped
from curate.plan.settings import Plan
from curate.plan.weights import WeightSums, check_effective_share, effective_size

__all__ = [
    "REASONS",
    "Arm",
    "Tables",
    "apply_plan",
    "columns_read",
    "find_candidates",
    "make_plan",
    "make_plans",
    "run_together",
]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Arm:
    """One plan of several that are made in the same passes."""

    settings: Plan
    mixture: Mixture | None = None
    repeat: bool = False
    """Whether examples may be used again without a mixture, up to `max_repeats`."""
    label: str | None = None
    """Plans of one label draw alike, others independently; by default the arm's name."""
    scoring: Scoring | None = None
    """Of another plan, to be used in place of one's own ranks and z-scores."""


def make_plan(
    tables: Tables,
    settings: Plan,
    *,
    seed: int,
    mixture: Mixture | None = None,
    repeat: bool = False,
    label: str = "plan",
) -> Thresholds:
    """The plan that the settings ask for.

    Args:
        tables: the examples, their lengths and scores.
        settings: the rules.
        seed: of the draws.
        mixture: shares of the domains; without one each group keeps the same share.
        repeat: allow copies without a mixture, where more is asked for than there is.
        label: plans of one seed and label draw alike, others independently.

    Raises:
        ConfigError: the score is no expression over columns that were scored.
        InputError: there are no training examples, or no scores.
        CurateError: the mixture lacks a domain, or a few examples carry all the weight.
    """
    arm = Arm(settings, mixture, repeat, label)
    return make_plans(tables, {"plan": arm}, seed=seed)["plan"]


def make_plans(tables: Tables, arms: Mapping[str, Arm], *, seed: int) -> dict[str, Thresholds]:
    """Several plans, made in the same passes over the data; see `make_plan`.

    Args:
        tables: the examples, their lengths and scores.
        arms: name -> what is asked for.
        seed: of the draws.
    """
    parsed = {name: _Parsed.of(arm.settings, tables.scorers) for name, arm in arms.items()}
    columns = sorted({name for each in parsed.values() for name in each.columns})
    with_labels = any(arm.settings.within == "label" for arm in arms.values())
    batches = tables.batches(columns, with_labels=with_labels, seed=seed)
    computations = {
        name: _plan_passes(arm, parsed[name], arm.label or name, seed) for name, arm in arms.items()
    }
    return run_together(computations, lambda: batches)


def find_candidates(
    tables: Tables, settings: Plan, *, seed: int, mixture: Mixture | None = None
) -> Candidates:
    """Among what a draw for diversity chooses, and how far it goes; see `make_plan`.

    Args:
        tables: the examples; of the column `PLACE` only what is null is read.
        settings: the rules.
        seed: of the draws.
        mixture: shares of the domains.
    """
    arm, parsed = Arm(settings, mixture), _Parsed.of(settings, tables.scorers)

    def passes() -> Passes[Candidates]:
        drop = yield from _drop_passes(arm, parsed)
        surveyed = _survey_passes(arm, parsed, "plan", drop)
        survey, supplies, wanted = yield from without_dropped(surveyed, drop)
        return (yield from without_dropped(candidate_passes(survey, supplies, wanted, drop), drop))

    columns = sorted(set(parsed.columns))
    batches = tables.batches(columns, with_labels=settings.within == "label", seed=seed)
    return run_together({"candidates": passes()}, lambda: batches)["candidates"]


def run_together(
    computations: Mapping[str, Passes[T]], batches: Callable[[], Iterable[Batch]]
) -> dict[str, T]:
    """Results of computations that need several passes; each pass serves all of them."""
    results: dict[str, T] = {}
    waiting: dict[str, Callable[[Batch], None]] = {}
    due = list(computations)
    while True:
        for name in due:
            try:
                waiting[name] = next(computations[name])
            except StopIteration as stop:
                results[name] = stop.value
                waiting.pop(name, None)
        if not waiting:
            return {name: results[name] for name in computations}
        due = list(waiting)
        for batch in batches():
            for add in waiting.values():
                add(batch)


class Applied(NamedTuple):
    """A plan applied to one partition."""

    table: pl.DataFrame
    """The rows in their order: the key, keep, weight, copies, reason, and, where the mixture has
    several phases, `phases`: the copies of each."""
    domains: tuple[str, ...]
    """Of its training rows, sorted."""
    domain: NDArray[np.int64]
    """(N,) index into `domains` of each training row."""
    copies: dict[int, NDArray[np.int64]]
    """Phase -> (N,) copies of each training row; phase 0 where there are no phases."""


def apply_plan(frame: pl.DataFrame, plan: Thresholds) -> Applied:
    """What a plan says of one partition.

    Args:
        frame: columns of `curate.plan.groups.INDEX` and the score columns that the plan reads.
        plan: from `make_plan`.
    """
    batch = batch_of(frame, Cells(plan.grouping.within == "label"), seed=plan.seed)
    decision = decide(batch, plan)
    names = [cell.domain for cell in batch.cells.cells]
    domains, places = np.unique(names, return_inverse=True)
    phases = decision.by_phase.T
    return Applied(
        table=_table(frame, batch, decision, plan),
        domains=tuple(domains.tolist()),
        domain=places[batch.cell].astype(np.int64) if names else np.zeros(0, np.int64),
        copies=dict(enumerate(phases, start=int(len(phases) > 1))),
    )


def _table(frame: pl.DataFrame, batch: Batch, decision: Decision, plan: Thresholds) -> pl.DataFrame:
    training = (frame["split"] == TRAIN).to_numpy()
    copies = np.zeros(frame.height, np.uint32)
    copies[training] = decision.copies
    weight = np.zeros(frame.height, np.float32)
    weight[training] = weights_of(batch, decision.copies, plan)
    reason = np.full(frame.height, REASONS.index("held_out"), np.int8)
    reason[training] = decision.reason
    table = frame.select(KEY).with_columns(
        keep=pl.Series(copies > 0),
        weight=pl.Series(weight),
        copies=pl.Series(copies),
        reason=pl.Series(REASONS, dtype=pl.String).gather(pl.Series(reason)),
    )
    if len(plan.phases) == 1:
        return table
    phases = np.zeros((frame.height, len(plan.phases)), np.uint16)
    phases[training] = decision.by_phase
    series = pl.Series(phases, dtype=pl.Array(pl.UInt16, len(plan.phases)))
    return table.with_columns(phases=series.arr.to_list())


def columns_read(settings: Plan, scorers: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The score columns that decide, as `scorer.column`, sorted.

    Raises:
        ConfigError: the score is no expression over columns that were scored.
        InputError: there are no scores.
    """
    return tuple(sorted(set(_Parsed.of(settings, scorers).columns)))


@dataclass(frozen=True, slots=True)
class _Parsed:
    """The expressions of a plan."""

    drop: Expression | None
    score: Expression | None
    weights: Expression | None
    is_diverse: bool
    """Whether the places of a draw for diversity are read."""

    @classmethod
    def of(cls, settings: Plan, scorers: Mapping[str, Sequence[str]]) -> "_Parsed":
        drop = score = weights = None
        if settings.drop is not None:
            drop = parse_expression(settings.drop, scorers, where="plan.drop")
        if settings.score is not None:
            score = parse_expression(settings.score, scorers)
        if settings.weights is not None:
            where = "plan.weights.score"
            weights = parse_expression(settings.weights.score, scorers, where=where)
        return cls(drop, score, weights, settings.is_diverse)

    @property
    def columns(self) -> tuple[str, ...]:
        """The score columns that are read."""
        given = (self.drop, self.score, self.weights)
        names = [column for each in given if each is not None for column in each.columns]
        more = (PLACE,) if self.is_diverse else ()
        return (*(name for name in names if name not in INDEX_COLUMNS), *more)


def _plan_passes(arm: Arm, parsed: _Parsed, label: str, seed: int) -> Passes[Thresholds]:
    drop = yield from _drop_passes(arm, parsed)
    passes = _chosen_passes(arm, parsed, label, seed, drop)
    return (yield from without_dropped(passes, drop))


def _drop_passes(arm: Arm, parsed: _Parsed) -> Passes[Scoring | None]:
    """The condition under which rows are left out."""
    if parsed.drop is None:
        return None
    # Ranks in it are those of the groups alone, so that a mixture drops the same rows.
    return (yield from scoring_passes(parsed.drop, Grouping(arm.settings.within, False)))


def _chosen_passes(
    arm: Arm, parsed: _Parsed, label: str, seed: int, drop: Scoring | None
) -> Passes[Thresholds]:
    settings = arm.settings
    survey, supplies, wanted = yield from _survey_passes(arm, parsed, label, drop)
    scoring, grouping = survey.order.scoring, survey.groups.grouping
    windows, sums = yield from window_passes(survey, supplies, wanted)
    rules = tuple(
        Rule(
            group=supply.group,
            drop=survey.drops[code],
            windows=windows[code],
            share=wanted.shares[code],
            asked=wanted.steps[code][-1],
            rows=supply.rows,
            tokens=supply.tokens,
            eligible_rows=supply.eligible_rows,
            eligible_tokens=supply.eligible_tokens,
            kept_rows=sums[code].rows,
            kept_copies=sums[code].copies,
            kept_tokens=sums[code].tokens,
        )
        for code, supply in enumerate(supplies)
    )
    plan = Thresholds(
        settings=settings,
        seed=seed,
        label=label,
        grouping=grouping,
        drop=drop,
        scoring=scoring,
        moments=survey.moments,
        rules=rules,
        weighing=None,
        unit=wanted.unit,
        asked=wanted.asked,
        phases=(1.0,) if arm.mixture is None else tuple(p.share for p in arm.mixture.phases),
        domains=survey.domains(),
        weights=None if arm.mixture is None else arm.mixture.mean(),
        effective_size=effective_size(sum(s.copies for s in sums), sum(s.square for s in sums)),
    )
    if parsed.weights is not None:
        return (yield from weigh_passes(plan, parsed.weights))
    copies = WeightSums(plan.kept_rows, plan.kept_copies, plan.kept_copies)
    copies.square = sum(s.square for s in sums)
    check_effective_share(copies, least=settings.min_effective_share, force=settings.force)
    return plan


def _survey_passes(
    arm: Arm, parsed: _Parsed, label: str, drop: Scoring | None
) -> Passes[tuple[Survey, list[Supply], Demand]]:
    """What there is of each group, and how far it is gone through."""
    settings, grouping = arm.settings, Grouping(arm.settings.within, arm.mixture is not None)
    scoring = arm.scoring
    if scoring is None and parsed.score is not None:
        scoring = yield from scoring_passes(parsed.score, grouping)
    survey = Survey(Groups(grouping), Order(settings, label, scoring))
    yield survey.add
    survey.finish()
    if not survey.groups.groups and drop is not None:
        raise InputError(
            f"plan.drop {drop.expression.text!r} leaves out every training example, or there are"
            " none",
            fix="choose a narrower condition, or remove it",
        )
    if not survey.groups.groups:
        raise InputError(
            "there are no training examples", fix="check the sources, or lower index.held_out"
        )
    yield from survey.drop_passes()
    supplies = survey.supplies()
    most = settings.max_repeats if arm.mixture is not None or arm.repeat else 1.0
    wanted = demand(supplies, settings.kept, mixture=arm.mixture, most_copies=most)
    return survey, supplies, wanted
