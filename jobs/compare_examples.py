"""What the arms of a comparison are measured on: held-out examples of every domain, and the target.

Up to a number of examples of each domain, chosen by their content hash, so that the choice depends
neither on partitions nor on anything that was scored. Over all domains each counts with the number
of examples that it holds out, not with the number that was evaluated.
"""

from pathlib import Path
from typing import Any

import polars as pl

from curate.data.example import HELD_OUT, KEY
from curate.data.files import fingerprint
from curate.data.layout import RunFolder
from curate.data.partitions import Output
from curate.data.tables import read_examples, write_table
from curate.errors import InputError
from jobs.domains_use import domain_digests
from jobs.settings import Settings
from jobs.target import target_folder

VERSION = 1

_SCHEMA = {
    "where": pl.String,
    "partition": pl.String,
    "position": pl.Int64,
    "domain": pl.String,
    "label": pl.Int64,
    "weight": pl.Float64,
}


def evaluation_output(run: RunFolder) -> Output:
    return Output(run.root / "compare" / "evaluation.parquet")


def choose_examples(settings: Settings) -> tuple[dict[str, Any], list[str]]:
    """Write which examples are evaluated; returns the mark of the table, and notes.

    Raises:
        InputError: nothing is held out and there is no target.
    """
    run = RunFolder(Path(settings.run))
    cap = settings.compare.held_out_examples
    folders = [("held_out", run)]
    if settings.target is not None:
        folders.append(("target", target_folder(run)))
    made_from = fingerprint(
        stage="compare evaluation",
        version=VERSION,
        cap=cap,
        examples=[
            [where, [(folder.examples(p).mark() or {})["digest"] for p in folder.partitions()]]
            for where, folder in folders
        ],
        **_domains(settings, run),
    )
    output = evaluation_output(run)
    mark = output.mark()
    if mark is None or not output.is_done(made_from):
        tables = [_chosen(where, folder, cap) for where, folder in folders]
        table = pl.concat([table for table, _ in tables])
        if not table.height:
            raise InputError(
                "nothing is held out, so that there is nothing to measure the arms on",
                fix="set index.held_out to a share such as 0.05, or set target",
            )
        without = tables[0][1]
        mark = output.write(lambda path: write_table(table, path), made_from, without=without,
                            rows=table.height, cut=_evaluated(table))  # fmt: skip
    notes = [
        f"{domain} has no held-out examples: the arms are not measured on it, and it is not among"
        " the domains of worst_domain"
        for domain in mark["without"]
    ]
    return mark, notes


def _domains(settings: Settings, run: RunFolder) -> dict[str, list[str]]:
    """Where domains are clustered, what they were made from."""
    found = [digest for part in run.partitions() for digest in domain_digests(settings, part)]
    return {"domains": found} if found else {}


def _evaluated(table: pl.DataFrame) -> dict[str, int]:
    return dict(table.group_by("where").len().sort("where").iter_rows())


def _chosen(where: str, folder: RunFolder, cap: int) -> tuple[pl.DataFrame, list[str]]:
    """The chosen examples, and the domains that have none."""
    best: dict[str, pl.DataFrame] = {}
    totals: dict[str, int] = {}
    for part in folder.partitions():
        table = read_examples(folder, part, [*KEY, "domain", "label", "content", "split"])
        for domain in table["domain"].unique().to_list():
            totals.setdefault(domain, 0)
        table = table.with_row_index("position").with_columns(partition=pl.lit(part.name))
        if where == "held_out":
            table = table.filter(pl.col("split") == HELD_OUT)
        for (domain,), own in table.group_by("domain", maintain_order=True):
            name = str(domain)
            totals[name] += own.height
            pool = pl.concat([best[name], own]) if name in best else own
            best[name] = pool.sort("content", *KEY).head(cap)
    tables = [
        own.sort(*KEY).select(
            where=pl.lit(where),
            partition=pl.col("partition"),
            position=pl.col("position").cast(pl.Int64),
            domain=pl.col("domain"),
            label=pl.col("label"),
            weight=pl.lit(totals[name] / own.height),
        )
        for name, own in sorted(best.items())
    ]
    empty = pl.DataFrame(schema=_SCHEMA)
    without = sorted(domain for domain, rows in totals.items() if not rows)
    return pl.concat([empty, *tables]), without
