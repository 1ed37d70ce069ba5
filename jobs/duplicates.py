"""The passes of the scorer `duplicates`: what is equal, what is similar, groups, tables.

run/duplicates/texts/part-….npy        hashes of normalised texts, or their minima
run/duplicates/firsts.safetensors      the first of each content, and the order of precedence
run/duplicates/cells/                  centroids; cell of every row and distance from its centre
run/duplicates/pairs/                  the most similar earlier row, by cells or by bands
run/duplicates/rows.npy                what became of every row; `summary.json` counts it
run/duplicates/groups/part-….parquet   key, group (int64), keep and similarity of rows in groups
run/quantities/duplicates/             a table for each partition

Memory: one task holds about 90 bytes for each row of the pool.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from curate.config import plain
from curate.data.files import fingerprint
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.errors import ConfigError, InputError
from curate.plan.expression import INDEX_COLUMNS, Expression, parse_expression
from curate.vectors.minhash import bands_for
from jobs.lengths import content_of, content_settings
from jobs.own_passes import OwnPasses, Phase
from jobs.plan_tables import score_columns, score_digests
from jobs.representations import open_vectors, representation, representations
from jobs.run import Task
from jobs.settings import Settings
from jobs.tokenizer import training_digests
from scorers.duplicates import CENTRAL, FAR, FIRST, Duplicates
from scorers.protocol import Scorer

NAME = "duplicates"

VERSION = 1
"""Raised when the same data and settings would give other numbers."""

_ONE_CELL_ROWS = 20_000
_CELL_ROWS = 10_000
_MOST_TASKS = 64


def passes(settings: Settings, scorer: Scorer) -> OwnPasses:
    """Texts of each partition, equal rows of all, similar rows by cells or bands, groups, tables.

    Raises:
        ConfigError: as `check` does.
        InputError: the index, the vectors or a score that `keep_by` names has not been made.
    """
    from jobs.duplicates_groups import groups_work, table_work

    check(settings, scorer)
    options = cast(Duplicates, scorer)
    run = RunFolder(Path(settings.run))
    common: dict[str, Any] = {"settings": plain(settings), "options": plain(options)}
    each = [
        common | {"partition": asdict(part), "index": index}
        for index, part in enumerate(run.partitions())
    ]
    first = _first_phases(settings, options, run, common, each)
    made_from = [task.fingerprint for phase in first for task in phase.tasks]
    similar = list[Phase]()
    if options.method == "near":
        similar = [_band_phase(options, run, common, made_from)]
    elif options.method == "semantic":
        similar = _cell_phases(settings, options, run, common, each, made_from)
    pairs = similar[-1].tasks if similar else []
    stamp = fingerprint(
        stage="duplicates groups",
        version=VERSION,
        inputs=[first[-1].tasks[0].fingerprint, *(task.fingerprint for task in pairs)],
        limit=options.limit,
    )
    payload = common | {"pairs": len(pairs)}
    groups = _task("the whole pool", payload, rows_output(run), stamp)
    tables: list[Task] = []
    start = 0
    for part, payload in zip(run.partitions(), each, strict=True):
        mark = fingerprint(stage="duplicates table", groups=stamp, start=start, part=part.name)
        own = payload | {"start": start}
        tables.append(_task(part.name, own, run.quantities(part, NAME), mark))
        start += num_rows(run, part)
    last = [
        Phase(f"{NAME}: groups", [groups], groups_work),
        Phase(f"{NAME}: tables", tables, table_work),
    ]
    phases = [*first, *similar, *last]
    if all(task.is_done() for task in tables):  # what they were made from may have been removed
        phases = last if groups.is_done() else last[1:]
    return OwnPasses(tuple(phases), ((NAME, 0),))


def check(settings: Settings, scorer: Scorer) -> None:
    """Refuse what cannot be compared, before anything is indexed.

    Raises:
        ConfigError: there are no texts to read, no such representation or column, or vectors whose
            products are no cosines.
    """
    options = cast(Duplicates, scorer)
    sources = settings.sources.values()
    if reads_texts(options) and any(s.features is not None or s.image is not None for s in sources):
        what = "normalize" if options.normalize else "method: near"
        raise ConfigError(
            f"duplicates: {what} reads texts, and a source has none",
            fix="use method: exact, or semantic on vectors of it",
        )
    if options.method == "semantic":
        name = representation(settings, options.vectors)
        if not representations(settings)[name].normalize:
            raise ConfigError(
                f"duplicates compares by cosine, and the vectors of {name} are not normalised",
                fix=f"remove embed.{name}.normalize, or add a representation that is",
            )
    if options.reads_scores:
        _check_order(settings, options)


def keep_expression(options: Duplicates, columns: dict[str, tuple[str, ...]]) -> Expression:
    """`keep_by` as an expression over columns that are there.

    Raises:
        ConfigError: it is none, or reads what is not there.
    """
    where = f"score.scorers.{NAME}.keep_by"
    others = {name: own for name, own in columns.items() if name != NAME}
    # Without any it would say that nothing was scored, where a name is only mistyped.
    expression = parse_expression(options.order, others or {"": ()}, where=where)
    if "num_tokens" in expression.columns:
        raise ConfigError(
            f"{where} reads num_tokens, which is counted for the plan only",
            fix="use num_chars, or add the scorer length and write length.num_tokens",
        )
    return expression


def reads_texts(options: Duplicates) -> bool:
    """Whether the contents' hashes in the index do not do."""
    return options.normalize or options.method == "near"


def num_rows(run: RunFolder, part: Partition) -> int:
    return int((run.examples(part).mark() or {}).get("rows", 0))


def num_cells(run: RunFolder, options: Duplicates) -> int:
    """k, before it is known how many rows have a vector."""
    rows = sum(num_rows(run, part) for part in run.partitions())
    few = 1 if rows <= _ONE_CELL_ROWS else round(rows / _CELL_ROWS)
    return max(1, min(options.cells or few, rows))


def texts_output(run: RunFolder, part: Partition) -> Output:
    return Output(run.root / NAME / "texts" / f"{part.name}.npy")


def firsts_output(run: RunFolder) -> Output:
    return Output(run.root / NAME / "firsts.safetensors")


def centroids_output(run: RunFolder) -> Output:
    return Output(run.root / NAME / "cells" / "centroids.npy")


def cells_output(run: RunFolder, part: Partition) -> Output:
    return Output(run.root / NAME / "cells" / f"{part.name}.safetensors")


def pairs_output(run: RunFolder, number: int) -> Output:
    return Output(run.root / NAME / "pairs" / f"{number:03d}.safetensors")


def rows_output(run: RunFolder) -> Output:
    return Output(run.root / NAME / "rows.npy")


def groups_output(run: RunFolder, part: Partition) -> Output:
    return Output(run.root / NAME / "groups" / f"{part.name}.parquet")


def _task(name: str, payload: dict[str, Any], output: Output, stamp: str) -> Task:
    return Task(name, payload | {"fingerprint": stamp}, output, stamp)


def _first_phases(
    settings: Settings,
    options: Duplicates,
    run: RunFolder,
    common: dict[str, Any],
    each: list[dict[str, Any]],
) -> list[Phase]:
    """What is read of the texts, and which rows are equal."""
    from jobs.duplicates_texts import firsts_work, texts_work

    texts: list[Task] = []
    for part, payload in zip(run.partitions(), each if reads_texts(options) else [], strict=False):
        stamp = fingerprint(
            stage="duplicates texts",
            version=VERSION,
            source=content_settings(settings.sources[part.source]),
            examples=content_of(run, part),
            near=[options.ngrams, options.words] if options.method == "near" else None,
        )
        texts.append(_task(part.name, payload, texts_output(run, part), stamp))
    stamp = fingerprint(
        stage="duplicates firsts",
        version=VERSION,
        pool=training_digests(run),
        texts=[task.fingerprint for task in texts] if options.normalize else None,
        keep_by=None if options.order in (FIRST, FAR, CENTRAL) else options.order,
        scores=_scores(run, options),
    )
    firsts = _task("the whole pool", common, firsts_output(run), stamp)
    return [
        Phase(f"{NAME}: texts", texts, texts_work),
        Phase(f"{NAME}: equal content", [firsts], firsts_work),
    ]


def _band_phase(
    options: Duplicates, run: RunFolder, common: dict[str, Any], made_from: list[str]
) -> Phase:
    """One task for each band of the minima."""
    from jobs.duplicates_pairs import band_work

    bands = bands_for(options.limit)
    tasks: list[Task] = []
    for band in range(bands.num):
        stamp = fingerprint(stage="duplicates band", inputs=made_from, bands=bands, band=band)
        payload = common | {"band": band}
        tasks.append(_task(f"band {band}", payload, pairs_output(run, band), stamp))
    return Phase(f"{NAME}: candidates", tasks, band_work)


def _cell_phases(
    settings: Settings,
    options: Duplicates,
    run: RunFolder,
    common: dict[str, Any],
    each: list[dict[str, Any]],
    made_from: list[str],
) -> list[Phase]:
    """Centroids, the cells of each partition, and tasks of some cells each."""
    from jobs.duplicates_pairs import assign_work, cell_work, fit_work

    cells = _cell_tasks(settings, options, run, common, each)
    inputs = [*(task.fingerprint for task in cells), *made_from]
    of = min(num_cells(run, options), _MOST_TASKS)
    pairs: list[Task] = []
    for number in range(of):
        stamp = fingerprint(
            stage="duplicates cells", inputs=inputs, order=options.order, number=number, of=of
        )
        payload = common | {"number": number, "of": of}
        pairs.append(_task(f"cells {number}", payload, pairs_output(run, number), stamp))
    return [
        Phase(f"{NAME}: cells", cells[:1], fit_work),
        Phase(f"{NAME}: cells of rows", cells[1:], assign_work),
        Phase(f"{NAME}: similar rows", pairs, cell_work),
    ]


def _cell_tasks(
    settings: Settings,
    options: Duplicates,
    run: RunFolder,
    common: dict[str, Any],
    each: list[dict[str, Any]],
) -> list[Task]:
    """Centroids, then the cells of each partition."""
    name = representation(settings, options.vectors)
    parts = run.partitions()
    marks = [run.vectors(part, name).mark() for part in parts]
    if not all(marks):
        open_vectors(run, name)  # says what to do
    digests = [mark["digest"] for mark in marks if mark]
    k = num_cells(run, options)
    stamp = fingerprint(
        stage="duplicates centroids",
        version=VERSION,
        vectors=digests,
        cells=k,
        seed=settings.seed,
        threads=settings.cluster.threads,
        device=(device := _device(settings) if k > 1 else "cpu"),
    )
    more = {"vectors": name, "cells": k, "device": device}
    found = [_task("the whole pool", common | more, centroids_output(run), stamp)]
    for part, payload, digest in zip(parts, each, digests, strict=True):
        mark = fingerprint(stage="duplicates assign", centroids=stamp, vectors=digest)
        found.append(_task(part.name, payload | more, cells_output(run, part), mark))
    return found


def _device(settings: Settings) -> str:
    """`cuda` where the models run on a GPU and faiss has one too."""
    from curate.models.load import pick_device
    from curate.vectors.engine import faiss_module

    on_gpu = pick_device(settings.model.device).type == "cuda"
    return "cuda" if on_gpu and hasattr(faiss_module(), "StandardGpuResources") else "cpu"


def _scores(run: RunFolder, options: Duplicates) -> list[list[str]] | None:
    """Digests of the score tables that `keep_by` reads."""
    if not options.reads_scores:
        return None
    try:
        columns = keep_expression(options, score_columns(run)).columns
    except ConfigError as error:  # `check` knows that it will be there
        raise InputError(
            f"duplicates: the scores of keep_by {options.order!r} are not there yet",
            fix=f"run `curate score {run.root}`",
        ) from error
    scorers = sorted({name.partition(".")[0] for name in columns if name not in INDEX_COLUMNS})
    return [score_digests(run, part, scorers) for part in run.partitions()]


def _check_order(settings: Settings, options: Duplicates) -> None:
    """Refuse an order by a column that nothing makes; a finished run may have it already."""
    from jobs.chosen import chosen_scorers
    from jobs.plan_check import coming_columns

    run = RunFolder(Path(settings.run).expanduser())
    coming: dict[str, tuple[str, ...]] = {}
    for entry in chosen_scorers(settings.score.named):
        if entry.folder != NAME:
            coming[entry.folder] = coming_columns(entry, options.order)
    try:
        there = score_columns(run)
    except InputError:  # a damaged table is made anew
        there = {}
    keep_expression(options, {**there, **coming})
