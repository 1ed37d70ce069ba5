"""`curate index`: inputs become examples, and rows that cannot be used are set aside.

Two rounds of tasks: inputs that are not Parquet are converted, one task a file; then every
partition is indexed. A file that is new, changed or gone costs its own partitions only.
"""

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from curate.config import parse, plain
from curate.data.columns import resolve_columns
from curate.data.convert import conversion_fingerprint, convert, converted, damage_detail
from curate.data.cutting import Footer, cut, read_footer
from curate.data.example import Source
from curate.data.files import fingerprint
from curate.data.index import (
    VERSION,
    Rules,
    counts_by_reason,
    index_rows,
    quarantine_table,
    source_settings,
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
from curate.data.reading import read_used, resolve_address
from curate.data.sources import InputFile, find_files
from curate.data.storage import is_damage
from curate.data.tables import SCHEMAS, scan, write_table
from curate.errors import InputError, TooManyBadError
from jobs.cluster import Pool
from jobs.run import Listener, Outcome, Receipt, StageState, Task, ignore, raise_failures, run_tasks
from jobs.settings import Settings, task_settings

log = logging.getLogger(__name__)

_FOOTER_THREADS = 16
_SHOWN_DOMAINS = 200


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
    files = _all_files(settings)
    conversion = run_tasks(
        "convert", _conversions(run, settings, files), convert_file, pool=pool, listener=listener
    )
    inventory = _take_stock(run, settings, files, skip=set(conversion.failures))
    tasks = _tasks(run, settings, inventory.partitions)
    for task in tasks:
        # An examples table of the data as it was must not meet the new list of partitions.
        if not task.is_done() or not _has_quarantine(run, task):
            task.output.mark_path.unlink(missing_ok=True)
    _remove_old(run, inventory)
    save_partitions(run.root / "examples" / "partitions.json", inventory.partitions)
    _write_unreadable(run, inventory)
    outcome = run_tasks("index", tasks, index_partition, pool=pool, listener=listener)
    outputs = [run.examples(part) for part in inventory.partitions]
    summary = _summary(run, inventory, outcome)
    record_stage(
        run,
        "index",
        outputs=[*outputs, *(converted(run, f) for f in files if f.format != "parquet")],
        seconds=time.monotonic() - started,
        facts={"summary": summary, "columns": inventory.columns},
    )
    raise_failures("convert", conversion)
    raise_failures("index", outcome)
    _check_features(run, inventory)
    _check_quarantine(settings, run, inventory, summary)
    return summary


def plan_index(settings: Settings) -> StageState:
    """What `index_run` would do; writes nothing."""
    run = RunFolder(Path(settings.run))
    files = _all_files(settings)
    due = [task for task in _conversions(run, settings, files) if not task.is_done()]
    waiting = {task.name for task in due}
    inventory = _take_stock(run, settings, files, skip=waiting)
    tasks = _tasks(run, settings, inventory.partitions)
    done = [task for task in tasks if task.is_done()]
    known = {(part.source, part.file) for part in run.partitions()}
    now = {(file.source, file.file) for file in files}
    fresh = [task for task in tasks if task.output.mark() is None]
    counts = {
        "files have to be converted to Parquet first": len(waiting),
        "files are gone": len(known - now),
        "partitions are new": len(fresh),
        "partitions have changed data or settings": len(tasks) - len(done) - len(fresh),
        "files cannot be read": len(inventory.unreadable),
    }
    why = tuple(f"{count} {what}" for what, count in counts.items() if count)
    return StageState("index", len(tasks) + len(waiting), len(done), why)


# -- workers --------------------------------------------------------------------------------------


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
        last = part.first_row + part.num_rows - 1
        detail = f"rows {part.first_row} to {last}: {damage_detail(error)}"
        log.warning("%s/%s, %s", part.source, part.file, detail)
        entry = (None, "unreadable_file", detail)
        quarantine = quarantine_table(part.source, part.file, [entry])
        examples = pl.DataFrame(schema=SCHEMAS["examples"])
    aside = _quarantine(run, part.name)
    if quarantine.height:
        aside.write(lambda path: write_table(quarantine, path), payload["fingerprint"])
    else:
        aside.remove()
    run.examples(part).write(
        lambda path: write_table(examples, path),
        payload["fingerprint"],
        rows=examples.height,
        bad=counts_by_reason(quarantine),
        **facts,
    )
    return {"rows": examples.height, "bad": quarantine.height}


# -- what there is --------------------------------------------------------------------------------


@dataclass(slots=True)
class _Inventory:
    """The data as it is now."""

    files: list[InputFile]
    partitions: list[Partition] = field(default_factory=list[Partition])
    unreadable: dict[tuple[str, str], str] = field(default_factory=dict[tuple[str, str], str])
    """(source, file) -> what is wrong with it."""
    columns: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    """Source -> its columns as they were resolved."""


def _all_files(settings: Settings) -> list[InputFile]:
    return [f for name, source in settings.sources.items() for f in find_files(name, source)]


def _conversions(run: RunFolder, settings: Settings, files: Iterable[InputFile]) -> list[Task]:
    rows = settings.index.partition_rows
    tasks: list[Task] = []
    for file in files:
        if file.format == "parquet":
            continue
        source = settings.sources[file.source]
        mark = conversion_fingerprint(file, source, rows)
        payload = {
            "run": str(run.root),
            "file": asdict(file),
            "source": plain(source),
            "partition_rows": rows,
            "fingerprint": mark,
        }
        tasks.append(Task(f"{file.source}/{file.file}", payload, converted(run, file), mark))
    return tasks


def _take_stock(
    run: RunFolder, settings: Settings, files: list[InputFile], *, skip: set[str]
) -> _Inventory:
    """Read all footers, cut partitions, check columns.

    Args:
        run: the run folder.
        settings: of the run.
        files: all inputs.
        skip: names (source/file) of files that have no Parquet form.

    Raises:
        InputError: a column is missing, or files of one source differ in their columns.
    """
    inventory = _Inventory(files)
    present = [file for file in files if f"{file.source}/{file.file}" not in skip]
    with ThreadPoolExecutor(_FOOTER_THREADS) as threads:
        footers = threads.map(lambda file: _footer(run, file), present)
        for file, (address, stamp, footer) in zip(present, footers, strict=True):
            if isinstance(footer, str):
                inventory.unreadable[file.source, file.file] = footer
            elif footer.num_rows:
                _check_columns(settings, inventory, file, footer)
                inventory.partitions += cut(
                    file.source,
                    file.file,
                    address,
                    stamp,
                    footer,
                    partition_rows=settings.index.partition_rows,
                )
    return inventory


def _footer(run: RunFolder, file: InputFile) -> tuple[str, str, Footer | str]:
    """Address and stamp of a file's Parquet form, and its footer or what is wrong with it."""
    address, stamp = file.address, file.stamp
    if file.format != "parquet":
        output = converted(run, file)
        mark = output.mark() or {}
        address, stamp = output.path.relative_to(run.root).as_posix(), str(mark.get("digest"))
        if "unreadable" in mark:
            return address, stamp, str(mark["unreadable"])
    try:
        return address, stamp, read_footer(resolve_address(run, address), stamp)
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise
        return address, stamp, damage_detail(error)


def _check_columns(
    settings: Settings, inventory: _Inventory, file: InputFile, footer: Footer
) -> None:
    source = settings.sources[file.source]
    where = f"{file.source}/{file.file} ({file.address})"
    resolved = source_settings(resolve_columns(source, footer.schema, where=where))
    num_classes = _num_classes(settings)
    if num_classes is not None and resolved["label"] is None:
        raise InputError(
            f"{where} has no label column, and the task {settings.task['kind']} needs labels",
            fix=f"set sources.{file.source}.label to the column of the class",
        )
    if file.source not in inventory.columns:
        inventory.columns[file.source] = resolved
        given = source_settings(source)
        taken = {name: value for name, value in resolved.items() if value != given[name]}
        if taken:
            log.info("%s: taking the columns %s", file.source, taken)
    known = inventory.columns[file.source]
    differing = [name for name in resolved if resolved[name] != known[name]]
    if differing:
        name = differing[0]
        raise InputError(
            f"{where}: {name} would be {resolved[name]!r}, in the source's first file it is"
            f" {known[name]!r}",
            fix=f"set sources.{file.source}.{name}, or make two sources of the files",
        )


def _tasks(run: RunFolder, settings: Settings, partitions: Iterable[Partition]) -> list[Task]:
    rules = Rules(
        seed=settings.seed,
        held_out=settings.index.held_out,
        num_classes=_num_classes(settings),
        several_sources=len(settings.sources) > 1,
    )
    tasks: list[Task] = []
    for part in partitions:
        source = settings.sources[part.source]
        mark = fingerprint(
            stage="index",
            version=VERSION,
            rules=asdict(rules),
            source=source_settings(source),
            name=part.source,
            file=part.file,
            stamp=part.stamp,
            rows=[part.first_row, part.num_rows],
        )
        payload = {
            "run": str(run.root),
            "partition": asdict(part),
            "source": plain(source),
            "rules": asdict(rules),
            "fingerprint": mark,
        }
        tasks.append(Task(part.name, payload, run.examples(part), mark))
    return tasks


def _num_classes(settings: Settings) -> int | None:
    return getattr(task_settings(settings), "num_classes", None) if settings.task else None


# -- keeping the folder true ----------------------------------------------------------------------


def _quarantine(run: RunFolder, name: str) -> Output:
    return Output(run.quarantine / f"{name}.parquet")


def _remove_old(run: RunFolder, inventory: _Inventory) -> None:
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


def _write_unreadable(run: RunFolder, inventory: _Inventory) -> None:
    """Files without a footer have no partition; their entry takes the name of their first."""
    for (source, file), detail in inventory.unreadable.items():
        table = quarantine_table(source, file, [(None, "unreadable_file", detail)])
        output = _quarantine(run, partition_name(source, file, 0))
        mark = fingerprint(stage="index", unreadable=[source, file, detail])
        if not output.is_done(mark):
            output.write(lambda path, table=table: write_table(table, path), mark)
        log.warning("%s/%s cannot be read: %s", source, file, detail)


def _has_quarantine(run: RunFolder, task: Task) -> bool:
    """Whether the rows that a finished partition set aside are still there."""
    mark = task.output.mark() or {}
    return not mark.get("bad") or _quarantine(run, task.name).path.exists()


# -- what came out --------------------------------------------------------------------------------


def _summary(run: RunFolder, inventory: _Inventory, outcome: Outcome) -> dict[str, Any]:
    bad = Counter[str]()
    rows = 0
    for part in inventory.partitions:
        mark = run.examples(part).mark() or {"rows": 0, "bad": {}}
        rows += mark["rows"]
        bad.update(mark["bad"])
    bad["unreadable_file"] += len(inventory.unreadable)
    summary: dict[str, Any] = {
        "files": len(inventory.files),
        "rows": rows,
        "held_out": 0,
        "bad": {reason: count for reason, count in sorted(bad.items()) if count},
        "num_domains": 0,
        "domains": {},
        "partitions": len(inventory.partitions),
        "done": len(outcome.done),
        "skipped": len(outcome.skipped),
    }
    if rows and not outcome.failures:
        examples = scan(run, "examples")
        counts = examples.group_by("domain").len().sort("domain").collect()
        summary["num_domains"] = counts.height
        largest = counts.sort("len", "domain", descending=[True, False]).head(_SHOWN_DOMAINS)
        summary["domains"] = dict(largest.sort("domain").iter_rows())
        held_out = examples.select((pl.col("split") == "held_out").sum()).collect().item()
        summary["held_out"] = int(held_out)
    return summary


def _check_features(run: RunFolder, inventory: _Inventory) -> None:
    """All partitions of a source must have feature vectors of one length."""
    lengths: dict[str, dict[int, str]] = defaultdict(dict)
    for part in inventory.partitions:
        mark = run.examples(part).mark() or {}
        if mark.get("num_features") and mark["rows"]:
            lengths[part.source].setdefault(mark["num_features"], part.file)
    for source, found in lengths.items():
        if len(found) > 1:
            places = ", ".join(f"{length} in {file}" for length, file in found.items())
            raise InputError(
                f"sources.{source}: the feature vectors differ in length: {places}",
                fix="make them equal, or make two sources of the files",
            )


def _check_quarantine(
    settings: Settings, run: RunFolder, inventory: _Inventory, summary: Mapping[str, Any]
) -> None:
    """Hold what was set aside against what `index` allows.

    Raises:
        TooManyBadError: it is more.
        InputError: nothing is left.
    """
    allowed = settings.index
    broken = _broken_files(run, inventory)
    bad = sum(count for reason, count in summary["bad"].items() if reason != "unreadable_file")
    total = summary["rows"] + bad
    if len(broken) > allowed.max_bad_files:
        (source, file), detail = next(iter(broken.items()))
        raise TooManyBadError(
            f"{len(broken)} of {summary['files']} files cannot be read; {source}/{file}: {detail}",
            fix="repair or remove them and run again (the others are done),"
            " or raise index.max_bad_files",
        )
    if bad > allowed.max_bad_rows * total:
        reasons = ", ".join(f"{count} {reason}" for reason, count in summary["bad"].items())
        raise TooManyBadError(
            f"{bad} of {total} rows were set aside ({reasons}), more than the share of"
            f" {allowed.max_bad_rows:g} that is allowed; the first is {_first_bad(run)}",
            fix=f"look at {run.quarantine}, correct the data, or raise index.max_bad_rows",
        )
    if summary["rows"] == 0:
        raise InputError(
            f"there are no examples in {', '.join(settings.sources)}:"
            f" {summary['files']} files, {total} rows",
            fix="check the paths, and sources.*.include",
        )


def _broken_files(run: RunFolder, inventory: _Inventory) -> dict[tuple[str, str], str]:
    broken = dict(inventory.unreadable)
    for part in inventory.partitions:
        mark = run.examples(part).mark() or {}
        if mark.get("bad", {}).get("unreadable_file"):
            table = pl.read_parquet(_quarantine(run, part.name).path)
            broken.setdefault((part.source, part.file), str(table["detail"][0]))
    return broken


def _first_bad(run: RunFolder) -> str:
    table = pl.read_parquet(sorted(run.quarantine.glob("part-*.parquet")), glob=False)
    rows = table.filter(pl.col("row").is_not_null()).sort("source", "file", "row")
    first = rows.row(0, named=True)
    return (
        f"row {first['row']} of {first['source']}/{first['file']}:"
        f" {first['reason']}, {first['detail']}"
    )
