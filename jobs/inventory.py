"""The data as it is now: files, their Parquet forms, partitions, and the tasks that index them."""

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from curate.config import nearest, plain
from curate.data.columns import PROBLEM, resolve_columns
from curate.data.convert import conversion_fingerprint, converted, damage_detail
from curate.data.cutting import Footer, cut, read_footer
from curate.data.example import Source
from curate.data.files import fingerprint
from curate.data.formats.csv import refuse_other_separator
from curate.data.index import (
    VERSION,
    Rules,
    source_settings,
)
from curate.data.layout import RunFolder
from curate.data.partitions import (
    Output,
    Partition,
)
from curate.data.reading import resolve_address
from curate.data.shard_columns import refuse_taken_names
from curate.data.sources import InputFile, find_files
from curate.data.storage import is_damage, is_local
from curate.errors import CurateError, InputError
from jobs.run import Task
from jobs.settings import Settings, task_settings

log = logging.getLogger(__name__)

_FOOTER_THREADS = 16


@dataclass(slots=True)
class Inventory:
    """The data as it is now."""

    files: list[InputFile]
    partitions: list[Partition] = field(default_factory=list[Partition])
    unreadable: dict[tuple[str, str], str] = field(default_factory=dict[tuple[str, str], str])
    """(source, file) -> what is wrong with it."""
    columns: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    """Source -> its columns as they were resolved."""


def all_files(settings: Settings) -> list[InputFile]:
    """The files of all sources, in the order of the settings, then of their keys."""
    return [f for name, source in settings.sources.items() for f in find_files(name, source)]


def conversions(run: RunFolder, settings: Settings, files: Iterable[InputFile]) -> list[Task]:
    """One task for each file that is not Parquet."""
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


def take_stock(
    run: RunFolder, settings: Settings, files: list[InputFile], *, skip: set[str]
) -> Inventory:
    """Read all footers, cut partitions, check columns.

    Args:
        run: the run folder.
        settings: of the run.
        files: all inputs.
        skip: names (source/file) of files that have no Parquet form.

    Raises:
        InputError: a column is missing, or files of one source differ in their columns.
    """
    inventory = Inventory(files)
    present = [file for file in files if f"{file.source}/{file.file}" not in skip]
    with ThreadPoolExecutor(_FOOTER_THREADS) as threads:
        footers = threads.map(lambda file: _footer(run, file), present)
        for file, (address, stamp, footer) in zip(present, footers, strict=True):
            if isinstance(footer, str):
                inventory.unreadable[file.source, file.file] = footer
            elif footer.num_rows:
                _check_columns(settings, inventory, file, footer.schema)
                inventory.partitions += cut(
                    file.source,
                    file.file,
                    address,
                    stamp,
                    footer,
                    partition_rows=settings.index.partition_rows,
                )
    return inventory


def unseen_columns(settings: Settings, files: Iterable[InputFile]) -> list[str]:
    """Look at the columns of inputs that are not Parquet yet, in the first file of each source.

    All columns are checked where the file is small; of a larger CSV file that they are there.

    Args:
        settings: of the run.
        files: without a Parquet form.

    Returns:
        The sources of which nothing can be said.

    Raises:
        InputError: a column is missing, or the separator is another.
    """
    from jobs.starter_look import first_rows

    first = {file.source: file for file in reversed(list(files))}
    unseen: list[str] = []
    for name, file in first.items():
        source = settings.sources[name]
        if not is_local(file.address) or file.format not in ("csv", "jsonl"):
            unseen.append(name)
            continue
        try:
            rows, has_all = first_rows(file, source)
        except (pa.ArrowException, OSError):  # whoever converts it will set it aside
            unseen.append(name)
            continue
        schema = pa.schema([field for field in rows.schema if field.name != PROBLEM])
        if file.format == "csv" and rows.num_columns:
            refuse_other_separator(file, source, schema.names)
        if has_all and schema.names:
            _check_columns(settings, Inventory([]), file, schema)
        elif file.format == "csv" and schema.names:
            _check_names(source, file, schema.names)
        else:
            unseen.append(name)
    return unseen


def _check_names(source: Source, file: InputFile, names: list[str]) -> None:
    plain_names = [name for name in source.columns if not any(sign in name for sign in "*?[")]
    absent = next((name for name in plain_names if name not in names), None)
    if absent is not None:
        raise InputError(
            f"{file.source}/{file.file} ({file.address}) has no column {absent!r}; it has"
            f" {', '.join(names[:12])}",
            fix=nearest(absent, names) or "correct the column's name in the settings",
        )


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
        refuse_copy(run, address, error)
        return address, stamp, damage_detail(error)


def refuse_copy(run: RunFolder, address: str, error: Exception) -> None:
    """Do not blame the user's file where what is damaged is the converted copy of it.

    Raises:
        CurateError: it is the copy.
    """
    if "://" in address or Path(address).is_absolute():
        return
    raise CurateError(
        f"{run.root / address}, the converted copy of an input, is damaged: {damage_detail(error)}",
        fix="remove it and run the same command again: it is made anew from the input",
    ) from error


def _taken(name: str, columns: Any) -> str:
    """A field and the columns it is read from, for the log."""
    if isinstance(columns, str) or len(columns) <= 4:
        return f"{name}: {columns if isinstance(columns, str) else ', '.join(columns)}"
    return f"{name}: {columns[0]} to {columns[-1]} ({len(columns)} columns)"


def _check_columns(
    settings: Settings, inventory: Inventory, file: InputFile, schema: pa.Schema
) -> None:
    source = settings.sources[file.source]
    where = f"{file.source}/{file.file} ({file.address})"
    found = resolve_columns(source, schema, where=where)
    read = set(found.columns) - {found.domain}
    refuse_taken_names(schema.names, read, where=where)
    resolved = source_settings(found)
    num_classes = _num_classes(settings)
    if num_classes is not None and resolved["label"] is None:
        raise InputError(
            f"{where} has no label column, and the task {settings.task['kind']} needs labels",
            fix=f"set sources.{file.source}.label to the column of the class",
        )
    if file.source not in inventory.columns:
        inventory.columns[file.source] = resolved
        given = source_settings(source)
        taken = {name: value for name, value in resolved.items() if value != given.get(name)}
        if taken:
            log.info("%s: taking %s", file.source, ", ".join(map(_taken, taken, taken.values())))
    known = inventory.columns[file.source]
    differing = [name for name in resolved if resolved[name] != known.get(name)]
    if differing:
        name = differing[0]
        raise InputError(
            f"{where}: {name} would be {resolved[name]!r}, in the source's first file it is"
            f" {known.get(name)!r}",
            fix=f"set sources.{file.source}.{name}, or make two sources of the files",
        )


def index_tasks(run: RunFolder, settings: Settings, partitions: Iterable[Partition]) -> list[Task]:
    """One task for each partition."""
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


def quarantine_output(run: RunFolder, name: str) -> Output:
    """Where the rows of a partition lie that were set aside."""
    return Output(run.quarantine / f"{name}.parquet")
