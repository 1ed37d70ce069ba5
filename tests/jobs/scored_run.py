"""A run folder with an index of real tables and scores made by hand, for mix and plan."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from curate.data.example import KEY
from curate.data.layout import RunFolder
from curate.data.tables import read_examples, write_table
from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.settings import Settings, parse_settings

POOL = Pool(InlineExecutor(), 1)

SIZES = {"large": 160, "middle": 40, "small": 10}
"""Domain -> rows; each text has 20 to 29 characters, counted as tokens."""


def scored_run(root: Path, **settings: Any) -> Settings:
    """Inputs, index and the scorers `el2n` and `loss`, below `root`; the run is `root / "run"`.

    el2n of the n-th row is n / 1000, loss falls with it; every 17th row is unscored.
    """
    data = root / "data"
    data.mkdir()
    number = 0
    for domain, rows in SIZES.items():
        texts = [f"{domain:>12} {'x' * (7 + row % 10)}{row:03d}" for row in range(rows)]
        pl.DataFrame(
            {
                "text": texts,
                "topic": [domain] * rows,
                "kind": [row % 3 for row in range(rows)],
                "score": [(number + row) / 1000 for row in range(rows)],
            }
        ).write_parquet(data / f"{domain}.parquet")
        number += rows
    values: dict[str, Any] = {
        "run": str(root / "run"),
        "sources": {"web": {"path": str(data), "text": "text", "domain": "topic", "label": "kind"}},
        "index": {"partition_rows": 30},
        **settings,
    }
    made = parse_settings(values)
    index_run(made, pool=POOL)
    write_scores(made, "el2n", lambda row, start: None if row % 17 == 16 else (start + row) / 1000)
    write_scores(made, "loss", lambda row, start: None if row % 17 == 16 else 2 - row / 100)
    return made


def write_scores(
    settings: Settings, scorer: str, value: Callable[[int, int], float | None]
) -> None:
    """Scores of every partition, by row and number of the file's first row."""
    run = RunFolder(Path(settings.run))
    starts = {"large.parquet": 0, "middle.parquet": 160, "small.parquet": 200}
    for part in run.partitions():
        keys = read_examples(run, part, KEY)
        found = [value(row, starts[part.file]) for row in keys["row"]]
        table = keys.with_columns(pl.Series(scorer, found, dtype=pl.Float32))
        run.scores(part, scorer).write(
            lambda path, table=table: write_table(table, path), "by hand", rows=table.height
        )


def tables(settings: Settings, folder: str) -> pl.DataFrame:
    """One table of all partitions, in canonical order."""
    run = RunFolder(Path(settings.run))
    return pl.concat(
        [pl.read_parquet(run.root / folder / f"{p.name}.parquet") for p in run.partitions()]
    )


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, marks included."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
