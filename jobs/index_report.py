"""What came out of the index: counts, and whether more was set aside than the settings allow."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import polars as pl

from curate.data.layout import RunFolder
from curate.data.tables import damage_named, read_table, scan, table_paths
from curate.errors import InputError, TooManyBadError, counted
from jobs.inventory import Inventory, quarantine_output
from jobs.run import Outcome
from jobs.settings import Settings

_SHOWN_DOMAINS = 200


def index_summary(run: RunFolder, inventory: Inventory, outcome: Outcome) -> dict[str, Any]:
    """Counts over all partitions, those of earlier runs included."""
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
        with damage_named(table_paths(run, "examples")):
            counts = examples.group_by("domain").len().sort("domain").collect()
            held_out = examples.select((pl.col("split") == "held_out").sum()).collect().item()
        summary["num_domains"] = counts.height
        largest = counts.sort("len", "domain", descending=[True, False]).head(_SHOWN_DOMAINS)
        summary["domains"] = dict(largest.sort("domain").iter_rows())
        summary["held_out"] = int(held_out)
    return summary


def check_features(run: RunFolder, inventory: Inventory) -> None:
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


def check_quarantine(
    settings: Settings, run: RunFolder, inventory: Inventory, summary: Mapping[str, Any]
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
            f"{len(broken)} of {counted(summary['files'], 'file')} cannot be read;"
            f" {source}/{file}: {detail}",
            fix="repair or remove them and run again (the others are done),"
            " or raise index.max_bad_files",
        )
    if bad > allowed.max_bad_rows * total:
        reasons = ", ".join(f"{count} {reason}" for reason, count in summary["bad"].items())
        raise TooManyBadError(
            f"{bad} of {counted(total, 'row')} were set aside ({reasons}), more than the share of"
            f" {allowed.max_bad_rows:g} that is allowed; the first is {_first_bad(run)}",
            fix=f"look at {run.quarantine}, {_mend(summary['bad'])}, or raise index.max_bad_rows",
        )
    if summary["rows"] == 0:
        raise _nothing_left(settings, run, summary, broken)


def _mend(bad: Mapping[str, int]) -> str:
    """What to do about rows that were set aside, most of all."""
    rows = {reason: count for reason, count in bad.items() if reason != "unreadable_file"}
    if rows and max(rows, key=lambda reason: rows[reason]) == "invalid_utf8":
        return "save the file as UTF-8"
    return "correct the data"


def _nothing_left(
    settings: Settings,
    run: RunFolder,
    summary: Mapping[str, Any],
    broken: Mapping[tuple[str, str], str],
) -> InputError:
    """The error of an index without examples: what became of the rows."""
    names = ", ".join(settings.sources)
    rows = {key: count for key, count in summary["bad"].items() if key != "unreadable_file"}
    total = sum(rows.values())
    fix = (
        f"look at them with `curate show {run.root} --quarantine` (they lie in {run.quarantine}),"
        f" then {_mend(summary['bad'])}, or the columns in the settings"
    )
    if total:
        reason, count = max(rows.items(), key=lambda entry: entry[1])
        kind = f"all of them as {reason}" if count == total else f"most often as {reason} ({count})"
        all_rows = "the only row" if total == 1 else f"all {total} rows"
        return InputError(
            f"{all_rows} of {names} were set aside, {kind}; the first is {_first_bad(run)}", fix=fix
        )
    if broken:
        (source, file), detail = next(iter(broken.items()))
        all_files = "the only file" if len(broken) == 1 else f"all {len(broken)} files"
        return InputError(
            f"{all_files} of {names} cannot be read: {source}/{file}: {detail}",
            fix="repair or replace them, and run again",
        )
    return InputError(
        f"there are no examples in {names}: {counted(summary['files'], 'file')}, 0 rows",
        fix="check the path, and sources.*.include",
    )


def _broken_files(run: RunFolder, inventory: Inventory) -> dict[tuple[str, str], str]:
    broken = dict(inventory.unreadable)
    for part in inventory.partitions:
        mark = run.examples(part).mark() or {}
        if mark.get("bad", {}).get("unreadable_file"):
            table = read_table(quarantine_output(run, part.name).path)
            broken.setdefault((part.source, part.file), str(table["detail"][0]))
    return broken


def _first_bad(run: RunFolder) -> str:
    paths = sorted(run.quarantine.glob("part-*.parquet"))
    tables = [read_table(path).filter(pl.col("row").is_not_null()) for path in paths]
    heads = pl.concat([table.sort("source", "file", "row").head(1) for table in tables])
    first = heads.sort("source", "file", "row").row(0, named=True)
    return (
        f"row {first['row']} of {first['source']}/{first['file']}:"
        f" {first['reason']}, {first['detail']}"
    )
