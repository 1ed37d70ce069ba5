"""The tasks of `curate write`: which groups of shards there are, and which of them are done."""

import base64
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from curate.config import plain
from curate.data.files import fingerprint, misshapen, read_document, size_of
from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.data.recipe import files_of
from curate.data.shard_folder import is_shard, list_files
from curate.data.shard_formats import open_format
from curate.data.shard_layout import Group
from curate.data.shard_survey import Survey, survey
from curate.data.shard_weights import pack
from curate.errors import InputError
from jobs.run import Task
from jobs.settings import Settings
from jobs.write_curriculum import find_ordering, phasing_of
from jobs.write_line import line_tasks
from jobs.write_parts import (
    VERSION,
    context_of,
    deciding,
    inputs_of,
    portable,
    receipt,
    shard_from,
)
from jobs.write_tokenizer import ShardTokenizer, find_shard_tokenizer


@dataclass(frozen=True, slots=True)
class Work:
    """The tasks, and what they were made from."""

    survey: Survey
    deals: list[Task]
    """What comes before the tasks; none in the order of the input."""
    tasks: list[Task]
    tokenizer: str | None
    """Digest of the one that counted for the plan."""
    mixer: str | None
    """Of the plan."""
    formats: tuple[str, ...]
    """Of the shards, the first of which counts."""
    weights: str
    """How they reach the trainer."""
    order: str
    """Of the rows."""
    curriculum: dict[str, Any] | None
    """The settings of one, as JSON values."""
    tokens: ShardTokenizer | None
    """What formats of tokens are written with; None where there are none."""


def is_planned(run: RunFolder) -> bool:
    """Whether there is a plan of every partition."""
    partitions = run.partitions()
    is_complete = bool(partitions) and (run.plan / "summary.json").is_file()
    return is_complete and all(run.planned(part).mark() for part in partitions)


def require_plan(run: RunFolder) -> None:
    """Refuse to go on without a plan.

    Raises:
        InputError: names the command to run first.
    """
    if not is_planned(run):
        raise InputError(
            f"there is no complete plan in {run.root}",
            fix=f"run `curate plan {run.root}` first",
        )


def find_work(run: RunFolder, settings: Settings) -> Work:
    """What there is to write, from the plan; nothing is written.

    Raises:
        CurateError: the plan keeps nothing.
        ConfigError: the order or the curriculum cannot be had.
        InputError: an input file is gone, or its columns have no common type.
    """
    path = run.plan / "summary.json"
    summary = read_document(path) or {}
    if not {"tokenizer", "mixer"} <= set(summary):
        raise misshapen(path, "it has no tokenizer or no mixer")
    tokenizer, mixer = summary["tokenizer"], summary["mixer"]
    shards = settings.shards
    tokens = find_shard_tokenizer(run, settings)
    ordering = None
    if shards.curriculum is not None:
        ordering = find_ordering(run, shards.curriculum, seed=settings.seed, tokenizer=tokenizer)
    found = survey(
        run,
        run.partitions(),
        shards,
        seed=settings.seed,
        tokenizer=tokenizer,
        ordering=ordering,
    )
    if found.line is None:
        deals = list[Task]()
        tasks = [
            _task(run, settings, group, found, tokenizer=tokenizer, tokens=tokens)
            for group in found.groups
        ]
    else:
        deals, tasks = line_tasks(
            run, settings, found, found.line, tokenizer=tokenizer, tokens=tokens
        )
    return Work(
        survey=found,
        deals=deals,
        tasks=tasks,
        tokenizer=tokenizer,
        mixer=mixer,
        formats=shards.formats,
        weights=shards.weights,
        order=shards.order,
        curriculum=None if shards.curriculum is None else plain(shards.curriculum),
        tokens=tokens,
    )


def _task(
    run: RunFolder,
    settings: Settings,
    group: Group,
    found: Survey,
    *,
    tokenizer: str | None,
    tokens: ShardTokenizer | None,
) -> Task:
    schema = found.schemas[group.partitions[0].source].serialize().to_pybytes()
    terms = {part.name: pack(found.terms[part.name]) for part in group.partitions}
    phasing, scorers = phasing_of(found, [shard.component.domain for shard in group.shards])
    made_from = fingerprint(
        stage="write",
        version=VERSION,
        settings=deciding(settings, tokens),
        group=portable(asdict(group)),
        schema=xxhash.xxh3_128_hexdigest(schema),
        tokenizer=tokenizer,
        inputs=inputs_of(run, settings, group.partitions, tokenizer=tokenizer, scorers=scorers),
        terms=terms,
        **phasing,
    )
    payload = {
        "run": str(run.root),
        "context": context_of(settings, tokens),
        "group": asdict(group),
        "terms": terms,
        **phasing,
        "schema": base64.b64encode(schema).decode(),
        "tokenizer": tokenizer,
        "fingerprint": made_from,
    }
    return Task(group.name, payload, receipt(run, group.name), made_from)


def group_from(values: dict[str, Any]) -> Group:
    """The group that `asdict` took apart."""
    shards = [shard_from(shard) for shard in values["shards"]]
    partitions = tuple(Partition(**part) for part in values["partitions"])
    return Group(values["name"], partitions, tuple(values["piece_rows"]), tuple(shards))


def _is_document(file: str, folders: set[str]) -> bool:
    """Whether a file stands beside shards of now, for their loader; it is written anew."""
    folder, _, name = file.rpartition("/")
    is_counted = re.search(r"\d{5}", name) is not None
    # The files of a schedule lie above the folders of its phases.
    above = folder.split("/")[0] if re.fullmatch(r"[^/]+/phase-\d+", folder) else folder
    return not is_counted and any(
        place in (folder, above) or place.startswith(f"{folder}/") for place in folders
    )


def is_whole(run: RunFolder, task: Task) -> bool:
    """Whether a group is done and all its shards are still there."""
    if not task.is_done():
        return False
    try:
        places = [
            (run.shards / file, size) for shard in shards_of(task) for file, size in files_of(shard)
        ]
    except (InputError, TypeError, KeyError):  # a damaged receipt vouches for nothing
        return False
    return all(size_of(path) == size for path, size in places)


def shards_of(task: Task) -> list[dict[str, Any]]:
    """What the receipt of a finished group says of its shards.

    Raises:
        InputError: it is damaged.
    """
    return (read_document(task.output.path, shards=list) or {"shards": []})["shards"]


def stale_files(run: RunFolder, work: Work) -> list[Path]:
    """Shards and receipts of an older plan, and what killed writers left behind."""
    formats = [open_format(name) for name in work.formats]
    shards = work.survey.shards
    files = {file for shard in shards for layout in formats for file in layout.files(shard)}
    folders = {file.rpartition("/")[0] for file in files}
    stale = [
        run.shards / file
        for file in list_files(run.shards)
        if file.endswith(".tmp")
        or (file not in files and is_shard(file) and not _is_document(file, folders))
    ]
    receipts = {task.output.path.name for task in work.tasks}
    done = sorted((run.root / "shards.done").glob("group-*.json"))
    return stale + [path for path in done if path.name not in receipts]
