"""What of a run's tables is there to be told of, and its rows, partition by partition."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from curate.data.counts import CHARACTERS, EXAMPLES, counts_output
from curate.data.example import KEY, TRAIN
from curate.data.layout import RunFolder
from curate.data.manifest import load_manifest
from curate.data.partitions import Output, Partition
from curate.data.tables import meet, read_table
from curate.errors import ConfigError, CurateError, counted
from curate.plan.expression import (
    INDEX_COLUMNS,
    TOKENS,
    Column,
    Expression,
    parse_expression,
)
from curate.plan.groups import Cells, Grouping, batch_of
from curate.plan.plan import run_together
from curate.plan.scoring import Scoring, scoring_passes, without_dropped
from jobs.plan_tables import open_tables, read_frame, score_columns
from jobs.settings import Settings

MOST_COLUMNS = 40
"""Columns of scores that are told of one by one."""

NOT_SCORES = frozenset({"num_scored", "scored_share", "leakage_set", "leakage_row", "likely_label"})
"""Columns that say what a score stands on, or name something: they have no order."""

PLAN_SCORE = "plan.score"
"""Name of the plan's score, where it is an expression and no column."""

_PLAN = ["keep", "weight", "copies", "reason"]


@dataclass(frozen=True, slots=True)
class Tables:
    """The finished tables of a run."""

    run: RunFolder
    settings: Settings
    parts: list[Partition]
    columns: list[str]
    """Those of scores that are told of, as `scorer.column`: what the plan reads first."""
    beside: list[str]
    """Others that are read: `_std` of these, and what names something."""
    num_columns: int
    """Columns of scores there are."""
    lengths: str | None
    """Digest of the tokenizer whose tokens are counted."""
    has_plan: bool
    expression: Expression | None
    """The plan's score, where it is one of these tables."""
    notes: list[str]
    scoring: Scoring | None = None
    """How rows get the plan's score, where that is an expression: the column `PLAN_SCORE`."""

    @property
    def unit(self) -> str:
        """What lengths and shares count."""
        return unit_of(self.lengths)

    def frames(self, *, with_plan: bool = True) -> Iterator[tuple[int, Partition, pl.DataFrame]]:
        """Number, partition, and its rows: index, `num_tokens`, scores, and the plan's columns.

        Raises:
            CurateError: a table is damaged, or is not of the same examples.
        """
        for number, part in enumerate(self.parts):
            names = [name for name in self.columns if name != PLAN_SCORE]
            frame = read_frame(self.run, part, self.lengths, [*names, *self.beside])
            if self.scoring is not None:
                frame = _scored(frame, self.scoring, self.settings.seed)
            if self.has_plan and with_plan:
                plan = read_table(self.run.planned(part).path, [*KEY, *_PLAN])
                meet(frame, plan)
                frame = frame.hstack(plan.select(_PLAN))
            yield number, part, frame

    def training(self) -> Iterator[tuple[int, Partition, pl.DataFrame]]:
        """The same without held-out rows, `place` being the row's place in the partition."""
        for number, part, frame in self.frames():
            yield number, part, frame.with_row_index("place").filter(pl.col("split") == TRAIN)


def unit_of(lengths: str | None) -> str:
    """tokens, characters, or examples where neither is counted."""
    return {None: "examples", EXAMPLES: "examples", CHARACTERS: CHARACTERS}.get(lengths, "tokens")


def open_report_tables(settings: Settings) -> Tables:
    """Look which tables are whole and belong to the index as it is; others are left out, and told.

    Raises:
        InputError: the index or the list of partitions is damaged.
    """
    run = RunFolder(Path(settings.run))
    parts = run.partitions()
    notes: list[str] = []
    scorers: dict[str, tuple[str, ...]] = {}
    for scorer, names in score_columns(run).items() if parts else ():
        why = _lacking(run, parts, [run.scores(part, scorer) for part in parts])
        if why is None:
            scorers[scorer] = names
        else:
            notes.append(f"{scorer} is left out: {why}")
    planned = [run.planned(part) for part in parts]
    has_plan = bool(parts) and any(output.mark() for output in planned)
    if has_plan and (why := _lacking(run, parts, planned)) is not None:
        notes.append(f"the plan is left out: {why}")
        has_plan = False
    expression = _expression(settings, scorers)
    columns = _ordered(settings, scorers, expression)
    lengths = _lengths(run, parts)
    scoring = None
    if has_plan and expression is not None and not isinstance(expression.root, Column):
        scoring = _scoring(settings, run, scorers, expression, lengths)
        columns = [*([PLAN_SCORE] if scoring else []), *columns]
    shown = columns[:MOST_COLUMNS]
    beside = [f"{name}_std" for name in shown] + ["label_issues.likely_label"]
    beside += expression.columns if scoring and expression else ()
    known = {f"{scorer}.{name}" for scorer, names in scorers.items() for name in names}
    return Tables(
        run=run,
        settings=settings,
        parts=parts,
        columns=shown,
        beside=[name for name in dict.fromkeys(beside) if name in known and name not in shown],
        num_columns=len(columns),
        lengths=lengths,
        has_plan=has_plan,
        expression=expression if has_plan else None,
        notes=notes,
        scoring=scoring,
    )


def _scoring(
    settings: Settings,
    run: RunFolder,
    scorers: dict[str, tuple[str, ...]],
    expression: Expression,
    lengths: str | None,
) -> Scoring | None:
    """The plan's score for every row, ranks over what `plan.drop` leaves.

    None where it reads tokens that nobody has counted, or a score that has gone.
    """
    plan = settings.plan
    try:
        out = None if plan.drop is None else parse_expression(plan.drop, scorers)
    except (ConfigError, CurateError):
        return None
    columns = [*expression.columns, *(out.columns if out else ())]
    if lengths is None and TOKENS in columns:
        return None
    columns = [name for name in dict.fromkeys(columns) if name not in INDEX_COLUMNS]
    grouping = Grouping(plan.within, bool(settings.mix))
    batches = open_tables(run, lengths).batches(
        columns, with_labels=plan.within == "label", seed=settings.seed
    )
    drop = None
    if out is not None:
        passes = scoring_passes(out, Grouping(plan.within, False))
        drop = run_together({"": passes}, lambda: batches)[""]
    wanted = without_dropped(scoring_passes(expression, grouping), drop)
    return run_together({"": wanted}, lambda: batches)[""]


def _scored(frame: pl.DataFrame, scoring: Scoring, seed: int) -> pl.DataFrame:
    """The same rows with the plan's score; held-out rows have none."""
    cells = Cells(scoring.grouping.within == "label")
    is_training = (frame["split"] == TRAIN).to_numpy()
    found = np.full(frame.height, np.nan)
    if is_training.any():
        found[is_training] = scoring.values(batch_of(frame, cells, seed=seed))
    return frame.with_columns(pl.Series(PLAN_SCORE, found))


def _lacking(run: RunFolder, parts: Sequence[Partition], outputs: Sequence[Output]) -> str | None:
    """Why the tables cannot be told of; None where all are there and fit the index."""
    missing = other = 0
    for part, output in zip(parts, outputs, strict=True):
        mark, index = output.mark(), run.examples(part).mark()
        missing += mark is None
        other += bool(mark and index and mark.get("rows", index["rows"]) != index["rows"])
    if missing:
        return f"{missing} of {counted(len(parts), 'table is', 'tables are')} missing"
    if other:
        return "its tables are of an older index"
    return None


def _lengths(run: RunFolder, parts: Sequence[Partition]) -> str | None:
    """The tokens that were counted last, where they are of the index as it is."""
    facts = load_manifest(run)["stages"].get("lengths", {}).get("summary")
    if not facts or not parts:
        return None
    digest = str(facts["digest"])
    why = _lacking(run, parts, [counts_output(run, part, digest) for part in parts])
    return digest if why is None else None


def _expression(settings: Settings, scorers: dict[str, tuple[str, ...]]) -> Expression | None:
    if settings.plan.score is None or not scorers:
        return None
    try:
        return parse_expression(settings.plan.score, scorers)
    except (ConfigError, CurateError):  # its scorer has not finished, say
        return None


def titles(names: Sequence[str]) -> dict[str, str]:
    """Column, as `scorer.column` -> its own name, where no other scorer has one of that name."""
    own = [name.partition(".")[2] for name in names]
    return {
        name: column if own.count(column) == 1 and name != PLAN_SCORE else name
        for name, column in zip(names, own, strict=True)
    }


def planned_column(tables: Tables) -> str | None:
    """The column that the plan orders by: a score, or `PLAN_SCORE`."""
    if tables.scoring is not None:
        return PLAN_SCORE
    root = tables.expression.root if tables.expression else None
    return root.name if isinstance(root, Column) else None


def _ordered(
    settings: Settings, scorers: dict[str, tuple[str, ...]], expression: Expression | None
) -> list[str]:
    """Columns that have an order: the plan's, each scorer's first, then the others."""
    told = {
        scorer: [n for n in names if n not in NOT_SCORES and not _is_spread(n, names)]
        for scorer, names in scorers.items()
    }
    wanted = [name.rpartition(":")[2] for name in settings.score.named]
    order = sorted(told, key=lambda s: (wanted.index(s) if s in wanted else len(wanted), s))
    planned = expression.columns if expression else ()
    first = [f"{scorer}.{told[scorer][0]}" for scorer in order if told[scorer]]
    every = [f"{scorer}.{name}" for scorer in order for name in told[scorer]]
    return list(dict.fromkeys([*(name for name in planned if name in every), *first, *every]))


def _is_spread(name: str, names: Sequence[str]) -> bool:
    return name.endswith("_std") and name.removesuffix("_std") in names
