"""A run folder with an index and a plan made by hand, for the tests of everything behind them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from curate.data.files import write_json
from curate.data.layout import RunFolder
from curate.data.partitions import Partition, partition_name, save_partitions
from curate.data.storage import local_stamp
from curate.data.tables import SCHEMAS, write_table
from curate.plan.mixture import DomainSize, Mixture, Phase, save_mixture
from jobs.settings import Settings, parse_settings

TOKENIZER = "0123456789abcdef"


@dataclass(frozen=True)
class Row:
    """What the plan says of one row."""

    domain: str
    copies: int | tuple[int, ...] = 1
    """A tuple has the copies per phase."""
    weight: float = 1.0
    tokens: int = 10


Tables = Mapping[str, Mapping[str, pa.Table]]
"""Source -> file -> rows."""
Decide = Callable[[str, str, int], Row | None]
"""(source, file, row) -> the plan; None where the index has no such row."""


def planned_run(
    root: Path,
    tables: Tables,
    decide: Decide,
    *,
    partition_rows: int = 50,
    row_group_rows: int = 20,
    weights: list[dict[str, float]] | None = None,
    has_tokens: bool = True,
    **settings: Any,
) -> Settings:
    """Write inputs, index, token counts and plan below `root`; the run is `root / "run"`.

    Args:
        root: an empty folder.
        tables: the inputs.
        decide: the plan.
        partition_rows: rows of a partition.
        row_group_rows: of the input files.
        weights: asked mixture of each phase; None for no mixture.
        has_tokens: whether there are token counts.
        **settings: top-level settings besides run and sources.
    """
    inputs = root / "data"
    for source, files in tables.items():
        for file, table in files.items():
            path = inputs / source / file
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, path, row_group_size=row_group_rows)
    values: dict[str, Any] = {
        "run": str(root / "run"),
        "sources": {source: {"path": str(inputs / source)} for source in tables},
        **settings,
    }
    if weights is not None:
        values["mix"] = {"mixer": "fixed", "weights": weights[0]}
    replan(
        root,
        tables,
        decide,
        partition_rows=partition_rows,
        has_tokens=has_tokens,
        mixer=None if weights is None else "fixed",
    )
    if weights is not None:
        phases = tuple(Phase(1 / len(weights), phase) for phase in weights)
        mixture = Mixture("fixed", phases, dict.fromkeys(weights[0], "by hand"))
        sizes = {domain: DomainSize(1, 1) for domain in weights[0]}
        save_mixture(root / "run" / "mixtures" / "fixed" / "mixture.json", mixture, sizes)
    return parse_settings(values)


def replan(
    root: Path,
    tables: Tables,
    decide: Decide,
    *,
    partition_rows: int = 50,
    has_tokens: bool = True,
    mixer: str | None = None,
) -> None:
    """Write index and plan again, over the inputs that are there."""
    run = RunFolder(root / "run")
    partitions: list[Partition] = []
    for source, files in sorted(tables.items()):
        for file, table in sorted(files.items()):
            path = (root / "data" / source / file).absolute()
            for first in range(0, table.num_rows, partition_rows):
                part = Partition(
                    name=partition_name(source, file, first // partition_rows),
                    source=source,
                    file=file,
                    address=str(path),
                    first_row=first,
                    num_rows=min(partition_rows, table.num_rows - first),
                    stamp=local_stamp(path),
                )
                partitions.append(part)
                _write_tables(run, part, decide, has_tokens=has_tokens)
    save_partitions(run.root / "examples" / "partitions.json", partitions)
    summary = {"tokenizer": TOKENIZER if has_tokens else None, "mixer": mixer}
    write_json(run.plan / "summary.json", summary)


def _write_tables(run: RunFolder, part: Partition, decide: Decide, *, has_tokens: bool) -> None:
    rows = range(part.first_row, part.first_row + part.num_rows)
    found = [(row, decided) for row in rows if (decided := decide(part.source, part.file, row))]
    key = {
        "source": [part.source] * len(found),
        "file": [part.file] * len(found),
        "row": [row for row, _ in found],
    }
    nothing = {name: [None] * len(found) for name in SCHEMAS["examples"]}
    domains = [decided.domain for _, decided in found]
    copies = [
        decided.copies if isinstance(decided.copies, tuple) else (decided.copies,)
        for _, decided in found
    ]
    totals = [sum(each) for each in copies]
    plan = pl.DataFrame(
        {
            **key,
            "keep": [total > 0 for total in totals],
            "weight": [
                decided.weight if total else None
                for (_, decided), total in zip(found, totals, strict=True)
            ],
            "copies": totals,
            "reason": ["by hand"] * len(found),
        },
        schema=SCHEMAS["plan"],
    )
    if any(len(each) > 1 for each in copies):
        plan = plan.with_columns(
            pl.Series("phases", [list(each) for each in copies], dtype=pl.List(pl.UInt16))
        )
    examples = pl.DataFrame({**nothing, **key, "domain": domains}, schema=SCHEMAS["examples"])
    run.examples(part).write(lambda path: write_table(examples, path), "by hand")
    run.planned(part).write(lambda path: write_table(plan, path), "by hand")
    if has_tokens:
        lengths = pl.DataFrame(
            {**key, "num_tokens": [decided.tokens for _, decided in found]},
            schema=SCHEMAS["lengths"],
        )
        run.lengths(part, TOKENIZER).write(lambda path: write_table(lengths, path), "by hand")
