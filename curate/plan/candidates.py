"""What a draw for diversity chooses among, and how far its orders have to go.

Shapes: N training rows of a partition, G groups.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from curate.plan.groups import Batch
from curate.plan.passes import Survey, search_passes
from curate.plan.realise import Demand, Supply
from curate.plan.scoring import Passes, Scoring
from curate.plan.select import END, Block, Target, is_before


@dataclass(frozen=True, slots=True)
class Candidates:
    """The rows of each group that an order for diversity is made of."""

    survey: Survey
    drop: Scoring | None
    cuts: tuple[int, ...]
    """(G,) rows in front of these positions, by score, are candidates."""
    needs: tuple[int, ...]
    """(G,) rows or tokens that the order of each group has to hold."""
    unit: Literal["rows", "tokens"]

    def of(self, batch: Batch) -> Block:
        """The rows of a batch; those that are no candidates have the group -1."""
        rest = np.ones(len(batch.cell), np.bool_)
        if self.drop is not None:
            rest = ~self.drop.holds(batch)
        block = self.survey.by_score(batch.take(rest))
        there = block.group >= 0
        there &= is_before(block.key, block.tie, self.cuts, np.maximum(block.group, 0))
        group = np.full(len(rest), -1, np.int64)
        group[rest] = np.where(there, block.group, -1)
        key, tie = np.zeros((2, len(rest)), np.uint64)
        key[rest], tie[rest] = block.key, block.tie
        return Block(group, key, tie, batch.tokens)


def candidate_passes(
    survey: Survey, supplies: Sequence[Supply], wanted: Demand, drop: Scoring | None
) -> Passes[Candidates]:
    """The candidates of every group, once it is known how much of it is kept."""
    needs = [_need(supply, steps, wanted.unit)
             for supply, steps in zip(supplies, wanted.steps, strict=True)]  # fmt: skip
    cuts = [END if need else 0 for need in needs]
    if survey.order.scoring is not None:
        share = survey.order.settings.candidates
        targets = [
            Target(code, math.ceil(share * need), wanted.unit, cover=True)
            for code, need in enumerate(needs)
        ]
        sizes = {code: supply.eligible_rows for code, supply in enumerate(supplies)}
        cuts = [found.cut for found in (yield from search_passes(targets, sizes, survey.by_score))]
    return Candidates(survey, drop, tuple(cuts), tuple(needs), wanted.unit)


def _need(supply: Supply, steps: Sequence[int], unit: Literal["rows", "tokens"]) -> int:
    """How far an order is used: what is gone through whole needs none."""
    there = supply.eligible_rows if unit == "rows" else supply.eligible_tokens
    return max(step % there for step in steps) if there else 0
