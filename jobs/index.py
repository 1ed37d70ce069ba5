"""`curate index`: inputs become examples, and rows that cannot be used are set aside.

Two rounds of tasks: inputs that are not Parquet are converted, one task a file; then every
partition is indexed. A file that is new, changed or gone costs its own partitions only.
"""

import logging
import time
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from curate.config import parse
from curate.data.convert import convert, converted, damage_detail
from curate.data.example import Source
from curate.data.files import discard, fingerprint, size_of
from curate.data.index import (
    Rules,
    content_digest,
    counts_by_reason,
    index_rows,
    quarantine_table,
)
from curate.data.layout import RunFolder
from curate.data.manifest import record_stage
from curate.data.partitions import (
    Output,
    Partition,
    partition_name,
    remove_strays,
    save_partitions,
)
from curate.data.reading import read_used
from curate.data.sources import InputFile
from curate.data.storage import is_damage
from curate.data.tables import SCHEMAS, write_table
from curate.errors import counted
from jobs.cluster import Pool
from jobs.index_report import check_features, check_quarantine, index_summary
from jobs.inventory import (
    Inventory,
    all_files,
    conversions,
    index_tasks,
    quarantine_output,
    refuse_copy,
    take_stock,
    unseen_columns,
)
from jobs.run import Listener, Receipt, StageState, Task, ignore, raise_failures, run_tasks
from jobs.settings import Settings

log = logging.getLogger(__name__)


def index_run(settings: Settings, *, pool: Pool, listener: Listener = ignore) -> dict[str, Any]:
    """Index all sources of a run.

    Returns:
        Counts: `files`, `rows` (examples), `held_out`, `bad` by reason, `num_domains`, rows by
        `domains` (the largest 200), and how many `partitions` there are, were `done` now or
        `skipped`.

    Raises:
        InputError: a source is missing or has no rows, or a column is not there.
        TooManyBadError: finished, but more was set aside than `index` allows.
    """
    started = time.monotonic()
    run = RunFolder(Path(settings.run))
    files = all_files(settings)
    conversion = run_tasks(
        "convert", conversions(run, settings, files), convert_file, pool=pool, listener=listener
    )
    inventory = take_stock(run, settings, files, skip=set(conversion.failures))
    tasks = index_tasks(run, settings, inventory.partitions)
    for task in tasks:
        # An examples table of the data as it was must not meet the new list of partitions.
        if not task.is_done() or not _has_quarantine(run, task):
            discard(task.output.mark_path)
    _remove_old(run, inventory)
    save_partitions(run.root / "examples" / "partitions.json", inventory.partitions)
    _write_unreadable(run, inventory)
    outcome = run_tasks("index", tasks, index_partition, pool=pool, listener=listener)
    outputs = [run.examples(part) for part in inventory.partitions]
    summary = index_summary(run, inventory, outcome)
    record_stage(
        run,
        "index",
        outputs=[*outputs, *(converted(run, f) for f in files if f.format != "parquet")],
        seconds=time.monotonic() - started,
        facts={"summary": summary, "columns": inventory.columns},
    )
    raise_failures("convert", conversion)
    raise_failures("index", outcome)
    check_features(run, inventory)
    check_quarantine(settings, run, inventory, summary)
    return summary


def plan_index(settings: Settings) -> StageState:
    """What `index_run` would do; writes nothing."""
    run = RunFolder(Path(settings.run))
    files = all_files(settings)
    due = [task for task in conversions(run, settings, files) if not task.is_done()]
    waiting = {task.name for task in due}
    unseen = unseen_columns(settings, [f for f in files if f"{f.source}/{f.file}" in waiting])
    inventory = take_stock(run, settings, files, skip=waiting)
    tasks = index_tasks(run, settings, inventory.partitions)
    done = [task for task in tasks if task.is_done()]
    known = {(part.source, part.file) for part in run.partitions()}
    now = {(file.source, file.file) for file in files}
    fresh = [task for task in tasks if task.output.mark() is None]
    changed, first = len(tasks) - len(done) - len(fresh), "to be converted to Parquet first"
    counts = (
        (len(waiting), f"file has {first}", f"files have {first}"),
        (len(known - now), "file is gone", "files are gone"),
        (len(fresh), "partition is new", "partitions are new"),
        (changed, "partition has changed data or settings",
         "partitions have changed data or settings"),
        (len(inventory.unreadable), "file cannot be read", "files cannot be read"),
    )  # fmt: skip
    why = tuple(counted(*entry) for entry in counts if entry[0])
    if unseen:
        why += (f"columns of {', '.join(unseen)} are looked at when the index is made",)
    return StageState("index", len(tasks) + len(waiting), len(done), why)


def convert_file(payload: dict[str, Any]) -> Receipt:
    """Convert one input to Parquet."""
    file = InputFile(**payload["file"])
    source = parse(Source, payload["source"])
    output = converted(RunFolder(Path(payload["run"])), file)
    mark = convert(file, source, output, payload["fingerprint"],
                   partition_rows=payload["partition_rows"])  # fmt: skip
    return {"unreadable": mark.get("unreadable")}


def index_partition(payload: dict[str, Any]) -> Receipt:
    """Index one partition: its quarantine first, its examples and their mark last."""
    run = RunFolder(Path(payload["run"]))
    part = Partition(**payload["partition"])
    source = parse(Source, payload["source"])
    rules = Rules(**payload["rules"])
    facts: dict[str, Any] = {}
    try:
        table, resolved = read_used(run, part, source)
        indexed = index_rows(table, resolved, name=part.source, file=part.file,
                             first_row=part.first_row, rules=rules)  # fmt: skip
        examples, quarantine = indexed.examples, indexed.quarantine
        facts["num_features"] = indexed.num_features
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise
        refuse_copy(run, part.address, error)
        last = part.first_row + part.num_rows - 1
        detail = f"rows {part.first_row} to {last}: {damage_detail(error)}"
        log.warning("%s/%s, %s", part.source, part.file, detail)
        entry = (None, "unreadable_file", detail)
        quarantine = quarantine_table(part.source, part.file, [entry])
        examples = pl.DataFrame(schema=SCHEMAS["examples"])
    aside = quarantine_output(run, part.name)
    if quarantine.height:
        aside.write(lambda path: write_table(quarantine, path), payload["fingerprint"])
    else:
        aside.remove()
    run.examples(part).write(
        lambda path: write_table(examples, path),
        payload["fingerprint"],
        rows=examples.height,
        bad=counts_by_reason(quarantine),
        content_digest=content_digest(examples),
        num_counted=int(examples["num_chars"].clip(1).sum()),
        **facts,
    )
    return {"rows": examples.height, "bad": quarantine.height}


# -- keeping the folder true ----------------------------------------------------------------------


def _remove_old(run: RunFolder, inventory: Inventory) -> None:
    """Tables of data that is gone must not be read with the rest."""
    names = {part.name for part in inventory.partitions}
    broken = {partition_name(*key, 0) for key in inventory.unreadable}
    removed = 0
    for folder in _table_folders(run):
        kept = names | broken if folder == run.quarantine else names
        removed += remove_strays(folder, kept)
    wanted = {converted(run, file).path for file in inventory.files}
    for path in run.converted.rglob("*.parquet"):
        if path not in wanted:
            Output(path).remove()
            removed += 1
    if removed:
        log.info("index: %d tables of inputs that are gone were removed", removed)


def _table_folders(run: RunFolder) -> list[Path]:
    """All folders that hold one table per partition."""
    folders = [run.root / "examples", run.quarantine, run.plan]
    for kind in ("lengths", "quantities", "scores", "domains"):
        folders += [path for path in (run.root / kind).glob("*") if path.is_dir()]
    return folders


def _write_unreadable(run: RunFolder, inventory: Inventory) -> None:
    """Files without a footer have no partition; their entry takes the name of their first."""
    for (source, file), detail in inventory.unreadable.items():
        table = quarantine_table(source, file, [(None, "unreadable_file", detail)])
        output = quarantine_output(run, partition_name(source, file, 0))
        mark = fingerprint(stage="index", unreadable=[source, file, detail])
        if not output.is_done(mark):
            output.write(lambda path, table=table: write_table(table, path), mark)
        log.warning("%s/%s cannot be read: %s", source, file, detail)


def _has_quarantine(run: RunFolder, task: Task) -> bool:
    """Whether the rows that a finished partition set aside are still there."""
    mark = task.output.mark() or {}
    return not mark.get("bad") or size_of(quarantine_output(run, task.name).path) is not None
