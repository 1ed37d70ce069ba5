"""The passes over the data that a plan needs: sizes, dropping, the draw's spread, cuts, weights.

Shapes: G groups, P phases.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from curate.errors import CurateError
from curate.plan.expression import Expression, Values
from curate.plan.groups import Batch, Cells, Groups, add_up, wide_enough
from curate.plan.realise import Demand, Ints, Supply
from curate.plan.rules import Order, Thresholds, Weighing, Window, copies_of, weights_of
from curate.plan.scoring import Moments, MomentSums, Passes, scoring_passes
from curate.plan.select import Block, Found, Search, Target, is_before
from curate.plan.weights import WeightSums, check_effective_share, effective_size


@dataclass(frozen=True, slots=True)
class Kept:
    """What a group's windows keep."""

    rows: int = 0
    copies: int = 0
    tokens: int = 0
    square: int = 0
    """Sum of the squares of the copies."""


@dataclass(slots=True)
class Survey:
    """Sizes of the groups, and who takes part."""

    groups: Groups
    order: Order
    moments: Moments | None = None
    drops: list[int] = field(default_factory=list[int])
    _sizes: Ints = field(default_factory=lambda: np.zeros((4, 0), np.int64))
    """(4, G) training rows and tokens, and those that are eligible."""
    _cells: Ints = field(default_factory=lambda: np.zeros((4, 0), np.int64))
    """(4, cells) the same of each cell."""
    _known: Cells = field(default_factory=lambda: Cells(False))

    def add(self, batch: Batch) -> None:
        self._known = batch.cells
        self._cells = wide_enough(self._cells, len(batch.cells.cells))
        add_up(self._cells[:2], batch.cell, None, batch.tokens)
        if self._may_be_out:
            scored = (~self._is_out(batch, self.order.scores(batch))).astype(np.int64)
            add_up(self._cells[2:], batch.cell, scored, scored * batch.tokens)

    def finish(self) -> None:
        """Sum up by group, once all batches have been added: a cell lies in one group."""
        if not self._may_be_out:
            self._cells[2:] = self._cells[:2]
        there = np.flatnonzero(self._cells[0])  # of others all was dropped
        group = np.array(
            [self.groups.code(self._known.cells[cell]) for cell in there.tolist()], np.int64
        )
        self._sizes = np.zeros((4, len(self.groups)), np.int64)
        add_up(self._sizes, group, *self._cells[:, there])

    def drop_passes(self) -> Passes[None]:
        """Find what `drop_first` leaves out, then what a draw standardises by."""
        self.drops = [0] * len(self.groups)
        share = self.order.settings.drop_first
        if share:
            scored = self._sizes[2].tolist()
            targets = [Target(g, round(share * rows), "rows") for g, rows in enumerate(scored)]
            found = yield from search_passes(
                targets, dict(enumerate(scored)), self.by_score, same=self.same_bits
            )
            self.drops = [each.cut for each in found]
            self._sizes[2] -= [each.rows for each in found]
            self._sizes[3] -= [each.tokens for each in found]
        if self.order.is_drawn:
            sums = MomentSums()

            def add(batch: Batch) -> None:
                scores = self.order.scores(batch)
                assert scores is not None
                block = self.by_score(batch)
                values = np.where(block.group >= 0, scores, np.nan)
                sums.add(values, np.maximum(block.group, 0), len(self.groups))

            yield add
            self.moments = sums.moments()

    @property
    def same_bits(self) -> int:
        """How many leading bits of all positions are 0: the score's, where there is none."""
        settings = self.order.settings
        return 64 if self.order.scoring is None and not settings.is_diverse else 0

    def block(self, batch: Batch) -> Block:
        """The eligible rows in the order in which they are taken."""
        block = self.by_score(batch)
        scores = self.order.scores(batch)
        places = self.order.places(batch)
        if places is not None:
            return block._replace(key=self.order.by_place(scores, places, block.tie))
        if scores is None or self.moments is None:
            return block
        z = self.moments.of(scores, np.maximum(block.group, 0))
        return block._replace(key=self.order.by_draw(scores, block.tie, z))

    def supplies(self) -> list[Supply]:
        """(G,) sizes of the groups."""
        columns = self._sizes.T.tolist()
        return [
            Supply(group, *sizes) for group, sizes in zip(self.groups.groups, columns, strict=True)
        ]

    def domains(self) -> dict[str, tuple[int, int]]:
        """Domain -> training rows and tokens."""
        found: dict[str, tuple[int, int]] = {}
        for cell, (rows, tokens) in zip(
            self._known.cells, self._cells[:2].T.tolist(), strict=False
        ):
            if rows:  # else all of it was dropped
                before = found.get(cell.domain, (0, 0))
                found[cell.domain] = before[0] + rows, before[1] + tokens
        return {domain: found[domain] for domain in sorted(found)}

    def by_score(self, batch: Batch) -> Block:
        """The scored rows that are not dropped, in order of score."""
        group = self.groups.of(batch)
        scores = self.order.scores(batch)
        tie = batch.hashes(self.order.label)
        key = self.order.by_score(scores, tie)
        if not self._may_be_out and not any(self.drops):
            return Block(group, key, tie, batch.tokens)
        out = is_before(key, tie, self.drops, group) | self._is_out(batch, scores)
        return Block(np.where(out, -1, group), key, tie, batch.tokens)

    @property
    def _may_be_out(self) -> bool:
        return self.order.scoring is not None or self.order.settings.is_diverse

    def _is_out(self, batch: Batch, scores: Values | None) -> NDArray[np.bool_]:
        """(N,) rows without a score, or without a vector where the draw needs one."""
        out = np.zeros(len(batch.cell), np.bool_) if scores is None else np.isnan(scores)
        places = self.order.places(batch)
        return out if places is None else out | np.isnan(places)


def search_passes(
    targets: Sequence[Target],
    sizes: Mapping[int, int],
    block: Callable[[Batch], Block],
    *,
    same: int = 0,
) -> Passes[list[Found]]:
    search = Search(targets, sizes, same=same)
    while not search.is_done():
        yield lambda batch: search.add(block(batch))
        search.end_pass()
    return search.found()


def window_passes(
    survey: Survey, supplies: Sequence[Supply], wanted: Demand
) -> Passes[tuple[list[tuple[Window, ...]], list[Kept]]]:
    """(G, P) windows, and (G,) what the last of each group keeps."""
    targets: list[Target] = []
    for code, supply in enumerate(supplies):
        there = _there(supply, wanted)
        for step in wanted.steps[code]:
            rest = step % there if there else 0
            # A window around the centre leaves as much in front of it as behind it.
            low = (there - rest + 1) // 2 if survey.order.is_centred and rest else 0
            targets.append(Target(code, low, wanted.unit, cover=True))
            targets.append(Target(code, low + rest, wanted.unit, cover=not rest))
    sizes = {code: supply.eligible_rows for code, supply in enumerate(supplies)}
    passes = search_passes(targets, sizes, survey.block, same=survey.same_bits)
    found = iter((yield from passes))
    windows, kept = list[tuple[Window, ...]](), list[Kept]()
    for code, supply in enumerate(supplies):
        there = _there(supply, wanted)
        steps, sums = list[Window](), Kept()
        for step in wanted.steps[code]:
            low, high = next(found), next(found)
            full = step // there if there else 0
            steps.append(Window(full, low.cut, high.cut))
            # One long example can put both cuts on its two sides.
            rows, tokens = max(0, high.rows - low.rows), max(0, high.tokens - low.tokens)
            sums = Kept(
                rows=supply.eligible_rows if full else rows,
                copies=full * supply.eligible_rows + rows,
                tokens=full * supply.eligible_tokens + tokens,
                square=full**2 * (supply.eligible_rows - rows) + (full + 1) ** 2 * rows,
            )
        windows.append(tuple(steps))
        kept.append(sums)
    return windows, kept


def _there(supply: Supply, wanted: Demand) -> int:
    return supply.eligible_rows if wanted.unit == "rows" else supply.eligible_tokens


def weigh_passes(plan: Thresholds, expression: Expression) -> Passes[Thresholds]:
    """The plan with its weights: one pass for the mean of the values, one for the clipped mean."""
    assert plan.settings.weights is not None
    scoring = yield from scoring_passes(expression, plan.grouping)
    raw, clipped = WeightSums(), WeightSums()

    def add_raw(batch: Batch) -> None:
        raw.add(np.maximum(scoring.values(batch), 0), copies_of(batch, plan))

    yield add_raw
    if plan.kept_rows and not raw.mean > 0:
        raise CurateError(
            f"plan.weights.score {plan.settings.weights.score!r} is not above 0 for any kept row",
            fix="choose a score whose values are positive, or remove plan.weights",
        )
    weighed = replace(plan, weighing=Weighing(scoring, raw.mean or 1.0, 1.0))

    def add_clipped(batch: Batch) -> None:
        copies = copies_of(batch, weighed)
        clipped.add(weights_of(batch, copies, weighed), copies)

    yield add_clipped
    settings = plan.settings
    check_effective_share(clipped, least=settings.min_effective_share, force=settings.force)
    return replace(
        plan,
        weighing=Weighing(scoring, raw.mean or 1.0, clipped.mean or 1.0),
        effective_size=effective_size(clipped.total, clipped.square),
    )
