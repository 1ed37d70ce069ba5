"""What the planner reads of a run: index, token counts and scores, met partition by partition."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import polars as pl

from curate.data.counts import are_tokens, known_counts
from curate.data.example import KEY
from curate.data.files import misshapen, read_document
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.data.tables import meet, read_examples, read_table, table_columns
from curate.errors import InputError
from curate.plan.batches import Tables
from curate.plan.groups import INDEX, PLACE

_INDEX = [name for name in INDEX if name != "num_tokens"]

NO_VECTOR = -3
"""Of a row that a draw for diversity cannot compare, where its place is stored."""


def read_summary(run: RunFolder) -> dict[str, Any] | None:
    """What `plan/summary.json` says of the plan; None before there is one.

    Raises:
        InputError: it is damaged.
    """
    path = run.plan / "summary.json"
    found = read_document(path, training=dict, kept=dict, domains=dict, yardsticks=dict,
                          means=dict, notes=list, groups=list)  # fmt: skip
    if found is not None and not {"tokenizer", "mixer"} <= set(found):
        raise misshapen(path, "it has no tokenizer or no mixer")
    return found


def open_tables(run: RunFolder, lengths: str | None) -> Tables:
    """The tables of a run.

    Args:
        run: the run folder.
        lengths: digest of the tokenizer whose tokens are counted; None: `num_tokens` is null.
    """

    def frames(columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        return (read_frame(run, part, lengths, columns) for part in run.partitions())

    return Tables(score_columns(run), frames, run.root)


def score_columns(run: RunFolder) -> dict[str, tuple[str, ...]]:
    """Scorer -> its columns, of all that has been scored in this run, complete or not.

    Raises:
        InputError: all tables of a scorer are damaged.
    """
    found: dict[str, tuple[str, ...]] = {}
    for folder in sorted(path for path in (run.root / "scores").glob("*") if path.is_dir()):
        outputs = [run.scores(part, folder.name) for part in run.partitions()]
        damage: InputError | None = None
        for output in (output for output in outputs if output.mark() is not None):
            try:
                names = table_columns(output.path)
            except InputError as error:
                damage = error
                continue
            found[folder.name] = tuple(name for name in names if name not in KEY)
            break
        if damage is not None and folder.name not in found:
            raise damage
    return found


def score_digests(run: RunFolder, part: Partition, scorers: Sequence[str]) -> list[str]:
    """Digests of what some scorers wrote for a partition.

    Raises:
        InputError: one of them has not finished.
    """
    digests: list[str] = []
    for scorer in scorers:
        mark = run.scores(part, scorer).mark()
        if mark is None:
            raise InputError(
                f"{scorer} has no scores for {part.source}/{part.file} from row {part.first_row}",
                fix=f"run `curate score {run.root}` first",
            )
        digests.append(mark["digest"])
    return digests


def complete_scorers(run: RunFolder) -> list[str]:
    """Scorers that have scored every partition."""
    partitions = run.partitions()
    return [
        scorer
        for scorer in score_columns(run)
        if all(run.scores(part, scorer).mark() is not None for part in partitions)
    ]


def read_frame(
    run: RunFolder, part: Partition, lengths: str | None, columns: Sequence[str]
) -> pl.DataFrame:
    """One partition: the columns of `INDEX`, and score columns named `scorer.column`.

    Raises:
        InputError: a table is missing.
        CurateError: two tables are not of the same examples.
    """
    frame = read_examples(run, part, _INDEX)
    if lengths is None:
        frame = frame.with_columns(num_tokens=pl.lit(None, pl.Int64))
    elif not are_tokens(lengths):
        counts = known_counts(frame["num_chars"].to_numpy(), lengths)
        frame = frame.hstack([pl.Series("num_tokens", counts)])
    else:
        frame = _beside(frame, read_table(run.lengths(part, lengths).path), {"num_tokens": ""})
    if PLACE in columns:
        frame = frame.with_columns(_places(run, part))
    wanted: dict[str, dict[str, str]] = {}
    for name in (name for name in columns if name != PLACE):
        scorer, _, column = name.partition(".")
        wanted.setdefault(scorer, {})[column] = name
    for scorer, names in wanted.items():
        score_digests(run, part, [scorer])
        table = read_table(run.scores(part, scorer).path, [*KEY, *names])
        frame = _beside(frame, table, names)
    return frame


def places_output(run: RunFolder, part: Partition) -> Output:
    """The places of a partition's rows in a draw for diversity."""
    return Output(run.root / "diverse" / f"{part.name}.npy")


def _places(run: RunFolder, part: Partition) -> pl.Series:
    """The column `PLACE`.

    Raises:
        InputError: it has not been made, or is damaged.
    """
    path = places_output(run, part).path
    try:
        places = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"{path} is missing or damaged: the order of a draw for diversity",
            fix=f"remove {path.parent} and run `curate plan {run.root}` again",
        ) from error
    column = pl.Series(PLACE, places)
    return column.to_frame().select(pl.col(PLACE).replace(NO_VECTOR, None))[PLACE]


def _beside(frame: pl.DataFrame, table: pl.DataFrame, names: dict[str, str]) -> pl.DataFrame:
    """The frame with columns of another table of the same examples, under new names."""
    meet(frame, table)
    return frame.hstack([table[name].alias(new or name) for name, new in names.items()])
