"""`plan/summary.json`: what was asked for, what came of it, and what the yardsticks would keep.

Shapes: N training rows of a partition, D domains.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curate.plan.batches import Tables
from curate.plan.expression import Values
from curate.plan.groups import PLACE, Batch, Cells, add_up, wide_enough
from curate.plan.positions import number_of
from curate.plan.rules import (
    REASONS,
    Decision,
    Rule,
    Thresholds,
    copies_of,
    decide,
    weights_of,
)
from curate.plan.select import END
from curate.plan.weights import WeightSums
from curate.plan.yardsticks import YARDSTICKS

SCHEMA_VERSION = 1

_FEW, _FEW_OF_MANY = 0.1, 0.2
"""A domain of which less than the first share is kept is named, where the plan keeps more than the
second of everything."""

_NEARLY = 0.95
"""Of the tokens that found a place: where less is kept, it is told."""


def summarise(
    tables: Tables, plan: Thresholds, yardsticks: Mapping[str, Thresholds]
) -> dict[str, Any]:
    """The summary of a plan, in one pass over the data; equal inputs give equal values.

    Args:
        tables: what the plan was made from.
        plan: the plan.
        yardsticks: name -> plan of the same number of tokens.
    """
    columns = sorted(f"{scorer}.{c}" for scorer, names in tables.scorers.items() for c in names)
    own = _Tally(plan, [*columns, "num_tokens"])
    others = {name: _Beside(other) for name, other in yardsticks.items()}
    held_out = 0
    read = [*columns, *([PLACE] if plan.settings.is_diverse else [])]
    with_labels = plan.grouping.within == "label"
    for batch in tables.batches(read, with_labels=with_labels, seed=plan.seed):
        held_out += batch.held_out
        score = None if plan.scoring is None else plan.scoring.values(batch)
        decision = decide(batch, plan)
        own.add(batch, decision, score)
        for tally in others.values():
            tally.add(batch, decision.copies, score)
    for sums in (own.kept_rows, own.dropped_rows, *(tally.kept_rows for tally in others.values())):
        sums.finish()
    return _report(plan, own, others, held_out)


@dataclass(slots=True)
class _Mean:
    """Mean of finite values, weighted by counts."""

    total: float = 0.0
    count: int = 0

    def add(self, values: Values, counts: NDArray[np.int64]) -> None:
        finite = np.isfinite(values)
        if not finite.all():
            values, counts = np.where(finite, values, 0.0), np.where(finite, counts, 0)
        self.total += float((values * counts).sum())
        self.count += int(counts.sum())

    @property
    def value(self) -> float | None:
        return _number(self.total / self.count) if self.count else None


@dataclass(slots=True)
class _Sums:
    """Whole numbers of rows, summed up by cell, then by domain."""

    size: int
    cells: Cells = field(default_factory=lambda: Cells(False))
    _by_cell: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    """(size, cells)"""
    domains: dict[str, NDArray[np.int64]] = field(default_factory=dict[str, NDArray[np.int64]])
    """Domain -> (size,), once all batches have been added."""

    def add(self, batch: Batch, *amounts: NDArray[np.int64]) -> None:
        """Add `size` numbers of each row."""
        self.cells = batch.cells
        known = self._by_cell if len(self._by_cell) else np.zeros((self.size, 0), np.int64)
        self._by_cell = wide_enough(known, len(self.cells.cells))
        add_up(self._by_cell, batch.cell, *amounts)

    def finish(self) -> None:
        for cell, own in zip(self.cells.cells, self._by_cell.T, strict=False):
            self.domains[cell.domain] = self.domains.get(cell.domain, 0) + own

    def of(self, domain: str) -> list[int]:
        """(size,)"""
        return self.domains.get(domain, np.zeros(self.size, np.int64)).tolist()

    @property
    def total(self) -> list[int]:
        """(size,) of all domains."""
        return self._by_cell.sum(axis=1).tolist() if len(self._by_cell) else [0] * self.size


@dataclass(slots=True)
class _Tally:
    """What a plan does with all rows."""

    plan: Thresholds
    columns: list[str]
    """Columns whose means are shown."""
    reasons: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(REASONS), np.int64))
    kept_rows: _Sums = field(default_factory=lambda: _Sums(3))
    """Kept rows, copies and tokens."""
    dropped_rows: _Sums = field(default_factory=lambda: _Sums(2))
    """Rows and tokens that `drop` left out."""
    weights: WeightSums = field(default_factory=WeightSums)
    kept: dict[str, _Mean] = field(default_factory=dict[str, _Mean])
    dropped: dict[str, _Mean] = field(default_factory=dict[str, _Mean])
    most_copies: int = 0
    repeated: int = 0
    """Rows with more than one copy."""

    def add(self, batch: Batch, decision: Decision, score: Values | None) -> None:
        copies = decision.copies
        is_kept = copies > 0
        self.reasons += np.bincount(decision.reason, minlength=len(REASONS))
        self.weights.add(weights_of(batch, copies, self.plan), copies)
        self.repeated += int((copies > 1).sum())
        self.most_copies = max(self.most_copies, int(copies.max(initial=0)))
        self.kept_rows.add(batch, is_kept.astype(np.int64), copies, copies * batch.tokens)
        if self.plan.drop is not None:
            out = decision.reason == REASONS.index("dropped")
            self.dropped_rows.add(batch, out.astype(np.int64), out * batch.tokens)
        values = {column: batch.column(column) for column in self.columns}
        if score is not None:
            values["plan.score"] = score
        for name, column in values.items():
            self.kept.setdefault(name, _Mean()).add(column, copies)
            self.dropped.setdefault(name, _Mean()).add(column, (~is_kept).astype(np.int64))

    def there(self, domain: str) -> tuple[int, int]:
        """Training rows and tokens of a domain, what was dropped included."""
        rows, tokens = self.plan.domains.get(domain, (0, 0))
        more = self.dropped_rows.of(domain)
        return rows + more[0], tokens + more[1]


@dataclass(slots=True)
class _Beside:
    """What a yardstick does with all rows."""

    plan: Thresholds
    kept_rows: _Sums = field(default_factory=lambda: _Sums(3))
    """Kept rows, copies and tokens."""
    shared: int = 0
    """Rows that the plan keeps too."""
    score: _Mean = field(default_factory=_Mean)
    """Of the plan."""

    def add(self, batch: Batch, own: NDArray[np.int64], score: Values | None) -> None:
        """Add rows; `own` is the plan's (N,) copies, `score` its (N,) values."""
        copies = copies_of(batch, self.plan)
        is_kept = copies > 0
        self.shared += int((is_kept & (own > 0)).sum())
        self.kept_rows.add(batch, is_kept.astype(np.int64), copies, copies * batch.tokens)
        if score is not None:
            self.score.add(score, copies)


def _report(
    plan: Thresholds, own: _Tally, others: Mapping[str, _Beside], held_out: int
) -> dict[str, Any]:
    domains = sorted({*plan.domains, *own.dropped_rows.domains})
    rows, tokens = (sum(own.there(domain)[i] for domain in domains) for i in range(2))
    dropped = own.dropped_rows.total
    reasons = dict(zip(REASONS, own.reasons.tolist(), strict=True)) | {"held_out": held_out}
    return {
        "schema_version": SCHEMA_VERSION,
        "unit": plan.unit,
        "asked": plan.asked,
        "shortfall": plan.asked - plan.placed,
        "notes": notes(plan) + _unfilled(plan) + _undecided(plan) + _emptied(plan, own),
        "training": {"rows": rows, "tokens": tokens},
        "dropped": {"rows": dropped[0], "tokens": dropped[1]},
        "kept": {
            "rows": plan.kept_rows,
            "copies": plan.kept_copies,
            "tokens": plan.kept_tokens,
            "row_share": _number(plan.kept_rows / rows),
            "token_share": _number(plan.kept_tokens / tokens) if tokens else None,
        },
        "repeats": {"rows": own.repeated, "most_copies": own.most_copies},
        "reasons": reasons,
        "weights": {
            "min": _number(own.weights.low) if own.weights.rows else None,
            "max": _number(own.weights.high) if own.weights.rows else None,
            "mean": _number(own.weights.mean),
            "effective_size": _number(plan.effective_size),
            "effective_share": _number(own.weights.effective_share),
        },
        "means": {
            name: {"kept": own.kept[name].value, "dropped": own.dropped[name].value}
            for name in sorted(own.kept)
        },
        "domains": {domain: _domain(plan, own, domain) for domain in domains},
        "groups": [_group(plan, rule) for rule in sorted(plan.rules, key=lambda r: r.group)],
        "yardsticks": {name: _yardstick(name, others[name], own) for name in others},
    }


def notes(plan: Thresholds) -> list[str]:
    """What a reader must not miss, one sentence each."""
    found: list[str] = []
    missing = plan.asked - plan.placed
    if missing > 0:
        limit = "" if plan.weights is None else f" and {plan.settings.max_repeats:g} repeats"
        found.append(
            f"{plan.asked:,} {plan.unit} were asked for, but what is scored and not dropped"
            f"{limit} give {plan.placed:,}: the plan is smaller"
        )
    elsewhere = [
        rule for rule in plan.rules if rule.share > 0 and rule.asked + 1 < rule.share * plan.asked
    ]
    if elsewhere and len(elsewhere) < len(plan.rules):
        named = ", ".join(str(rule.group) for rule in elsewhere[:5])
        more = f" and {len(elsewhere) - 5} more" if len(elsewhere) > 5 else ""
        found.append(f"too small for their share, so that others give more: {named}{more}")
    return found


def _unfilled(plan: Thresholds) -> list[str]:
    """Whether whole examples leave much of the budget unused, as in very many small groups."""
    if plan.unit == "rows" or plan.kept_tokens >= _NEARLY * plan.placed:
        return []
    groups = sum(rule.asked > 0 for rule in plan.rules)
    return [
        f"{plan.kept_tokens:,} of {plan.placed:,} {plan.unit} are kept: in each of {groups:,}"
        " groups the next example would go beyond the group's part; fewer groups (plan.within: all,"
        " or larger domains) lose less"
    ]


def _undecided(plan: Thresholds) -> list[str]:
    """Whether a draw for diversity had more to choose from than its score leaves."""
    if plan.scoring is None or not plan.settings.is_diverse:
        return []
    times = plan.settings.candidates
    whole = [
        rule
        for rule in plan.rules
        if 0 < rule.asked < (there := _there(plan, rule)) and times * rule.asked >= there
    ]
    if not whole:
        return []
    return [
        f"plan.candidates {times:g} is all there is in {len(whole)} of {len(plan.rules)} groups,"
        " so that the score decides nothing there: lower it, or keep less"
    ]


def _there(plan: Thresholds, rule: Rule) -> int:
    return rule.eligible_rows if plan.unit == "rows" else rule.eligible_tokens


def _emptied(plan: Thresholds, own: _Tally) -> list[str]:
    """Domains that a score nearly wipes out, which nobody asked for."""
    rows = sum(sizes[0] for sizes in plan.domains.values())
    gone = sorted(set(own.dropped_rows.domains) - set(plan.domains))
    lost = [f"plan.drop leaves nothing of the domain {', '.join(gone[:5])}"] if gone else []
    if plan.weights is not None or plan.kept_rows < _FEW_OF_MANY * rows:
        return lost
    left = {name: own.kept_rows.of(name)[0] / sizes[0] for name, sizes in plan.domains.items()}
    few = [f"{name} ({100 * share:.2g} %)" for name, share in left.items() if share < _FEW]
    if not few:
        return lost
    more = f" and {len(few) - 5} more" if len(few) > 5 else ""
    return [
        *lost,
        f"less than {100 * _FEW:.0f} % is kept of {', '.join(few[:5])}{more}: "
        "plan.within: domain keeps the same share of each",
    ]


def _domain(plan: Thresholds, own: _Tally, domain: str) -> dict[str, Any]:
    rows, tokens = own.there(domain)
    left = plan.domains.get(domain, (0, 0))[1]
    kept_rows, copies, kept_tokens = own.kept_rows.of(domain)
    asked = None if plan.weights is None else plan.weights.get(domain, 0.0)
    return {
        "rows": rows,
        "tokens": tokens,
        "kept_rows": kept_rows,
        "copies": copies,
        "kept_tokens": kept_tokens,
        "token_share_asked": None if asked is None else _number(asked),
        "token_share": _number(kept_tokens / plan.kept_tokens) if plan.kept_tokens else None,
        "epochs": _number(kept_tokens / left) if left else None,
    }


def _group(plan: Thresholds, rule: Rule) -> dict[str, Any]:
    return {
        "group": str(rule.group),
        "rows": rule.rows,
        "eligible": rule.eligible_rows,
        "asked": rule.asked,
        "kept_rows": rule.kept_rows,
        "copies": rule.kept_copies,
        "kept_tokens": rule.kept_tokens,
        "cuts": [_cut_score(plan, cut) for cut in (rule.windows[-1].low, rule.windows[-1].high)],
    }


def _cut_score(plan: Thresholds, cut: int) -> float | None:
    """Score of the first row behind a cut; None where no row is, or where the order is drawn."""
    is_drawn = plan.moments is not None or plan.settings.is_diverse
    if plan.scoring is None or is_drawn or not 0 < cut < END:
        return None
    value = number_of(cut >> 64)
    return _number(-value if plan.settings.order == "hardest" else value)


def _yardstick(name: str, tally: _Beside, own: _Tally) -> dict[str, Any]:
    plan = tally.plan
    named = sorted({*plan.domains, *own.plan.domains, *own.dropped_rows.domains})
    domains = {domain: tally.kept_rows.of(domain) for domain in named}
    _, copies, tokens = tally.kept_rows.total
    return {
        "what": YARDSTICKS.get(name, name),
        "rows": plan.kept_rows,
        "copies": plan.kept_copies,
        "tokens": plan.kept_tokens,
        "overlap": _number(tally.shared / own.plan.kept_rows) if own.plan.kept_rows else None,
        "mean_score": tally.score.value,
        "mean_tokens": _number(tokens / copies) if copies else None,
        "domains": {
            domain: {"rows": rows, "copies": copies, "tokens": tokens}
            for domain, (rows, copies, tokens) in domains.items()
        },
    }


def _number(value: float) -> float:
    """Nine digits: more than anyone reads, fewer than the order of a sum can change."""
    return float(f"{value:.9g}")
