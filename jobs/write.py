"""`curate write`: the plan becomes shards that a trainer loads.

`shards/manifest.json` goes first and comes back last: a folder without it is not complete. The
marks of the shards lie outside, in `shards.done/`, so that the folder can be pushed as it is.
"""

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from curate.config import plain
from curate.data.card import card, load_lines
from curate.data.files import digest_file, fingerprint, read_json
from curate.data.layout import RunFolder
from curate.data.manifest import load_manifest, record_stage
from curate.data.partitions import Output, Partition
from curate.data.recipe import Asked, Written, manifest, mixture
from curate.data.shard_folder import list_files, refuse_foreign_files, text_digest, write_text
from curate.data.shard_layout import Component, Group, Shard
from curate.data.shard_settings import Shards
from curate.data.shard_survey import Survey, survey
from curate.data.shards import write_group
from curate.errors import InputError
from curate.plan.mixture import load_mixture
from jobs.cluster import Pool
from jobs.run import Listener, Receipt, StageState, Task, ignore, raise_failures, run_tasks
from jobs.settings import Settings

VERSION = 1
"""Of what is written: raised when the same plan would give other bytes."""


@dataclass(frozen=True, slots=True)
class _Work:
    """The tasks, and what they were made from."""

    survey: Survey
    tasks: list[Task]
    tokenizer: str | None
    """Digest of the one that counted for the plan."""
    mixer: str | None
    """Of the plan."""


def write_run(settings: Settings, *, pool: Pool, listener: Listener = ignore) -> dict[str, Any]:
    """Write what the plan keeps.

    Args:
        settings: of the run.
        pool: where the tasks run.
        listener: told after each task.

    Returns:
        Number of shards, rows, tokens and bytes, the same per domain, and the lines that load them.

    Raises:
        InputError: there is no plan, or an input file has gone or changed.
        RunFolderError: the shards folder holds files of somebody else.
        CurateError: the plan keeps nothing, or a shard could not be written; the others stay.
    """
    run = RunFolder(Path(settings.run))
    refuse_foreign_files(run.shards)
    _require_plan(run)
    work = _find_work(run, settings)
    due = [task for task in work.tasks if not _is_whole(run, task)]
    had_stale = bool(_stale_files(run, work))
    if due or had_stale:
        (run.shards / "manifest.json").unlink(missing_ok=True)
    for task in due:
        task.output.remove()
    outcome = run_tasks("write", work.tasks, write_work, pool=pool, listener=listener)
    raise_failures("write", outcome)
    _remove(_stale_files(run, work), run)
    written = _written(run, work)
    _write_documents(run, written)
    summary = _summary(run, written)
    if outcome.done or had_stale or "write" not in load_manifest(run)["stages"]:
        facts = {key: summary[key] for key in ("shards", "rows", "tokens", "bytes")}
        facts["digest"] = digest_file(run.shards / "manifest.json")
        outputs = [task.output for task in work.tasks]
        record_stage(run, "write", outputs=outputs, seconds=outcome.seconds, facts=facts)
    return summary


def plan_write(settings: Settings) -> StageState:
    """What `write_run` would do; writes nothing."""
    run = RunFolder(Path(settings.run))
    if not _is_planned(run):
        return StageState("write", 0, 0, ("there is no complete plan yet",))
    work = _find_work(run, settings)
    due = [task for task in work.tasks if not _is_whole(run, task)]
    new = sum(task.output.mark() is None for task in due)
    old = sum(task.output.mark() is not None and not task.is_done() for task in due)
    stale = len(_stale_files(run, work))
    reasons = {
        f"{new} groups of shards are not written yet": new,
        f"{old} groups were made from another plan, other inputs or other settings": old,
        f"{len(due) - new - old} groups have shards that are missing or cut short": len(due)
        - new
        - old,
        f"{stale} files are left from an older plan": stale,
    }
    why = tuple(reason for reason, number in reasons.items() if number)
    return StageState("write", len(work.tasks), len(work.tasks) - len(due), why)


def measure_write(settings: Settings) -> dict[str, float]:
    """Bytes and seconds of all that is due, from a sample of the rows; writes nothing."""
    run = RunFolder(Path(settings.run))
    if not _is_planned(run):
        return {}
    work = _find_work(run, settings)
    rows = {group.name: sum(s.num_rows for s in group.shards) for group in work.survey.groups}
    due = sum(rows[task.name] for task in work.tasks if not _is_whole(run, task))
    share = due / sum(rows.values())
    return {"size_bytes": work.survey.size_bytes * share, "seconds": work.survey.seconds * share}


def write_work(payload: dict[str, Any]) -> Receipt:
    """Write one group of shards, then its receipt."""
    run = RunFolder(Path(payload["run"]))
    group = _group(payload["group"])
    schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(payload["schema"])))
    receipts = write_group(
        run,
        group,
        schema=schema,
        settings=Shards(**payload["shards"]),
        tokenizer=payload["tokenizer"],
    )
    text = json.dumps({"shards": receipts}, indent=1, ensure_ascii=False)
    facts = {"shards": len(receipts), "rows": sum(shard["rows"] for shard in receipts)}
    _receipt(run, group.name).write(
        lambda path: path.write_text(text, encoding="utf-8"), payload["fingerprint"], **facts
    )
    return facts


# -- what is to be done ---------------------------------------------------------------------------


def _is_planned(run: RunFolder) -> bool:
    partitions = run.partitions()
    is_complete = bool(partitions) and (run.plan / "summary.json").is_file()
    return is_complete and all(run.planned(part).mark() for part in partitions)


def _require_plan(run: RunFolder) -> None:
    if not _is_planned(run):
        raise InputError(
            f"there is no complete plan in {run.root}",
            fix=f"run `curate plan {run.root}` first",
        )


def _find_work(run: RunFolder, settings: Settings) -> _Work:
    found = survey(run, run.partitions(), settings.shards)
    summary = read_json(run.plan / "summary.json")
    tokenizer, mixer = summary["tokenizer"], summary["mixer"]
    tasks = [_task(run, settings, group, found, tokenizer) for group in found.groups]
    return _Work(found, tasks, tokenizer, mixer)


def _task(
    run: RunFolder, settings: Settings, group: Group, found: Survey, tokenizer: str | None
) -> Task:
    schema = found.schemas[group.partitions[0].source].serialize().to_pybytes()
    inputs: list[Any] = []
    for part in group.partitions:
        tables = [run.planned(part), run.examples(part)]
        if tokenizer is not None:
            tables.append(run.lengths(part, tokenizer))
        marks = [table.mark() or {} for table in tables]
        inputs.append([part.stamp, *(mark.get("digest") for mark in marks)])
    # Where the files lie is no part of what the shards are.
    portable = asdict(group)
    for part in portable["partitions"]:
        del part["address"]
    made_from = fingerprint(
        stage="write",
        version=VERSION,
        settings=plain(settings.shards),
        group=portable,
        schema=xxhash.xxh3_128_hexdigest(schema),
        tokenizer=tokenizer,
        inputs=inputs,
    )
    payload = {
        "run": str(run.root),
        "shards": plain(settings.shards),
        "group": asdict(group),
        "schema": base64.b64encode(schema).decode(),
        "tokenizer": tokenizer,
        "fingerprint": made_from,
    }
    return Task(group.name, payload, _receipt(run, group.name), made_from)


def _group(values: dict[str, Any]) -> Group:
    """The group that `asdict` took apart."""
    shards = [
        Shard(shard["file"], Component(**shard["component"]), tuple(shard["row_groups"]))
        for shard in values["shards"]
    ]
    partitions = tuple(Partition(**part) for part in values["partitions"])
    return Group(values["name"], partitions, tuple(values["piece_rows"]), tuple(shards))


def _receipt(run: RunFolder, name: str) -> Output:
    return Output(run.root / "shards.done" / f"{name}.json")


def _is_whole(run: RunFolder, task: Task) -> bool:
    """Whether a group is done and all its shards are still there."""
    if not task.is_done():
        return False
    for shard in read_json(task.output.path)["shards"]:
        path = run.shards / shard["file"]
        if not path.is_file() or path.stat().st_size != shard["bytes"]:
            return False
    return True


# -- the folder -----------------------------------------------------------------------------------


def _stale_files(run: RunFolder, work: _Work) -> list[Path]:
    """Shards and receipts of an older plan, and what killed writers left behind."""
    files = {shard.file for group in work.survey.groups for shard in group.shards}
    stale = [
        run.shards / file
        for file in list_files(run.shards)
        if (file not in files and file.startswith("data/")) or file.endswith(".tmp")
    ]
    receipts = {task.output.path.name for task in work.tasks}
    done = sorted((run.root / "shards.done").glob("group-*.json"))
    return stale + [path for path in done if path.name not in receipts]


def _remove(stale: Sequence[Path], run: RunFolder) -> None:
    for path in stale:
        if path.suffix == ".json":
            Output(path).remove()
            continue
        path.unlink(missing_ok=True)
        folder = path.parent
        while folder != run.shards and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent


def _write_documents(run: RunFolder, written: Written) -> None:
    """The card, the mixture and, last, the manifest; a file that would not change is left alone."""
    mixed = _json(mixture(written))
    write_text(run.shards / "README.md", card(written))
    write_text(run.shards / "mixture.json", mixed)
    files = {"mixture.json": text_digest(mixed)}
    write_text(run.shards / "manifest.json", _json(manifest(written, files=files)))


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


# -- what was done --------------------------------------------------------------------------------


def _written(run: RunFolder, work: _Work) -> Written:
    receipts = [s for task in work.tasks for s in read_json(task.output.path)["shards"]]
    found = work.survey
    asked: list[Asked] = []
    if work.mixer is not None:
        chosen = load_mixture(run.mixtures / work.mixer / "mixture.json")
        asked = [Asked(phase.share, phase.weights) for phase in chosen.phases]
    schemas = {"": next(iter(found.schemas.values()))} if found.is_uniform else found.schemas
    return Written(
        shards=sorted(receipts, key=lambda s: (s["phase"], s["domain"], s["file"])),
        examples=found.examples,
        names=found.names,
        sources=found.sources,
        columns={
            source: {field.name: str(field.type) for field in schema}
            for source, schema in schemas.items()
        },
        mixer=work.mixer,
        asked=asked,
        tokenizer=work.tokenizer,
    )


def _summary(run: RunFolder, written: Written) -> dict[str, Any]:
    rows, tokens, sizes = (written.sums(key) for key in ("rows", "tokens", "bytes"))
    domains: dict[str, dict[str, Any]] = {}
    for component in rows:
        entry = domains.setdefault(
            component.domain,
            {"config": written.names[component.domain], "rows": 0, "tokens": 0, "bytes": 0},
        )
        for key, sums in (("rows", rows), ("tokens", tokens), ("bytes", sizes)):
            entry[key] += sums[component]
    return {
        "folder": str(run.shards),
        "shards": len(written.shards),
        "rows": written.total("rows"),
        "tokens": written.total("tokens") if written.tokenizer is not None else None,
        "unit": written.unit,
        "bytes": written.total("bytes"),
        "domains": domains,
        "load": load_lines(written, json.dumps(str(run.shards), ensure_ascii=False)),
    }
