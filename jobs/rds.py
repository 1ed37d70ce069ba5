"""The passes of the scorer `rds`: similarities by partition, turns over the whole pool, tables.

run/rds/similar/part-….safetensors   largest cosine with each target domain, nearest target row
run/rds/ranks.npy                    place of every row of the pool, 0 where it has none
run/quantities/rds/                  a table for each partition
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import polars as pl
from safetensors.numpy import load_file, save_file

from curate.config import parse, plain
from curate.data.example import KEY, TRAIN
from curate.data.files import fingerprint
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.data.tables import read_examples, write_table
from curate.errors import ConfigError, InputError
from curate.vectors.ranking import Best, cosine_blocks, products, unit_rows
from curate.vectors.store import Floats, Positions, Vectors
from jobs.own_passes import OwnPasses, Phase
from jobs.representations import open_vectors, representation
from jobs.run import Receipt, Task
from jobs.settings import Settings, parse_settings
from jobs.target import check_target, target_folder
from jobs.tokenizer import training_digests
from scorers.protocol import Scorer
from scorers.rds import RDS, Fill, ranks, take_turns

log = logging.getLogger(__name__)

NAME = "rds"

VERSION = 1
"""Raised when the same vectors would give other numbers."""

MANY_QUERIES = 10_000
"""From here on the log says what the rows of the target cost."""

_BLOCK_NUMBERS = 1 << 23


class Work(NamedTuple):
    """What every task has at hand."""

    settings: Settings
    run: RunFolder
    options: RDS
    vectors: str
    """The representation."""
    stamp: str


class Queries(NamedTuple):
    """The target's rows that have a vector."""

    rows: npt.NDArray[np.float64]
    """(Q, d) of length 1."""
    numbers: Positions
    """(Q,) their place in the target."""
    groups: npt.NDArray[np.int64]
    """(Q,) the domain of each."""
    names: list[str]
    """(G,) of the domains."""


def passes(settings: Settings, scorer: Scorer) -> OwnPasses:
    """Similarities of each partition, the turns of all, a table of each.

    Raises:
        InputError: index or vectors, of the target too, have not been made.
    """
    check(settings, scorer)
    options = cast(RDS, scorer)
    run = RunFolder(Path(settings.run))
    name = representation(settings, options.vectors)
    common = {"settings": plain(settings), "options": plain(options), "vectors": name}
    target = _target_stamp(run, name)
    similar: list[Task] = []
    for part in run.partitions():
        mark = run.vectors(part, name).mark()
        if mark is None:
            open_vectors(run, name)  # says what to do
        stamp = fingerprint(
            stage=NAME,
            version=VERSION,
            target=target,
            vectors=(mark or {})["digest"],
            threads=settings.cluster.threads,
        )
        payload = common | {"partition": asdict(part), "fingerprint": stamp}
        similar.append(Task(part.name, payload, similar_output(run, part), stamp))
    stamp = fingerprint(
        stage="rds turns",
        similar=[task.fingerprint for task in similar],
        options=plain(options),
        pool=training_digests(run),
    )
    turns = Task("the whole pool", common | {"fingerprint": stamp}, ranks_output(run), stamp)
    tables: list[Task] = []
    start = 0
    for part, task in zip(run.partitions(), similar, strict=True):
        mark = fingerprint(stage="rds table", turns=stamp, similar=task.fingerprint, start=start)
        payload = task.payload | {"fingerprint": mark, "start": start}
        tables.append(Task(part.name, payload, run.quantities(part, NAME), mark))
        start += int((run.examples(part).mark() or {}).get("rows", 0))
    phases = (
        Phase(f"{NAME}: similarities", similar, similar_work),
        Phase(f"{NAME}: turns", [turns], turns_work),
        Phase(f"{NAME}: tables", tables, table_work),
    )
    if all(task.is_done() for task in tables):
        # Nothing reads what stands in the folder `rds`, which may have been removed.
        phases = phases[-1:]
    return OwnPasses(phases, ((NAME, 0),))


def check(settings: Settings, scorer: Scorer) -> None:
    """Refuse settings without a target or without the representation that is named.

    Raises:
        ConfigError: there is none.
        InputError: the target's files are missing.
    """
    check_target(settings, NAME)
    representation(settings, cast(RDS, scorer).vectors)


def similar_output(run: RunFolder, part: Partition) -> Output:
    return Output(run.root / NAME / "similar" / f"{part.name}.safetensors")


def ranks_output(run: RunFolder) -> Output:
    return Output(run.root / NAME / "ranks.npy")


def similar_work(payload: dict[str, Any]) -> Receipt:
    """Largest cosine of each row with each domain of the target, and the nearest target row."""
    work, part = _open(payload), Partition(**payload["partition"])
    queries = read_queries(work)
    vectors = Vectors.open([work.run.vectors(part, work.vectors).path])
    _check_width(queries, vectors)
    values = np.full((len(queries.names), len(vectors)), np.nan, dtype=np.float32)
    nearest = np.full(len(vectors), -1, dtype=np.int32)
    for positions, block in vectors.blocks(
        max(1, _BLOCK_NUMBERS // max(vectors.dim, len(queries.rows)))
    ):
        found = products(queries.rows, unit_rows(block))
        for group in range(len(queries.names)):
            values[group, positions] = found[queries.groups == group].max(axis=0)
        nearest[positions] = queries.numbers[found.argmax(axis=0)]
    missing = int((nearest < 0).sum())
    arrays = {"values": values, "nearest": nearest}
    similar_output(work.run, part).write(
        lambda path: save_file(arrays, path), work.stamp, rows=len(vectors), unscored=missing
    )
    return {"rows": len(vectors), "unscored": missing}


def turns_work(payload: dict[str, Any]) -> Receipt:
    """Let target rows or domains choose in turn among all training rows of the pool."""
    work = _open(payload)
    queries = read_queries(work)
    parts = work.run.partitions()
    values = [load_file(similar_output(work.run, part).path)["values"] for part in parts]
    best = np.concatenate([own.max(axis=0) for own in values])
    out = np.isnan(best)
    out |= np.concatenate([_left_out(work, part) for part in parts])
    lanes, fill = _lanes(work, queries, values)
    found = take_turns(fill, lanes=lanes, taken=out, limit=work.options.limit)
    placed = ranks(found, best, out)
    facts = {"lanes": lanes, "in_turn": len(found.rows), "ranked": int((placed > 0).sum())}
    if not facts["ranked"]:
        log.warning("rds: no training example has a vector, so that none has a place")
    ranks_output(work.run).write(lambda path: _save(path, placed), work.stamp, **facts)
    return facts


def table_work(payload: dict[str, Any]) -> Receipt:
    """The quantities of one partition; null where a row has none."""
    work, part = _open(payload), Partition(**payload["partition"])
    found = load_file(similar_output(work.run, part).path)
    keys = read_examples(work.run, part, KEY)
    start = int(payload["start"])
    placed = np.load(ranks_output(work.run).path, mmap_mode="r")[start : start + keys.height]
    best = found["values"].max(axis=0)
    dropped = np.zeros(keys.height, dtype=np.bool_)
    copies = _copies(work, part)
    if work.options.copies == "drop":
        dropped = copies
    values: dict[str, npt.NDArray[Any]] = {
        "rds": best,
        "rds_rank": np.where(placed > 0, placed, np.nan),
        "rds_query": np.where(found["nearest"] >= 0, found["nearest"], np.nan),
    }
    columns = [
        pl.Series(name, np.where(dropped, np.nan, own)).fill_nan(None)
        for name, own in values.items()
    ]
    table = keys.hstack(columns)
    facts = {"unscored": table["rds"].null_count(), "copies": int(copies.sum())}
    if facts["copies"]:
        how = "are not scored" if work.options.copies == "drop" else "come first for that reason"
        log.warning("%d examples of %s stand in the target too and %s", facts["copies"], part.name,
                    how)  # fmt: skip
    work.run.quantities(part, NAME).write(
        lambda path: write_table(table, path), work.stamp, rows=table.height, **facts
    )
    return {"rows": table.height, **facts}


def read_queries(work: Work) -> Queries:
    """The target's rows.

    Raises:
        InputError: none has a vector.
    """
    folder = target_folder(work.run)
    vectors = open_vectors(folder, work.vectors)
    domains = pl.concat(
        [read_examples(folder, part, ["domain"])["domain"] for part in folder.partitions()]
    )
    numbers = vectors.usable()
    if not len(numbers):
        raise InputError(
            "rds: no row of the target has a vector",
            fix="check that its texts are not empty, or choose another representation",
        )
    if len(numbers) > MANY_QUERIES:
        log.warning("rds: the target has %d rows, and each is compared with every example; a"
                    " sample of a thousand is mostly enough", len(numbers))  # fmt: skip
    own = domains.gather(numbers).to_list()
    names = sorted(set(own))
    is_split = work.options.groups == "domains" or (
        work.options.groups == "auto" and len(names) > 1
    )
    if not is_split:
        own, names = ["" for _ in own], [""]
    groups = np.array([names.index(name) for name in own], dtype=np.int64)
    return Queries(unit_rows(vectors.take(numbers)), numbers, groups, names)


def _lanes(work: Work, queries: Queries, values: Sequence[Floats]) -> tuple[int, Fill]:
    """How many choose in turn, and what gives them their lists."""
    blocks: Callable[[npt.NDArray[np.bool_]], Iterator[tuple[int, Positions, Floats]]]
    if len(queries.names) > 1 or work.options.groups == "domains":
        lanes = len(queries.names)
        blocks = partial(_stored_blocks, values)
    else:
        lanes = len(queries.rows)
        blocks = partial(cosine_blocks, queries.rows, open_vectors(work.run, work.vectors))

    def fill(used: npt.NDArray[np.bool_], depth: int) -> list[Positions]:
        best = Best(lanes, depth)
        for first, positions, block in blocks(used):
            best.add(first, positions, block)
        return best.lists()

    return lanes, fill


def _stored_blocks(
    values: Sequence[Floats], used: npt.NDArray[np.bool_]
) -> Iterator[tuple[int, Positions, Floats]]:
    """The similarities (G, n) with each domain, without rows that are taken."""
    start = 0
    for own in values:
        free = np.flatnonzero(~used[start : start + own.shape[1]])
        yield 0, start + free, own[:, free]
        start += own.shape[1]


def _left_out(work: Work, part: Partition) -> npt.NDArray[np.bool_]:
    """(N,) rows of a partition that have no place: held out, or dropped as copies."""
    split = read_examples(work.run, part, ["split"])["split"]
    out = (split != TRAIN).to_numpy()
    return out | _copies(work, part) if work.options.copies == "drop" else out


def _copies(work: Work, part: Partition) -> npt.NDArray[np.bool_]:
    """(N,) rows whose content stands in the target too."""
    folder = target_folder(work.run)
    known = pl.concat(
        [read_examples(folder, own, ["content"])["content"] for own in folder.partitions()]
    )
    return read_examples(work.run, part, ["content"])["content"].is_in(known.implode()).to_numpy()


def _target_stamp(run: RunFolder, name: str) -> list[str]:
    """Digests of the target's index, with its domains, and of its vectors."""
    folder = target_folder(run)
    open_vectors(folder, name)
    outputs = [
        output
        for part in folder.partitions()
        for output in (folder.examples(part), folder.vectors(part, name))
    ]
    return [(output.mark() or {}).get("digest", "") for output in outputs]


def _check_width(queries: Queries, vectors: Vectors) -> None:
    if queries.rows.shape[1] != vectors.dim:
        raise ConfigError(
            f"the target's vectors have {queries.rows.shape[1]} dimensions, the pool's"
            f" {vectors.dim}",
            fix="give both the same columns",
        )


def _open(payload: dict[str, Any]) -> Work:
    settings = parse_settings(payload["settings"])
    return Work(
        settings,
        RunFolder(Path(settings.run)),
        parse(RDS, payload["options"]),
        payload["vectors"],
        payload["fingerprint"],
    )


def _save(path: Path, array: npt.NDArray[np.int64]) -> None:
    with path.open("wb") as file:  # a name without .npy would get one
        np.save(file, array, allow_pickle=False)
