"""`scores/`: quantities become columns, one light task for each scorer and partition."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from curate.config import plain
from curate.data.counts import CHARACTERS, are_tokens, read_counts
from curate.data.example import KEY
from curate.data.files import fingerprint
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.data.tables import meet, read_examples, read_table, write_table
from curate.models.gradients.groups import matching
from curate.models.quantities import TABLE
from curate.models.settings import TabularClassification
from jobs.chosen import Chosen, chosen_scorers
from jobs.history import log_digest, read_log, stacked
from jobs.lengths import content_of
from jobs.measurers import Measurer
from jobs.own_passes import OwnPasses
from jobs.run import Task as Work
from jobs.settings import Settings, parse_settings, task_settings
from scorers.apply import columns_of, plain_columns
from scorers.random import uniform

VERSION = 1
"""Of what is computed: raised when the same quantities would give other columns."""


def column_tasks(
    settings: Settings,
    chosen: Sequence[Chosen],
    measurers: Sequence[Measurer],
    *,
    own: Mapping[str, OwnPasses],
    lengths: str,
    stale: Collection[Path] = (),
) -> list[Work]:
    """Tasks of all scorers for the partitions whose quantities are there.

    Args:
        settings: of the run.
        chosen: from `chosen_scorers`.
        measurers: whose quantities are averaged.
        own: scorer -> its own passes.
        lengths: digest of the tokenizer whose tokens `length` reads.
        stale: tables of quantities that were not made from these settings, and give no columns.
    """
    run = RunFolder(Path(settings.run))
    values = plain(settings)
    found: list[Work] = []
    for entry in chosen:
        used = _tables_of(entry, settings, measurers, own)
        table = _table_digest(entry, run)
        for part in run.partitions():
            inputs = _inputs(run, part, entry, used, lengths, stale)
            if inputs is None:  # its own task failed, and said so
                continue
            stamp = fingerprint(
                stage="scores",
                version=VERSION,
                scorer=[entry.name, plain(entry.scorer or entry.table), table],
                own_version=getattr(entry.scorer, "version", 1),
                seeds=[seed for _, seed in used],
                seed=settings.seed if "uniform" in entry.needs else None,
                single_source=len(settings.sources) == 1 if entry.table else None,
                inputs=inputs,
            )
            payload = {
                "settings": values,
                "partition": asdict(part),
                "folder": entry.folder,
                "tables": used,
                "lengths": lengths,
                "fingerprint": stamp,
            }
            output = run.scores(part, entry.folder)
            found.append(Work(f"{entry.name}, {part.name}", payload, output, stamp))
    return found


def _tables_of(
    entry: Chosen, settings: Settings, measurers: Sequence[Measurer], own: Mapping[str, OwnPasses]
) -> list[tuple[str, int]]:
    """Folders under `quantities/` that a scorer reads, and their seeds; "" is the training log."""
    if entry.kind == "own":
        return list(own[entry.folder].tables) if entry.folder in own else []
    if entry.wants_log and settings.checkpoints.train is not None:
        return [("", seed) for seed in settings.checkpoints.train.seeds]
    if entry.kind in ("pass", "log"):
        return [(measurer.slug, measurer.seed) for measurer in measurers]
    return []


def column_work(payload: dict[str, Any]) -> dict[str, Any]:
    """Compute the columns of one scorer for one partition."""
    settings = parse_settings(payload["settings"])
    run = RunFolder(Path(settings.run))
    part = Partition(**payload["partition"])
    chosen = chosen_scorers(settings.score.named)
    entry = next(entry for entry in chosen if entry.folder == payload["folder"])
    examples = read_examples(run, part, [*KEY, "id", "num_chars"])
    keys = examples.select(KEY)
    used = [(str(slug), int(seed)) for slug, seed in payload["tables"]]
    if entry.table is not None:
        table = entry.table.join(
            examples,
            single_source=len(settings.sources) == 1,
            files=file_rows(run) if entry.table.is_by_position else None,
        )
    elif entry.scorer is not None and entry.kind == "plain":
        found = _table_quantities(run, part, examples, entry.needs, settings, payload["lengths"])
        table = keys.hstack(plain_columns(entry.scorer, found))
    elif entry.scorer is not None and entry.kind == "log":
        seeds, histories = _histories(run, part, keys, used)
        table = keys.hstack(columns_of(entry.scorer, histories, seeds))
    elif entry.scorer is not None:
        frames = [_meeting(run.quantities(part, slug), keys) for slug, _ in used]
        extra = _table_quantities(run, part, examples, entry.needs, settings, payload["lengths"])
        measured = [quantities_of(frame, entry.needs) | extra for frame in frames]
        table = keys.hstack(columns_of(entry.scorer, measured, [seed for _, seed in used]))
        if _counts_tokens(settings):
            table = table.hstack(frames[0].select(scored_columns(frames[0])))
    else:
        raise AssertionError(f"{entry.name} is neither a scorer nor a table")
    run.scores(part, entry.folder).write(
        lambda path: write_table(table, path), payload["fingerprint"], rows=table.height
    )
    return {"rows": table.height}


def file_rows(run: RunFolder) -> dict[tuple[str, str], int]:
    """(source, file) -> its rows, of all files of a run in its order."""
    found: dict[tuple[str, str], int] = {}
    for part in run.partitions():
        place = part.source, part.file
        found[place] = max(found.get(place, 0), part.first_row + part.num_rows)
    return found


def _table_digest(entry: Chosen, run: RunFolder) -> str | list[Any] | None:
    """Of an external table; where rows meet by position, of the files' sizes too."""
    if entry.table is None:
        return None
    if not entry.table.is_by_position:
        return entry.table.digest()
    return [entry.table.digest(), [[*key, rows] for key, rows in file_rows(run).items()]]


def scored_columns(frame: pl.DataFrame) -> list[str]:
    """Columns that say what a score stands on: its tokens and, with windows, their share."""
    return [name for name in ("num_scored", "scored_share") if name in frame.columns]


def _counts_tokens(settings: Settings) -> bool:
    if not settings.task:  # scorers without a model need none
        return False
    return not settings.task or not isinstance(task_settings(settings), TabularClassification)


def _histories(
    run: RunFolder, part: Partition, keys: pl.DataFrame, used: Sequence[tuple[str, int]]
) -> tuple[list[int], list[dict[str, np.ndarray]]]:
    """Seeds, and what each one's training showed of the examples."""
    seeds = sorted({seed for _, seed in used})
    histories: list[dict[str, np.ndarray]] = []
    for seed in seeds:
        slugs = [slug for slug, own in used if own == seed]
        if slugs == [""]:
            histories.append(read_log(run, part, keys, seed))
            continue
        frames = [_meeting(run.quantities(part, slug), keys) for slug in slugs]
        histories.append(stacked(frames, keys.height))
    return seeds, histories


def quantities_of(frame: pl.DataFrame, needs: frozenset[str]) -> dict[str, np.ndarray]:
    """The quantities among `needs` that a table holds, NaN for null."""
    return {
        name: frame[name].cast(pl.Float64).fill_null(float("nan")).to_numpy()
        for name in matching(needs, frame.columns)
        if name in frame.columns
    }


def table_quantities(
    keys: Sequence[tuple[str, str, int]],
    num_chars: np.ndarray,
    num_tokens: np.ndarray | None,
    *,
    seed: int,
) -> dict[str, np.ndarray]:
    """All quantities that need no model; `num_tokens` is NaN where no tokenizer is set."""
    unknown = np.full(len(keys), np.nan)
    return {
        "num_chars": num_chars.astype(np.float64),
        "num_tokens": unknown if num_tokens is None else num_tokens.astype(np.float64),
        "uniform": uniform(keys, seed=seed).numpy(),
    }


def _table_quantities(
    run: RunFolder,
    part: Partition,
    examples: pl.DataFrame,
    needs: frozenset[str],
    settings: Settings,
    lengths: str,
) -> dict[str, np.ndarray]:
    if needs.isdisjoint(TABLE):
        return {}
    tokens = None
    if "num_tokens" in needs and lengths != CHARACTERS:
        counted = read_counts(run, part, lengths)
        meet(examples, counted)
        tokens = counted["num_tokens"].to_numpy()
    return table_quantities(
        examples.select(KEY).rows(), examples["num_chars"].to_numpy(), tokens, seed=settings.seed
    )


def _meeting(output: Output, keys: pl.DataFrame) -> pl.DataFrame:
    """A table of the same examples in the same order."""
    frame = read_table(output.path)
    meet(keys, frame)
    return frame


def _inputs(
    run: RunFolder,
    part: Partition,
    entry: Chosen,
    used: Sequence[tuple[str, int]],
    lengths: str,
    stale: Collection[Path],
) -> list[str] | None:
    """Digests of what a partition's columns are made from; None where something is missing."""
    outputs = [run.quantities(part, slug) for slug, _ in used if slug]
    if any(output.path in stale for output in outputs):
        return None
    if "num_tokens" in entry.needs and are_tokens(lengths):
        outputs.append(run.lengths(part, lengths))
    marks = [output.mark() for output in outputs]
    digests = [mark["digest"] if mark else None for mark in marks]
    digests += [log_digest(run, part, seed) for slug, seed in used if not slug]
    # A table may name examples by the user's id, which is no part of the content.
    own = run.examples(part).mark() if entry.table else None
    index = own["digest"] if own else content_of(run, part)
    found = [index, *(digest for digest in digests if digest)]
    is_whole = None not in digests and (used or entry.kind in ("plain", "external"))
    return found if is_whole else None
