"""The passes of the scorer `leakage`: the evaluation sets, what of them stands in each partition.

    run/evaluation/<set>/                 the index of a set
    run/leakage/sets/<set>.safetensors    its runs of words, and where they stand in it
    run/leakage/matches/part-….parquet    key, set, example of the set, share, exact: every example
                                          of a set that counts as found, and each row's best
    run/quantities/leakage/               a table for each partition

`curate plan` reads the matches for its report.

Memory: a worker holds about 35 bytes for each word of the evaluation sets; the one that reads a set
160 for each of its words.
"""

from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
from safetensors.numpy import load_file, save_file

from curate.config import plain
from curate.data.example import KEY
from curate.data.files import fingerprint
from curate.data.layout import RunFolder
from curate.data.partitions import Partition, remove_strays
from curate.data.reading import read_fields
from curate.data.tables import read_examples, read_table, write_table
from curate.errors import ConfigError, InputError
from curate.models.overlap import Index, matches_in
from curate.models.sought import Sought, sought_in
from curate.models.text_pieces import Pieces, pieces_of
from jobs.evaluation import (
    LEAKAGE,
    check_evaluation,
    evaluation_fields,
    evaluation_stamp,
    matches_output,
    sought_output,
)
from jobs.lexical import pool_stamp
from jobs.own_passes import OwnPasses, Phase
from jobs.run import Receipt, Task
from jobs.settings import Settings, parse_settings
from scorers.leakage import Leakage
from scorers.protocol import Scorer

NAME = LEAKAGE
VERSION = 1
"""Raised when the same data and settings would give other numbers."""


def check(settings: Settings, _: Scorer) -> None:
    """Refuse settings without an evaluation set or without texts, before anything is indexed.

    Raises:
        ConfigError: there is none, or a source has no texts.
        InputError: files of a set are missing.
    """
    check_evaluation(settings, NAME)
    named = {f"sources.{name}": source for name, source in settings.sources.items()}
    named |= {f"evaluation.{name}": source for name, source in settings.evaluation.items()}
    for name, source in named.items():
        if source.features is not None or source.image is not None:
            raise ConfigError(
                f"scorer {NAME} compares texts, and {name} has images or numbers",
                fix="leave the scorer out; `duplicates` finds equal contents of any kind",
            )


def passes(settings: Settings, scorer: Scorer) -> OwnPasses:
    """Runs of each evaluation set, what of them stands in each partition, the tables.

    Raises:
        ConfigError: there is no evaluation set.
        InputError: files of one are missing.
    """
    check(settings, scorer)
    options = cast(Leakage, scorer)
    run = RunFolder(Path(settings.run))
    payload = {"settings": plain(settings), "options": plain(options)}
    reading = [options.ngrams, options.shortest, options.template]
    gathering: list[Task] = []
    for name in settings.evaluation:
        stamp = fingerprint(
            stage="leakage set",
            version=VERSION,
            texts=evaluation_stamp(settings, name),
            options=reading,
        )
        entry = payload | {"set": name, "fingerprint": stamp}
        gathering.append(Task(name, entry, sought_output(run, name), stamp))
    sets = [[task.name, task.fingerprint] for task in gathering]
    looking: list[Task] = []
    tables: list[Task] = []
    for part in run.partitions():
        stamp = fingerprint(
            stage="leakage matches",
            version=VERSION,
            sets=sets,
            options=[*reading, options.found_from],
            part=part.name,
            **pool_stamp(settings, part),
        )
        entry = payload | {"partition": asdict(part), "fingerprint": stamp}
        looking.append(Task(part.name, entry, matches_output(run, part), stamp))
        mark = fingerprint(stage="leakage table", matches=stamp)
        entry = entry | {"fingerprint": mark}
        tables.append(Task(part.name, entry, run.quantities(part, NAME), mark))
    phases = (
        Phase(f"{NAME}: evaluation sets", gathering, gather_work),
        Phase(f"{NAME}: looking", looking, look_work),
        Phase(f"{NAME}: tables", tables, table_work),
    )
    return OwnPasses(phases, ((NAME, 0),))


def gather_work(payload: dict[str, Any]) -> Receipt:
    """Index an evaluation set, and keep the runs of its texts.

    Raises:
        InputError: it has no words.
    """
    settings, options = parse_settings(payload["settings"]), Leakage(**payload["options"])
    run, name = RunFolder(Path(settings.run)), payload["set"]
    found = sought_in(_pieces(settings, name), options)
    if not len(found.wholes):
        raise InputError(
            f"evaluation.{name} has no words",
            fix=f"check the columns of evaluation.{name}",
        )
    arrays = {key: value for key, value in found._asdict().items() if isinstance(value, np.ndarray)}
    facts = {
        "examples": found.num_examples,
        "short": found.num_short,
        "template": found.num_template,
        "runs": len(found.runs),
    }
    sought_output(run, name).write(
        lambda path: save_file(arrays, path), payload["fingerprint"], **facts
    )
    remove_strays(run.root / NAME / "matches", {part.name for part in run.partitions()})
    return facts


def _pieces(settings: Settings, name: str) -> Iterator[Pieces]:
    for fields in evaluation_fields(settings, name):
        yield _texts(fields, f"evaluation.{name}")


def _texts(fields: pl.DataFrame, where: str) -> Pieces:
    found = pieces_of(fields.drop("label"))
    if found is None:
        raise ConfigError(
            f"scorer {NAME} compares texts, and {where} has none",
            fix="name a column of texts in the source",
        )
    return found


def look_work(payload: dict[str, Any]) -> Receipt:
    """What stands in the examples of a partition."""
    settings, options = parse_settings(payload["settings"]), Leakage(**payload["options"])
    run, part = RunFolder(Path(settings.run)), Partition(**payload["partition"])
    marks = [(name, sought_output(run, name).mark() or {}) for name in settings.evaluation]
    index = _index(run.root, tuple((name, mark.get("digest", "")) for name, mark in marks))
    fields = read_fields(run, part, settings.sources[part.source])
    pieces = _texts(fields, f"sources.{part.source}")
    found = matches_in(pieces, index, options, found_from=options.found_from)
    keys = read_examples(run, part, KEY)
    names = pl.Series("evaluation", index.sets, dtype=pl.String)[found["set"].to_numpy()]
    table = keys[found["row"].to_numpy()].hstack([names]).hstack(
        found.select("example", "share", "exact")
    )  # fmt: skip
    rows = found.filter(pl.col("share") >= options.found_from)["row"].n_unique()
    matches_output(run, part).write(
        lambda path: write_table(table, path), payload["fingerprint"], rows=table.height,
        found=rows, found_from=options.found_from,
        sets={name: mark.get("digest", "") for name, mark in marks},
    )  # fmt: skip
    return {"rows": keys.height, "found": rows}


@lru_cache(maxsize=1)
def _index(root: Path, sets: tuple[tuple[str, str], ...]) -> Index:
    """All that is looked for, once per process; the digests tell one from the next."""
    run = RunFolder(root)
    return Index.of({name: load_sought(run, name) for name, _ in sets})


def load_sought(run: RunFolder, name: str) -> Sought:
    """What is looked for of one set."""
    output = sought_output(run, name)
    mark = output.mark() or {}
    arrays = load_file(output.path)
    return Sought(
        **arrays,
        num_examples=int(mark.get("examples", 0)),
        num_short=int(mark.get("short", 0)),
        num_template=int(mark.get("template", 0)),
    )


def table_work(payload: dict[str, Any]) -> Receipt:
    """Of each example of a partition what is found best."""
    settings = parse_settings(payload["settings"])
    run, part = RunFolder(Path(settings.run)), Partition(**payload["partition"])
    matches = read_table(matches_output(run, part).path)
    numbers = pl.DataFrame({"evaluation": list(settings.evaluation)}).with_row_index("leakage_set")
    best = (
        matches.group_by(KEY, maintain_order=True)
        .agg(
            leakage=pl.col("share").first(),
            leakage_exact=pl.col("exact").any(),
            leakage_row=pl.col("example").first(),
            evaluation=pl.col("evaluation").first(),
        )
        .join(numbers, on="evaluation", how="left")
    )
    columns = ["leakage", "leakage_exact", "leakage_set", "leakage_row"]
    keys = read_examples(run, part, KEY)
    table = keys.join(best, on=list(KEY), how="left", maintain_order="left").select(
        *KEY, *(pl.col(name).cast(pl.Float32) for name in columns)
    )
    table = table.with_columns(pl.col("leakage", "leakage_exact").fill_null(0.0))
    run.quantities(part, NAME).write(
        lambda path: write_table(table, path), payload["fingerprint"], rows=table.height
    )
    return {"rows": table.height}
